"""The prompts that two candidates are compared on."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxrlhf.comparison.candidates import Candidate
from jaxrlhf.config import ToyTask
from jaxrlhf.data import toy
from jaxrlhf.data.pairs import Prompt, read_prompts
from jaxrlhf.data.read_report import DataError
from jaxrlhf.data.stored_responses import read_stored
from jaxrlhf.evaluation.samples import SAMPLES
from jaxrlhf.models.hub import tokenizer_named


@dataclass(frozen=True)
class Prompts:
    """The prompts of a comparison; `file` is where they can be read again as `reading` says with another tokenizer, for conversations."""

    rows: list[Prompt]
    file: str | None = None
    reading: dict[str, Any] = field(default_factory=dict)  # keywords of `read_prompts`


def prompts_of(
    sides: tuple[Candidate, Candidate],
    prompts: str | None,
    toy_prompts: int | None,
    limit: int | None,
    seed: int,
    tokenizer: str | None,
    **reading: Any,
) -> Prompts:
    """The prompts that both sides answer, each once."""
    if prompts is not None and toy_prompts is not None:
        raise ValueError("--prompts and --toy both say which prompts to use; give one.")
    stored = next((side for side in sides if side.kind == "stored"), None)
    file = None
    if toy_prompts is not None:
        rows = toy.prompts(ToyTask(), toy_prompts, seed, "evaluation")
    elif prompts is not None:
        rows, file = _read_asked(prompts, sides, tokenizer, reading)
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
    return Prompts(rows[:limit], file, reading)


def _read_asked(
    given: str, sides: tuple[Candidate, Candidate], tokenizer: str | None, reading: dict[str, Any]
) -> tuple[list[Prompt], str | None]:
    path = Path(given).expanduser()
    if path.is_dir() and (path / SAMPLES).is_file():
        path = path / SAMPLES
    if path.name == SAMPLES:
        return [Prompt(row.id, row.prompt, row.source, row.reference, row.templated) for row in read_stored(path)[0]], None
    source = tokenizer or next((str(side.folder) for side in sides if side.kind == "policy"), None)
    rows, report = read_prompts(given, unique=True, tokenizer=tokenizer_named(source), **reading)
    report.say()
    return rows, given


def prompts_identity(rows: list[Prompt]) -> str:
    """Of texts and order: a prompt's random numbers are those of its place."""
    return fingerprint([(row.id, row.prompt, row.reference, row.templated) for row in rows])


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]
