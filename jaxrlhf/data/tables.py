"""Pairs and samples on disk: one Parquet file a table, text beside the very tokens, so that nothing is tokenised twice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.data.pairs import Pair
from jaxrlhf.data.report import DataError
from jaxrlhf.data.tokens import pad_left, pad_right
from jaxrlhf.types import PairBatch, TextBatch

COLUMN = "column/"  # before the name of a precomputed column of the pairs


def write_table(path: Path, columns: dict[str, Any], **metadata: int | str) -> None:
    """One Parquet file of equally long columns; it appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    table = table.replace_schema_metadata({str(k): str(v) for k, v in metadata.items()})
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    pq.write_table(table, partial)
    os.replace(partial, path)


def read_table(path: Path) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """(columns, metadata) of a file that `write_table` wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error}); delete its stage folder to make it again.") from error
    metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items() if not k.startswith(b"ARROW")}
    return table.to_pydict(), metadata


def unpadded(tokens_NT: np.ndarray, mask_NT: np.ndarray) -> list[list[int]]:
    """The tokens under the mask, row by row."""
    return [row[keep].tolist() for row, keep in zip(np.asarray(tokens_NT), np.asarray(mask_NT, bool), strict=True)]


def write_pair_table(path: Path, rows: list[Pair], tokens: PairBatch, *, pad_id: int) -> None:
    """Pairs with their tokens; `tokens` holds the rows in the same order."""
    columns: dict[str, Any] = {
        name: [getattr(row, name) for row in rows] for name in ("id", "prompt", "chosen", "rejected", "source", "templated")
    }
    columns["margin"] = [row.margin for row in rows]
    columns["prompt_tokens"] = unpadded(tokens.prompt_BL, tokens.prompt_mask_BL)  # type: ignore[arg-type]
    columns["chosen_tokens"] = unpadded(tokens.chosen_BT, tokens.chosen_mask_BT)  # type: ignore[arg-type]
    columns["rejected_tokens"] = unpadded(tokens.rejected_BT, tokens.rejected_mask_BT)  # type: ignore[arg-type]
    for name, values in tokens.columns.items():
        if name != "margin":  # which stands beside the text
            columns[f"{COLUMN}{name}"] = np.asarray(values).tolist()
    L, T = tokens.prompt_BL.shape[1], tokens.chosen_BT.shape[1]
    write_table(path, columns, prompt_width=L, response_width=T, pad_id=pad_id)


def read_pair_table(path: Path) -> tuple[list[Pair], PairBatch]:
    """What `write_pair_table` wrote: rows and tokens, padded as they were, weights 1, `index_B` 0..N−1, columns in float32."""
    columns, facts = read_table(path)
    names = ("id", "prompt", "chosen", "rejected", "source", "margin", "templated")
    rows = [Pair(**dict(zip(names, values, strict=True))) for values in zip(*(columns[name] for name in names), strict=True)]
    L, T, pad = (int(facts[name]) for name in ("prompt_width", "response_width", "pad_id"))
    n = len(rows)
    sides = (
        *pad_left(columns["prompt_tokens"], L, pad),
        *pad_right(columns["chosen_tokens"], T, pad),
        *pad_right(columns["rejected_tokens"], T, pad),
    )
    extra = {name.removeprefix(COLUMN): np.array(values, np.float32) for name, values in columns.items() if name.startswith(COLUMN)}
    if not all(m is None for m in columns["margin"]):
        extra["margin"] = np.array([m or 0.0 for m in columns["margin"]], np.float32)
    weights, row_mask, index = np.ones(n, np.float32), np.ones(n, bool), np.arange(n, dtype=np.int32)
    return rows, PairBatch(*sides, weights, row_mask, index, extra)  # type: ignore[arg-type]


def text_batch(
    prompt_tokens: list[list[int]], response_tokens: list[list[int]], *, prompt_width: int, response_width: int, pad_id: int
) -> TextBatch:
    """Stored tokens as one numpy table."""
    n = len(prompt_tokens)
    sides = (*pad_left(prompt_tokens, prompt_width, pad_id), *pad_right(response_tokens, response_width, pad_id))
    return TextBatch(*sides, np.ones(n, bool), np.arange(n, dtype=np.int32))  # type: ignore[arg-type]
