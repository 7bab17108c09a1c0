"""Preference pairs, demonstrations and prompts from files and hub ids, in TRL's schemas.

    preference          {prompt, chosen, rejected} or, with the prompt inside both sides, {chosen, rejected}; optional `margin`
    prompt-completion   {prompt, completion} (or `response`), {prompt, chosen}, {messages}
    language modelling  {text}
    prompt-only         {prompt}, or any row above

each as text or as a conversation (lists of {role, content}), which needs a tokenizer with a chat template. Conversations may have tool
calls, any role that the template writes, contents in parts of type text, and beside them `tools` and `chat_template_kwargs`. An `id` field
is kept; other fields are ignored. Text is used exactly as stored: no strip, no separator. Unpaired preferences (KTO) and stepwise
supervision are no pairs: refused by name.

A row that cannot be used is dropped and named in the report (`on_bad_row="drop"`) or raises (`"error"`); a source without one usable
row always raises.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from jaxrlhf.config import DataConfig
from jaxrlhf.data.read_report import DataError, ReadReport
from jaxrlhf.data.schemas import BadRow, Reading, demonstration_fields, pair_fields, prompt_fields
from jaxrlhf.data.sources import Fault, Source, iter_rows
from jaxrlhf.files import write_lines

if TYPE_CHECKING:  # importing transformers takes seconds, and a plan needs none of it
    from transformers import PreTrainedTokenizerBase

OnBadRow = Literal["drop", "error"]


@dataclass(frozen=True)
class Pair:
    """One preference. `templated`: the text came out of a chat template and its control tokens are real."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    source: str
    margin: float | None = None
    templated: bool = False


