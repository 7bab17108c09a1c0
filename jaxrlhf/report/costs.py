"""What a run cost, in seconds and in FLOPs, and how much of it went into correcting the reward model.

Seconds are those of stage.json: of all processes that worked on the stage, up to the checkpoints that were gone on from, compilation
included. FLOPs are counted, not measured:

    training 6 · P · tokens, a forward pass or a sampled token 2 · P · tokens   (Kaplan et al. 2020, §2.1)

with P all parameters of the model, tokens real ones (prompt and response, no padding). Corrections are everything that round 2 and later
do to the reward model: deciding (refit), weighing, choosing or making pairs (update), fitting (reward).
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxrlhf.report.run_files import number, sample_columns
from jaxrlhf.report.runs import PREFERENCE, RunRead, StageRead

PARTS: tuple[str, ...] = ("SFT", "pairs", "reward model, round 1", "policies", "corrections", "evaluation")
FORWARD, TRAIN = 2, 6  # FLOPs a parameter and token
HEADER_LIMIT = 100_000_000  # bytes; what the safetensors format allows
FREE = ("unweighted", "random-subset")  # updates that read no model


def part_of(stage: StageRead) -> str | None:
    """The part of the cost a stage belongs to; None for what costs nothing (the tokenizer)."""
    if stage.function in ("update", "refit") or (stage.function == "reward" and (stage.round or 0) > 1):
        return "corrections"
    by_function = {"sft": "SFT", "pairs": "pairs", "reward": "reward model, round 1", "evaluation": "evaluation"}
    return by_function.get(stage.function) or ("policies" if stage.round else None)


def seconds_of(records: Iterable[Mapping[str, Any]]) -> float:
    """Of all stages, given their stage.json: the tokenizer's too, which is no part of the cost, and those that runs share."""
    return sum(float(record.get("seconds") or 0.0) for record in records)


def seconds_by_part(run: RunRead) -> dict[str, float]:
    totals: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for stage in run.stages:
        if (part := part_of(stage)) is not None:
            totals[part] += stage.seconds
    return totals


def flops_by_part(run: RunRead) -> tuple[dict[str, float | None], list[str]]:
    """(FLOPs by part, why a part is unknown): None where a count is missing for one of its stages."""
    totals: dict[str, float | None] = dict.fromkeys(PARTS, 0.0)
    reasons: list[str] = []
    counts = Counts(run)
    for stage in run.stages:
        part = part_of(stage)
        if part is None:
            continue
        value, reason = counts.of(stage)
        before = totals[part]
        totals[part] = None if value is None or before is None else before + value
        if value is None:
            reasons.append(f"{stage.name}: {reason}")
    return totals, reasons


def share_of_corrections(parts: dict[str, Any]) -> float | None:
    """Corrections / everything but evaluation, which trains nothing; None where a part is unknown or nothing was done."""
    counted = [value for name, value in parts.items() if name != "evaluation"]
    if any(value is None for value in counted) or not sum(counted):
        return None
    return parts["corrections"] / sum(counted)


