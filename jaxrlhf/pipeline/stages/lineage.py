"""Where a model comes from: `lineage.json` in the folder of every reward model and policy, and the tree they make back to π_SFT.

What is written is stage names and hashes and facts about the data, never a path: the file says the same wherever its folder is copied to.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.algorithms.reward_update import Pairs
from jaxrlhf.algorithms.rounds import PREFERENCE, Round
from jaxrlhf.data.pairs import dataset_hash
from jaxrlhf.files import DamagedFile, read_json
from jaxrlhf.losses import weight_summary
from jaxrlhf.pipeline.stages.context import RoundInputs
from jaxrlhf.storage.record import RECORD, read_record
from jaxrlhf.storage.stage import Done, StageError

FILE = "lineage.json"
REBUILD = "delete the folder of its stage, and the same run builds it again"
WEIGHTS = ("ess", "ess_fraction", "mean", "min", "max", "largest_share")


def reward_lineage(
    round: Round, *, start: Done, sft: Done, pairs: Done, update: Done | None, fitted: Pairs, weights_N: np.ndarray
) -> dict[str, Any]:
    """A reward model's parent, what it was fitted on, and the policy it is to judge (π_SFT where no update was made).

    `data.hash` is of the pairs' ids and texts, whatever their order; `data.weights` are those of losses.weight_summary.
    """
    summary, policy = weight_summary(weights_N), reference_to(sft)
    if update is not None and (hash := update.record["inputs"]["policy"]) != sft.hash:
        policy = {"stage": f"r{round.number - 1}-policy", "hash": hash}  # the policy the update was made for, as its stage knows it
    data = {
        "hash": dataset_hash(fitted.rows),
        "pairs": len(fitted.rows),
        "source": reference_to(pairs),
        "update": None if update is None else update.record["result"]["update"],
        "weights": {name: float(summary[name]) for name in WEIGHTS},
    }
    return {
        "kind": "reward",
        "round": round.number,
        "parent": reference_to(start),
        "data": data,
        "corrects_for": policy,
    }


def policy_lineage(round: Round, given: RoundInputs, *, refers: bool = True) -> dict[str, Any]:
    """A policy's parent, its KL reference (where it `refers` to one) and π_SFT; its reward models, or the pairs it learns from directly."""
    direct = round.policy_update in PREFERENCE
    facts = {
        "kind": "policy",
        "round": round.number,
        "update": round.policy_update,
        "parent": reference_to(given.start),
        "reward": [] if direct else [reference_to(reward) for reward in given.rewards],
        "reference": reference_to(given.reference) if refers else None,
        "sft": reference_to(given.sft),
    }
    if direct:
        facts["pairs"] = reference_to(given.pairs)
        facts |= {} if given.update is None else {"pairs_update": reference_to(given.update)}
    return facts


def reference_to(done: Done) -> dict[str, str]:
    return {"stage": done.name, "hash": done.hash}


def write_lineage(folder: Path, facts: dict[str, Any]) -> None:
    (folder / FILE).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """What a stage's folder says of its model's origin; None for π_SFT, for data, and for folders from before there was a lineage."""
    path = Path(folder) / FILE
    if not path.exists():
        return None
    facts = read_json(path, REBUILD)
    needed = {"kind", "round", "parent", *(("data", "corrects_for") if facts.get("kind") == "reward" else ("update", "reward"))}
    if lacking := needed - facts.keys():
        raise DamagedFile(path, f"lacks {min(lacking)}", REBUILD)
    return facts


def lineage(folder: str | Path) -> str:
    """The tree of models behind the last policy of a run's folder, or behind the model of one stage's folder, as text.

    Parents are looked for among the folder's neighbours; one that is not there is named and goes no further. Raises ValueError where
    there is nothing to start from.
    """
    folder = Path(folder).expanduser()
    stages = folder / "stages"
    if stages.is_dir():
        neighbours = {record["hash"]: path for path in sorted(stages.iterdir()) if (record := _record(path))}
        models = [path for path in neighbours.values() if (facts := read_lineage(path)) and facts["kind"] == "policy"]
        models = models or [path for path in neighbours.values() if read_lineage(path)]
        if not models:
            raise ValueError(f"{folder} has no model with a {FILE}; it was made by an earlier version, or not further than SFT.")
        record = read_record(models[-1])
    else:
        record = _record(folder)
        if record is None or not (folder / FILE).is_file():
            arms = sorted(path.parent.name for path in folder.glob("*/stages"))
            hint = f" It has several arms: name one of {', '.join(arms)} in it." if arms else ""
            raise ValueError(f"{folder} is neither a run's folder nor that of a model with a {FILE}.{hint}")
        neighbours = {found["hash"]: path for path in folder.absolute().parent.iterdir() if (found := _record(path))}

    def find(hash: str) -> dict[str, Any] | None:
        return read_lineage(neighbours[hash]) if hash in neighbours else None

    return "\n".join(_lines({"stage": record["name"], "hash": record["hash"]}, find, set())) + "\n"


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        return read_record(folder) if (folder / RECORD).is_file() else None
    except StageError:
        return None


def _lines(model: dict[str, str], find: Callable[[str], dict[str, Any] | None], seen: set[str]) -> list[str]:
    """One model and, indented, what it comes from; a model met before is not followed again."""
    head, facts = f"{model['stage']} {model['hash'][:8]}", find(model["hash"])
    if facts is None:
        return [head]
    if model["hash"] in seen:
        return [f"{head} (above)"]
    seen.add(model["hash"])
    lines = [f"{head}: {model_text(facts)}"]
    parents = _parents(facts)
    for n, (how, parent) in enumerate(parents):
        last = n == len(parents) - 1
        first, *rest = _lines(parent, find, seen)
        lines += [f"{'└─' if last else '├─'} {how} {first}", *(f"{'  ' if last else '│ '} {line}" for line in rest)]
    return lines


def _parents(facts: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    parents = [("reward", reward) for reward in facts.get("reward", ())] + [("from", facts["parent"])]
    return parents + ([("reference", facts["reference"])] if facts.get("reference") else [])


def model_text(facts: dict[str, Any]) -> str:
    """What a model is, in a line."""
    if facts["kind"] == "policy":
        return f"{facts['update']} of round {facts['round']}"
    data, policy = facts["data"], facts["corrects_for"]
    how = data["update"] or "all"
    weights = f"ESS {data['weights']['ess']:.4g} ({100 * data['weights']['ess_fraction']:.3g} %)"
    return f"fitted in round {facts['round']} on {data['pairs']:,} pairs ({how}), {weights}, for {policy['stage']} {policy['hash'][:8]}"