@dataclass(frozen=True)
class Demonstration:
    """A prompt and a response to imitate."""

    id: str
    prompt: str
    response: str
    source: str
    templated: bool = False


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample from; `reference` is a human response, where the data has one (for win rates)."""

    id: str
    prompt: str
    source: str
    reference: str | None = None
    templated: bool = False


T = TypeVar("T", Pair, Demonstration, Prompt)


def read_pairs(source: Source | Sequence[Source], **options: Any) -> tuple[list[Pair], ReadReport]:
    """Preference pairs. See `read` for the options.

    A pair with an empty side or with two identical sides is a bad row. Without a `prompt` field, the prompt is the longest common prefix of
    the sides up to and including its last "\\n\\nAssistant:" (HH-RLHF): cutting each side at its own last marker gives the sides
    different prompts wherever a response contains the marker.
    """
    return read(source, pair_fields, lambda **f: Pair(**f), **options)


def read_demonstrations(source: Source | Sequence[Source], **options: Any) -> tuple[list[Demonstration], ReadReport]:
    """Rows to imitate: prompt-completion, conversations, the chosen side of preferences, or plain text (with an empty prompt)."""
    return read(source, demonstration_fields, lambda **f: Demonstration(**f), **options)


def read_prompts(source: Source | Sequence[Source], *, unique: bool = False, **options: Any) -> tuple[list[Prompt], ReadReport]:
    """Prompts to sample from, out of any schema that has one. `unique` keeps the first of equal prompts and counts the others."""
    prompts, report = read(source, prompt_fields, lambda **f: Prompt(**f), **options)
    if unique:
        first = {p.prompt: p for p in reversed(prompts)}
        kept = [p for p in prompts if first[p.prompt] is p]
        report.counts["repeated prompts left out"] = len(prompts) - len(kept)
        prompts, report.kept = kept, len(kept)
    return prompts, report


def read(
    source: Source | Sequence[Source],
    fields: Callable[[dict[str, Any], Reading], dict[str, Any]],
    make: Callable[..., T],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_bad_row: OnBadRow = "drop",
    implicit_prompt: Literal["assistant", "common_prefix"] = "assistant",
    rename: Mapping[str, str] | None = None,
    prompt_format: str = "{}",
    response_format: str = "{}",
    template_date: str = DataConfig.template_date,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
) -> tuple[list[T], ReadReport]:
    """The loop that every reader shares: rows in file order, with unique ids, and the account of what was dropped.

    tokenizer: renders conversations; text rows need none.
    implicit_prompt: how a text pair without `prompt` is cut: "assistant" as in `read_pairs`; "common_prefix" at the longest common
        prefix whatever it ends in (TRL's rule).
    rename: field names of the data → names above, {"answer": "completion"}.
    prompt_format, response_format: "\\n\\nHuman: {}\\n\\nAssistant:" frames bare instructions; for text rows with a prompt field.
    template_date: what a chat template that asks for the date is given.
    limit: stop after so many usable rows.
    Raises DataError for a bad row under on_bad_row="error", and when no row is usable.
    """
    if on_bad_row not in ("drop", "error"):
        raise DataError(f"on_bad_row is {on_bad_row!r}; it must be 'drop' or 'error'.")
    report, rows, taken = ReadReport(), [], {}
    reading = Reading(tokenizer, implicit_prompt, prompt_format, response_format, template_date, report.counts)
    for where, raw in iter_rows(source, split=split, subset=subset):
        if limit is not None and len(rows) >= limit:
            break
        try:
            if isinstance(raw, Fault):
                raise BadRow(raw.reason)
            raw = {rename.get(k, k): v for k, v in raw.items()} if rename else raw
            reading.source = where
            found = fields(raw, reading)
            name = _unique_id(_row_id(raw, found), taken, report)
        except BadRow as error:
            if on_bad_row == "error":
                raise DataError(f"{where}: {error}. Repair the row, or set on_bad_row to 'drop' to go on without it.") from error
            report.dropped.append((where, str(error)))
            continue
        rows.append(make(id=name, source=where, **found))
    if not rows:
        raise DataError(f"no usable row in {source}:\n{report.summary()}")
    report.kept = len(rows)
    return rows, report


def _row_id(row: dict[str, Any], found: dict[str, Any]) -> str:
    """The `id` field, else a hash of the texts (prompt, chosen, rejected; prompt, response; prompt)."""
    given = row.get("id")
    if isinstance(given, bool | list | dict | bytes) or given == "":
        raise BadRow(f"mistyped field: id must be text, a number or a time, not {given!r}")
    name = spelled_id(given)
    if name is None:
        return text_id(*(found[k] for k in ("prompt", "chosen", "rejected", "response") if k in found))
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("not valid Unicode: id contains a lone surrogate") from None
    return name


def spelled_id(given: Any) -> str | None:
    """An id as text: numbers as Python writes them, times in ISO 8601. None for null and NaN, which is null in a column of floats."""
    if given is None or given != given:
        return None
    return given.isoformat() if hasattr(given, "isoformat") else str(given)


def text_id(*texts: str) -> str:
    """The first 16 hex digits of the sha256 of the texts (as a JSON list: no two lists of texts share an encoding)."""
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode("utf-8")).hexdigest()[:16]


def _unique_id(name: str, taken: dict[str, int], report: ReadReport) -> str:
    """`name`, or `name-k` for its k-th duplicate (k from 1); skips names that are taken. One rule for given and for hashed ids."""
    if name not in taken:
        taken[name] = 0
        return name
    report.counts["duplicate ids renamed"] += 1
    while True:
        taken[name] += 1
        candidate = f"{name}-{taken[name]}"
        if candidate not in taken:
            taken[candidate] = 0
            return candidate


def split_by_prompt(rows: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """(train, valid) with no prompt on both sides; `valid` gets about `fraction` of the rows, at least one prompt if fraction > 0.

    Pairs sampled from one prompt share wording, so a split by row leaks (a validation accuracy that flatters). Which prompts go where
    depends on (prompt, seed) alone, not on the order of rows. Raises DataError where a side would be empty.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"the validation fraction is {fraction}; it must be in [0, 1).")
    if fraction == 0:
        return list(rows), []
    count: dict[str, int] = {}
    for row in rows:
        count[row.prompt] = count.get(row.prompt, 0) + 1
    if len(count) < 2:
        raise DataError(f"cannot split by prompt: of {len(rows)} rows the distinct prompts are {len(count)}; give a validation file.")
    order = sorted(count, key=lambda prompt: text_id(str(seed), prompt))
    held, target = set(), max(1, round(fraction * len(rows)))
    size = 0
    for prompt in order[:-1]:
        if size >= target:
            break
        held.add(prompt)
        size += count[prompt]
    return [r for r in rows if r.prompt not in held], [r for r in rows if r.prompt in held]


def dataset_hash(rows: Iterable[Pair | Demonstration | Prompt]) -> str:
    """Hash of what the rows say (ids and texts), whatever their order or the file they came from. Columns on disk name it."""
    digests = []
    for row in rows:
        texts = [row.id, row.prompt, row.templated]
        if isinstance(row, Pair):
            texts += [row.chosen, row.rejected]
        elif isinstance(row, Demonstration):
            texts.append(row.response)
        digests.append(hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode("utf-8")).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:32]


def write_pairs(path: str | os.PathLike[str], pairs: Iterable[Pair]) -> None:
    """Pairs as JSON lines that `read_pairs` reads back with the same ids; the file appears whole or not at all."""

    def line(pair: Pair) -> str:
        row = {"id": pair.id, "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        row |= {"margin": pair.margin} if pair.margin is not None else {}
        row |= {"templated": True} if pair.templated else {}
        return json.dumps(row, ensure_ascii=False) + "\n"

    write_lines(path, map(line, pairs))


__all__ = [
    "BadRow", "DataError", "Demonstration", "Pair", "Prompt", "ReadReport", "dataset_hash", "read_demonstrations", "read_pairs",
    "read_prompts", "split_by_prompt", "text_id", "write_pairs",
]  # fmt: skip