class Counts:
    """FLOPs of single stages of one run."""

    def __init__(self, run: RunRead):
        self._run = run
        self._by_hash = {s.hash: s for s in run.stages}

    def of(self, stage: StageRead) -> tuple[float | None, str]:
        """(FLOPs, "") or (None, what is missing)."""
        kinds = {"sft": self._sft, "pairs": self._pairs, "reward": self._reward, "update": self._update, "evaluation": self._evaluation}
        count = kinds.get(stage.function)
        if count is None:
            count = self._preference if stage.function in PREFERENCE else self._rollouts if "ppo" in stage.config else None
        if count is None:
            return None, f"no formula for a stage of kind {stage.function}"
        try:
            value = number(count(stage))
        except LookupError as error:
            return None, error.args[0] if isinstance(error, Missing) else f"the folder does not say {error}"
        except (TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:  # a count of the folder is no number, or 0
            return None, f"the folder's counts cannot be used ({error})"
        return value, "" if value is not None else "the folder's counts cannot be used"

    def _model(self, stage: StageRead, name: str) -> int:
        source = self._by_hash.get(stage.inputs.get(name, ""))
        return size(stage if source is None else source)

    def _sft(self, stage: StageRead) -> float:
        result = stage.result
        seen = rows_seen(result["rows"], result["steps"], stage.config["sft"]["batch_size"])
        return TRAIN * size(stage) * result["tokens"] * seen / result["rows"]

    def _pairs(self, stage: StageRead) -> float:
        return FORWARD * self._model(stage, "sft") * stage.result["sampled_tokens"] if "sft" in stage.inputs else 0.0

    def _tokens_a_pair(self) -> float:
        stage = next(iter(self._run.of("pairs")), None)
        if stage is None:
            raise Missing("the pairs' stage is not there")
        return pair_tokens(stage.folder / "train.parquet") / stage.result["train"]

    def _reward(self, stage: StageRead) -> float:
        seen = rows_seen(stage.result["pairs"], stage.result["steps"], stage.config["reward"]["batch_size"])
        return TRAIN * size(stage) * self._tokens_a_pair() * seen

    def _preference(self, stage: StageRead) -> float:
        pairs = stage.result["pairs"]
        seen = rows_seen(pairs, stage.result["steps"], stage.config["dpo"]["batch_size"])
        reference = FORWARD * pairs if "reference" in stage.inputs else 0
        return size(stage) * self._tokens_a_pair() * (TRAIN * seen + reference)

    def _update(self, stage: StageRead) -> float:
        """All pairs under the policy, and under π_SFT the first time (its log-probs are kept)."""
        name = stage.result["update"]
        if name in FREE:
            return 0.0
        if name != "importance-weighted":
            raise Missing(f"what the update {name} samples and embeds is not counted")
        first = min(s.round or 0 for s in self._run.of("update")) == stage.round
        models = self._model(stage, "policy") + (self._model(stage, "sft") if first else 0)
        return FORWARD * models * self._tokens_a_pair() * stage.result["of"]

    def _rollouts(self, stage: StageRead) -> float:
        """Sampling, log-probs of policy and reference (and of π_SFT where it is neither), scores and values, and the epochs of updates."""
        run, ppo, result = self._run, stage.config["ppo"], stage.result
        lengths = [x for line in run.log if line.get("round") == stage.round and (x := number(line.get("rollout/length"))) is not None]
        if not lengths:
            raise Missing("metrics.jsonl has no rollout/length")
        tokens = result["episodes"] * (self._prompt_length(stage) + sum(lengths) / len(lengths))
        policy, rewards = size(stage), [self._model(stage, name) for name in stage.inputs if name.split("-")[0] == "reward"]
        critic = rewards[0] if rewards and stage.function == "ppo" else 0
        further = stage.inputs.get("sft") not in (stage.inputs.get("reference"), None)
        read = ppo["old_logp"] == "score"  # the sampler's own log-probs save that pass
        forward = policy * (2 + read + further) + sum(rewards) + critic
        return tokens * (FORWARD * forward + TRAIN * (policy + critic) * ppo["num_ppo_epochs"])

    def _prompt_length(self, stage: StageRead) -> float:
        """Mean tokens of a prompt: of the policy's own, or else of the evaluation's."""
        if "prompt_length" in stage.result:
            return stage.result["prompt_length"]
        for one in self._run.of("evaluation"):
            if prompts := sample_columns(one.folder, self._run.missing).get("prompt_tokens"):
                return sum(map(len, prompts)) / len(prompts)
        raise Missing("no length of the prompts is kept")

    def _evaluation(self, stage: StageRead) -> float:
        """Two responses a prompt are sampled; the first is read by the policy and π_SFT, three tables by each reward model."""
        columns = sample_columns(stage.folder, self._run.missing)
        tokens = sum(map(len, columns["prompt_tokens"])) + sum(map(len, columns["response_1_tokens"]))
        policy = self._model(stage, "policy")
        rewards = [self._model(stage, name) for name in stage.inputs if name.split("-")[0] == "reward"]
        kl = policy + self._model(stage, "sft") if stage.round else 0
        return FORWARD * tokens * (2 * policy + kl + 3 * sum(rewards))


class Missing(LookupError):
    """A count that no file of the run holds."""


def rows_seen(rows: int, steps: int, batch_size: int) -> int:
    """Rows that `steps` batches hold where every epoch ends with a batch that is not full."""
    epochs, more = divmod(steps, math.ceil(rows / batch_size)) if rows else (0, 0)
    return epochs * rows + more * batch_size


def size(stage: StageRead) -> int:
    """Parameters of the model in a stage's folder, from the headers of its safetensors files; Missing where there are none."""
    files = sorted(stage.folder.glob("*.safetensors"))
    if not files:
        raise Missing(f"{stage.name} has no model.safetensors")
    return sum(_parameters(str(path), path.stat().st_mtime_ns) for path in files)


@lru_cache(maxsize=512)
def _parameters(path: str, changed: int) -> int:
    """Sum of the sizes of all tensors of one file: its first 8 bytes are the length of a JSON header with their shapes."""
    del changed  # part of the key: a file that was replaced is read again
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if length > HEADER_LIMIT:
            raise Missing(f"{path} is no safetensors file")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise Missing(f"{path} is no safetensors file") from None
    return sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")


def pair_tokens(path: Path) -> int:
    """Tokens of both sides of all pairs of a table, prompts counted with each."""
    try:
        return _pair_tokens(str(path), path.stat().st_mtime_ns)
    except OSError:
        raise Missing(f"{path.name} of the pairs is not there") from None


@lru_cache(maxsize=128)
def _pair_tokens(path: str, changed: int) -> int:
    del changed
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    names = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
    try:
        table = pq.read_table(path, columns=list(names))
    except (KeyError, pa.ArrowException) as error:
        raise Missing(f"{Path(path).name} of the pairs cannot be read ({error})") from None
    prompt, chosen, rejected = (_total(pc.list_value_length(table[name]).to_pylist()) for name in names)  # type: ignore[attr-defined]
    return 2 * prompt + chosen + rejected


def _total(lengths: Iterable[int | None]) -> int:
    return sum(x or 0 for x in lengths)
