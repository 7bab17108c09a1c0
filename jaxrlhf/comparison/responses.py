"""The prompts of a comparison, and what each side says to them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf import rng
from jaxrlhf.comparison.candidates import REFERENCE, Candidate
from jaxrlhf.comparison.figures import Texts
from jaxrlhf.comparison.prompts import Prompts, fingerprint, prompts_identity
from jaxrlhf.config import DataConfig, EvaluationConfig
from jaxrlhf.data.pairs import Prompt, read_prompts
from jaxrlhf.data.read_report import DataError
from jaxrlhf.data.tokens import Limits
from jaxrlhf.files import read_json, write_whole
from jaxrlhf.models.hub.identity import folder_identity
from jaxrlhf.rollouts.dataset import Sampling
from jaxrlhf.rollouts.texts import answers, policy_named, tokens_of

NEW_TOKENS = 128  # where no stage says how long its responses may be


@dataclass(frozen=True)
class GenerationSettings:
    """How policies write, the same for both sides: same row, same random numbers. `max_new_tokens` includes EOS. `template_date` is
    gold's too."""

    max_new_tokens: int
    max_prompt_length: int = 512
    temperature: float = EvaluationConfig.temperature
    batch_size: int = EvaluationConfig.batch_size
    seed: int = 0
    dtype: str | None = None
    template_date: str = DataConfig.template_date

    def identity(self) -> dict[str, Any]:
        """What the texts depend on: all but how many are written at a time."""
        return {name: value for name, value in vars(self).items() if name != "batch_size"}


def new_tokens_of(sides: tuple[Candidate, Candidate], given: int | None) -> tuple[int, list[str]]:
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


def candidate_identity(side: Candidate) -> str:
    """The content of a side, wherever it lies."""
    if side.kind == "policy":
        return folder_identity(str(side.folder))
    return REFERENCE if side.kind == "reference" else fingerprint([(row.prompt, row.response) for row in side.rows])


Responses = dict[int, tuple[str, bool | None]]  # number of the prompt -> (response, did it end by itself)


def responses_of(
    side: Candidate, name: str, asked: Prompts, writing: GenerationSettings, folder: Path, show: Callable[[str], Any]
) -> Responses:
    """The side's response to every prompt it has one for."""
    if side.kind == "reference":
        return {i: (row.reference, None) for i, row in enumerate(asked.rows) if row.reference is not None}
    if side.kind == "stored":
        rows = {row.prompt: row for row in side.rows}
        return {i: (rows[p.prompt].response, rows[p.prompt].finished) for i, p in enumerate(asked.rows) if p.prompt in rows}
    return kept_responses(side, name, asked, writing, folder, show)


def kept_responses(
    side: Candidate, name: str, asked: Prompts, writing: GenerationSettings, folder: Path, show: Callable[[str], Any]
) -> Responses:
    """What a policy writes; kept in `folder`, so that a judge who was interrupted goes on about the same responses."""
    facts = {"policy": candidate_identity(side), "prompts": prompts_identity(asked.rows), **writing.identity()}
    path = folder / f"responses-{name}.json"
    if path.is_file():
        kept = read_json(path, "delete it, and the policy writes its responses again")
        if kept.get("written") == facts:
            return {row["number"]: (row["response"], row["finished"]) for row in kept["responses"]}
    responses = generate_responses(side, asked, writing, show)
    rows = [{"number": i, "prompt": asked.rows[i].prompt, "response": text, "finished": ended} for i, (text, ended) in responses.items()]
    write_whole(path, json.dumps({"written": facts, "responses": rows}, ensure_ascii=False, indent=0) + "\n", errors="surrogatepass")
    return responses


def generate_responses(side: Candidate, asked: Prompts, writing: GenerationSettings, show: Callable[[str], Any]) -> Responses:
    """Responses sampled from a policy. Prompts over its limit are named on standard error and have none."""
    loaded = policy_named(str(side.folder or ""), dtype=writing.dtype)
    rows = _rendered(asked, loaded.tokenizer)
    table, kept = tokens_of(loaded, rows, Limits(writing.max_prompt_length, writing.max_new_tokens), name=f"{side.name}: ")
    # A prompt has its own random numbers, by its place among all: the other side has the same, whatever either leaves out.
    table = replace(table, index_B=np.array(kept, np.int32))
    sampling = Sampling.of(loaded, max_new_tokens=writing.max_new_tokens, temperature=writing.temperature)
    key = rng.stream(rng.root_key(writing.seed), "evaluation")
    with show(f"responses of {side.name}") as progress:
        told = answers(loaded, table, key, sampling, batch_size=writing.batch_size, progress=progress)
    return dict(zip(kept, told, strict=True))


def _rendered(asked: Prompts, tokenizer: Any) -> list[Prompt]:
    """The prompts as this policy reads them: conversations through its own chat template, text as it is."""
    if asked.file is None or not any(row.templated for row in asked.rows):
        return asked.rows
    own = {row.source: row for row in read_prompts(asked.file, tokenizer=tokenizer, **asked.reading)[0]}
    return [own.get(row.source, row) for row in asked.rows]


def matched(rows: list[Prompt], sides: list[Responses]) -> tuple[Texts, list[list[bool | None]], list[str]]:
    """(texts, who ended by itself, what was left out): the prompts that both sides have a response to, in order."""
    kept = [i for i in range(len(rows)) if all(i in side for side in sides)]
    if not kept:
        raise DataError(
            f"there is no prompt that both sides answer: of {len(rows)}, A has responses to {len(sides[0])} and B to {len(sides[1])}. "
            "Prompts are matched by their whole text."
        )
    a, b = ([side[i] for i in kept] for side in sides)
    asked = [rows[i] for i in kept]
    texts = Texts([r.id for r in asked], [r.prompt for r in asked], [x for x, _ in a], [y for y, _ in b], [r.reference for r in asked])
    lacking = [f"{len(rows) - len(side)} without one of {name}" for side, name in zip(sides, "AB", strict=True) if len(side) < len(rows)]
    notes = [f"{len(rows) - len(kept)} of {len(rows)} prompts are left out: {', '.join(lacking)}."] if lacking else []
    return texts, [[ended for _, ended in side] for side in (a, b)], notes
