"""The prompts of a comparison, and what each side says to them."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf import rng
from jaxrlhf.config import EvaluationConfig, ToyTask
from jaxrlhf.data import toy
from jaxrlhf.data.batches import trim
from jaxrlhf.data.pairs import Prompt, read_prompts
from jaxrlhf.data.report import DataError
from jaxrlhf.data.tokens import Limits, decode_responses, finished_responses, tokenize_prompts
from jaxrlhf.evaluation.comparison import Texts
from jaxrlhf.models.hub import load, read_tokenizer, resolve
from jaxrlhf.rollouts.dataset import sample_dataset
from jaxrlhf.run.data import sampling_of
from jaxrlhf.run.evaluate import SAMPLES
from jaxrlhf.run.inputs import folder_identity
from jaxrlhf.run.sides import REFERENCE, Side, read_stored

NEW_TOKENS = 128  # where no stage says how long its responses may be


@dataclass(frozen=True)
class Writing:
    """How policies write, the same for both sides: same row, same random numbers. `max_new_tokens` includes EOS."""

    max_new_tokens: int
    max_prompt_length: int = 512
    temperature: float = EvaluationConfig.temperature
    batch_size: int = EvaluationConfig.batch_size
    seed: int = 0
    dtype: str | None = None

    def identity(self) -> dict[str, Any]:
        """What the texts depend on: all but how many are written at a time."""
        return {name: value for name, value in vars(self).items() if name != "batch_size"}


@dataclass(frozen=True)
class Asked:
    """The prompts of a comparison; `file` is where they can be read again with another tokenizer, for conversations."""

    rows: list[Prompt]
    file: str | None = None


def asked_of(
    sides: tuple[Side, Side], prompts: str | None, toy_prompts: int | None, limit: int | None, seed: int, tokenizer: str | None
) -> Asked:
    """The prompts that both sides answer, each once."""
    if prompts is not None and toy_prompts is not None:
        raise ValueError("--prompts and --toy both say which prompts to use; give one.")
    stored = next((side for side in sides if side.kind == "stored"), None)
    file = None
    if toy_prompts is not None:
        rows = toy.prompts(ToyTask(), toy_prompts, seed, "evaluation")
    elif prompts is not None:
        rows, file = _read_asked(prompts, sides, tokenizer)
    elif stored is not None:
        rows = [Prompt(row.id, row.prompt, row.source, row.reference, row.templated) for row in stored.rows]
        further = {row.prompt: row.reference for side in sides for row in side.rows if row.reference is not None}
        rows = [row if row.reference is not None else replace(row, reference=further.get(row.prompt)) for row in rows]
    else:
        raise ValueError("there is no prompt: give --prompts FILE (or an evaluation stage of a run), or --toy N for the built-in task.")
    if any(side.kind == "reference" for side in sides) and not any(row.reference is not None for row in rows):
        raise DataError(
            "no prompt has a reference response to compare with; give prompts with one (a field completion, response or chosen), "
            "or name a side B."
        )
    return Asked(rows[:limit], file)


def _read_asked(given: str, sides: tuple[Side, Side], tokenizer: str | None) -> tuple[list[Prompt], str | None]:
    path = Path(given).expanduser()
    if path.is_dir() and (path / SAMPLES).is_file():
        path = path / SAMPLES
    if path.name == SAMPLES:
        return [Prompt(row.id, row.prompt, row.source, row.reference, row.templated) for row in read_stored(path)[0]], None
    source = tokenizer or next((str(side.folder) for side in sides if side.kind == "policy"), None)
    return _prompts(given, None if source is None else read_tokenizer(resolve(source))), given


def _prompts(file: str, tokenizer: Any) -> list[Prompt]:
    rows, report = read_prompts(file, unique=True, tokenizer=tokenizer)
    if report.dropped:
        print(report.summary(), file=sys.stderr)
    return rows


def new_tokens_of(sides: tuple[Side, Side], given: int | None) -> tuple[int, list[str]]:
    """(the length both sides get, what a reader has to know): responses of unequal limits are not comparable."""
    stated = {side.name: side.response_length for side in sides if side.response_length is not None}
    writes = [side for side in sides if side.kind == "policy"]
    limit = given or next((side.response_length for side in sides if side.kind == "stored" and side.response_length), None)
    limit = limit or max(stated.values(), default=NEW_TOKENS)
    if not writes:
        differing = len(set(stated.values())) > 1
        return limit, [f"the responses were written under different limits: {_said(stated)} tokens."] if differing else []
    others = {name: tokens for name, tokens in stated.items() if tokens != limit}
    return limit, [f"policies wrote up to {limit} tokens; under another limit trained or written: {_said(others)}."] if others else []


def _said(limits: dict[str, int]) -> str:
    return ", ".join(f"{name} {tokens}" for name, tokens in limits.items())


def identity(side: Side) -> str:
    """The content of a side, wherever it lies."""
    if side.kind == "policy":
        return folder_identity(str(side.folder))
    return REFERENCE if side.kind == "reference" else fingerprint([(row.prompt, row.response) for row in side.rows])


def prompts_identity(rows: list[Prompt]) -> str:
    """Of texts and order: a prompt's random numbers are those of its place."""
    return fingerprint([(row.id, row.prompt, row.reference, row.templated) for row in rows])


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]


