"""The vectors of a file of pairs or responses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxrlhf.data.pairs import Demonstration, Pair, read_demonstrations, read_pairs
from jaxrlhf.models.hub import tokenizer_named
from jaxrlhf.offline.vectors import embed_cached

PAIR_FIELDS = ("prompt", "chosen", "rejected")
RESPONSE_FIELDS = ("prompt", "response")


def embed_file(
    source: str | Sequence[str],
    *,
    output: str | Path,
    fields: Sequence[str] = ("chosen", "rejected"),
    tokenizer: str | None = None,
    split: str = "train",
    limit: int | None = None,
    reading: Mapping[str, Any] = MappingProxyType({}),
    **embedding: Any,
) -> dict[str, Any]:
    """Embed the texts of some fields of every row into `output`, which keeps what it has: a second call embeds nothing.

    source: files, folders or hub ids of preference pairs; with `fields` ("response",) anything that has a prompt and a response, such as
    what `jaxrlhf generate` writes. `tokenizer` renders conversations. `reading`, `embedding`: keywords of the readers and of
    `embed_cached`. Rows that cannot be used are named on standard error.

    Returns {"folder", "backend", "encoder" (its key), "rows", "texts" (distinct), "embedded" (now), "dimension"}.
    """
    known = RESPONSE_FIELDS if "response" in fields else PAIR_FIELDS
    unknown = [name for name in fields if name not in known]
    if unknown or not fields:
        what = f"fields {', '.join(fields)}" if fields else "no field"
        raise ValueError(f"{what}: embed some of {', '.join(PAIR_FIELDS)} of pairs, or of {', '.join(RESPONSE_FIELDS)} of responses.")
    options: dict[str, Any] = {"split": split, "limit": limit, "tokenizer": tokenizer_named(tokenizer), **reading}
    rows: Sequence[Pair | Demonstration]
    rows, report = read_demonstrations(source, **options) if known is RESPONSE_FIELDS else read_pairs(source, **options)
    report.say()
    texts = [getattr(row, name) for row in rows for name in fields]
    found = embed_cached(texts, folder=output, **embedding)
    return {
        "folder": str(found.folder),
        "backend": found.identity.backend,
        "encoder": found.identity.key,
        "rows": len(rows),
        "texts": len(set(texts)),
        "embedded": found.embedded,
        "dimension": found.dimension,
    }
