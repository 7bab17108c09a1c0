"""Responses that were written before: files and folders of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxrlhf.data.pairs import spelled_id, text_id
from jaxrlhf.data.read_report import DataError
from jaxrlhf.data.schemas import BARE, without_end
from jaxrlhf.data.sources import Fault, Source, iter_rows

_RESPONSES = ("response", "completion", "response_1")


class StoredResponse(NamedTuple):
    """A response that was written before, with what its row says beside it."""

    id: str
    prompt: str
    response: str
    reference: str | None
    templated: bool
    finished: bool | None
    source: str


def label(path: Path) -> str:
    """A name for tables: a stage with its run's, another folder or file by its own."""
    path = path.absolute()
    return f"{path.parent.parent.name}/{path.name}" if path.parent.name == "stages" else path.name


def read_generations(source: Source | Sequence[Source]) -> list[StoredResponse]:
    """Rows of files or folders of shards, in their order; an empty response is one too.

    The response is in `response`, `completion` or, as a run's evaluation stores it, `response_1`. Raises DataError for a row without texts,
    naming it, and where there is no row.
    """
    return list(_rows(source, Counter()))


def _rows(source: Source | Sequence[Source], counts: Counter[str]) -> Iterator[StoredResponse]:
    row = None
    for where, row in iter_rows(source):
        if isinstance(row, Fault):
            raise DataError(f"{where}: {row.reason}. Repair the row or write the responses again.")
        response = next((row[name] for name in _RESPONSES if row.get(name) is not None), None)
        name, prompt, reference, finished = (row.get(field) for field in ("id", "prompt", "reference", "finished"))
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise DataError(
                f"{where}: a stored response has the texts prompt and response, as `jaxrlhf generate` writes them; found {sorted(row)}."
            )
        if any("\ud800" <= c <= "\udfff" for c in prompt + response + str(reference)):
            raise DataError(f"{where}: a lone surrogate, which is no text. Repair the row or write the responses again.")
        bare = without_end(response)
        counts[BARE] += bare != response
        yield StoredResponse(
            spelled_id(name) or text_id(prompt),
            prompt,
            bare,
            without_end(reference) if isinstance(reference, str) else None,
            row.get("templated") is True,
            finished if isinstance(finished, bool) else None,
            where,
        )
    if row is None:
        raise DataError(f"there is no response in {source}; write some with `jaxrlhf generate POLICY --file PROMPTS --output FILE`.")


def read_stored(path: Path) -> tuple[tuple[StoredResponse, ...], tuple[str, ...]]:
    """(one row a prompt, what was left out or changed), of what `read_generations` reads: the first of several to a prompt counts."""
    rows, count, counts = {}, 0, Counter[str]()
    for row in _rows(path, counts):
        rows.setdefault(row.prompt, row)
        count += 1
    further = count - len(rows)
    notes = [f"{label(path)}: {further} further responses to the same prompts are left out (the first counts)."] if further else []
    notes += [f"{label(path)}: {BARE}: {counts[BARE]}."] if counts[BARE] else []
    return tuple(rows.values()), tuple(notes)