Told = dict[int, tuple[str, bool | None]]  # number of the prompt -> (response, did it end by itself)


def responses_of(side: Side, name: str, asked: Asked, writing: Writing, folder: Path, show: Callable[[str], Any]) -> Told:
    """The side's response to every prompt it has one for."""
    if side.kind == "reference":
        return {i: (row.reference, None) for i, row in enumerate(asked.rows) if row.reference is not None}
    if side.kind == "stored":
        rows = {row.prompt: row for row in side.rows}
        return {i: (rows[p.prompt].response, rows[p.prompt].finished) for i, p in enumerate(asked.rows) if p.prompt in rows}
    return written(side, name, asked, writing, folder, show)


def written(side: Side, name: str, asked: Asked, writing: Writing, folder: Path, show: Callable[[str], Any]) -> Told:
    """What a policy writes; kept in `folder`, so that a judge who was interrupted goes on about the same responses."""
    facts = {"policy": identity(side), "prompts": prompts_identity(asked.rows), **writing.identity()}
    path = folder / f"responses-{name}.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["written"] == facts:
            return {row["number"]: (row["response"], row["finished"]) for row in kept["responses"]}
    told = generated(side, asked, writing, show)
    rows = [{"number": i, "prompt": asked.rows[i].prompt, "response": text, "finished": ended} for i, (text, ended) in told.items()]
    write(path, json.dumps({"written": facts, "responses": rows}, ensure_ascii=False, indent=0) + "\n")
    return told


def generated(side: Side, asked: Asked, writing: Writing, show: Callable[[str], Any]) -> Told:
    """Responses sampled from a policy. Prompts over its limit are named on standard error and have none."""
    loaded = load(side.folder or "", head="lm", dtype=writing.dtype)
    if loaded.tokenizer is None:
        raise ValueError(f"{side.name} has no tokenizer; save one beside the model.")
    rows = _rendered(asked, loaded.tokenizer)
    table, report = tokenize_prompts(rows, loaded.tokenizer, Limits(writing.max_prompt_length, writing.max_new_tokens))
    if report.dropped:
        print(f"{side.name}: {report.summary()}", file=sys.stderr)
    # A prompt has its own random numbers, by its place among all: the other side has the same, whatever either leaves out.
    table = replace(trim(table, 8), index_B=np.array(report.rows, np.int32))
    sampling = sampling_of(loaded, max_new_tokens=writing.max_new_tokens, temperature=writing.temperature)
    key = rng.stream(rng.root_key(writing.seed), "evaluation")
    with show(f"responses of {side.name}") as progress:
        size = min(writing.batch_size, len(report.rows))
        out = sample_dataset(loaded.model, loaded.params, table, key, sampling, batch_size=size, progress=progress)
    texts = decode_responses(out.response_BT, out.response_mask_BT, loaded.tokenizer, sampling.eos_ids)  # type: ignore[arg-type]
    ended = finished_responses(out.response_BT, out.response_mask_BT, sampling.eos_ids)  # type: ignore[arg-type]
    return {i: (text, bool(end)) for i, text, end in zip(report.rows, texts, ended, strict=True)}


def _rendered(asked: Asked, tokenizer: Any) -> list[Prompt]:
    """The prompts as this policy reads them: conversations through its own chat template, text as it is."""
    if asked.file is None or not any(row.templated for row in asked.rows):
        return asked.rows
    own = {row.source: row for row in read_prompts(asked.file, tokenizer=tokenizer)[0]}
    return [own.get(row.source, row) for row in asked.rows]


def together(rows: list[Prompt], told: list[Told]) -> tuple[Texts, list[list[bool | None]], list[str]]:
    """(texts, who ended by itself, what was left out): the prompts that both sides have a response to, in order."""
    kept = [i for i in range(len(rows)) if all(i in side for side in told)]
    if not kept:
        raise DataError(
            f"there is no prompt that both sides answer: of {len(rows)}, A has responses to {len(told[0])} and B to {len(told[1])}. "
            "Prompts are matched by their whole text."
        )
    a, b = ([side[i] for i in kept] for side in told)
    asked = [rows[i] for i in kept]
    texts = Texts([r.id for r in asked], [r.prompt for r in asked], [x for x, _ in a], [y for y, _ in b], [r.reference for r in asked])
    lacking = [f"{len(rows) - len(side)} without one of {name}" for side, name in zip(told, "AB", strict=True) if len(side) < len(rows)]
    notes = [f"{len(rows) - len(kept)} of {len(rows)} prompts are left out: {', '.join(lacking)}."] if lacking else []
    return texts, [[ended for _, ended in side] for side in (a, b)], notes


def write(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(text.encode("utf-8", "surrogatepass"))
    os.replace(partial, path)
