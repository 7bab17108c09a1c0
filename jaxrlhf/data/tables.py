"""Pairs and samples on disk: one Parquet file a table, text beside the very tokens, so that nothing is tokenised twice."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.data.pairs import Pair
from jaxrlhf.data.read_report import DataError
from jaxrlhf.data.tokens import Limits, margins, pair_batch
from jaxrlhf.files import replacing
from jaxrlhf.types import PairBatch

COLUMN = "column/"  # before the name of a precomputed column of the pairs


def write_table(path: Path, columns: dict[str, Any], **metadata: int | str) -> None:
    """One Parquet file of equally long columns; it appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    table = table.replace_schema_metadata({str(k): str(v) for k, v in metadata.items()})
    with replacing(path) as partial:
        pq.write_table(table, partial)


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
    """Pairs with their tokens; `tokens` holds the rows in the same order.

    Extra columns of the pairs ([N] or [N, D] numbers) are kept as float32, int32 or bool. Raises ValueError for what a step could not
    read: another length, text, numbers that are not finite or whole numbers beyond 32 bits.
    """
    if len(rows) != len(tokens.index_B):
        raise ValueError(
            f"{len(rows)} pairs, but the tokens of {len(tokens.index_B)}; `rows` and `tokens` are the same pairs, row for row."
        )
    extra = {name: _as_column(name, values, len(rows)) for name, values in tokens.columns.items()}
    given = [row.margin for row in rows]
    if "margin" in extra and any(margin is not None for margin in given) and np.array_equal(extra["margin"], margins(given)):
        del extra["margin"]  # it stands beside the text
    columns: dict[str, Any] = {
        name: [getattr(row, name) for row in rows] for name in ("id", "prompt", "chosen", "rejected", "source", "templated")
    }
    columns["margin"] = given
    columns["prompt_tokens"] = unpadded(tokens.prompt_BL, tokens.prompt_mask_BL)  # type: ignore[arg-type]
    columns["chosen_tokens"] = unpadded(tokens.chosen_BT, tokens.chosen_mask_BT)  # type: ignore[arg-type]
    columns["rejected_tokens"] = unpadded(tokens.rejected_BT, tokens.rejected_mask_BT)  # type: ignore[arg-type]
    columns |= {f"{COLUMN}{name}": values.tolist() for name, values in extra.items()}
    kinds = json.dumps({name: [values.dtype.name, list(values.shape[1:])] for name, values in extra.items()})
    L, T = tokens.prompt_BL.shape[1], tokens.chosen_BT.shape[1]
    write_table(path, columns, prompt_width=L, response_width=T, pad_id=pad_id, kinds=kinds)


def read_pair_table(path: Path) -> tuple[list[Pair], PairBatch]:
    """What `write_pair_table` wrote: rows and tokens, padded as they were, weights 1, `index_B` 0..N−1, extra columns as they were."""
    columns, facts = read_table(path)
    names = ("id", "prompt", "chosen", "rejected", "source", "margin", "templated")
    rows = [Pair(**dict(zip(names, values, strict=True))) for values in zip(*(columns[name] for name in names), strict=True)]
    L, T, pad = (int(facts[name]) for name in ("prompt_width", "response_width", "pad_id"))
    extra = {} if all(margin is None for margin in columns["margin"]) else {"margin": margins(columns["margin"])}
    for name, (dtype, shape) in json.loads(facts.get("kinds", "{}")).items():
        extra[name] = np.array(columns[f"{COLUMN}{name}"], dtype).reshape(len(rows), *shape)
    prompts, chosen, rejected = (columns[f"{side}_tokens"] for side in ("prompt", "chosen", "rejected"))
    return rows, pair_batch(prompts, chosen, rejected, Limits(L, T), pad, extra)


def _as_column(name: str, values: Any, n: int) -> np.ndarray:
    """The values as a device holds them: float32, int32 or bool, [n] or [n, D]."""
    array = np.asarray(values)
    if array.dtype.kind not in "biufV" or array.ndim not in (1, 2) or len(array) != n:  # bfloat16 is kind "V"
        raise ValueError(f"column {name!r} has shape {array.shape} and type {array.dtype} for {n} pairs; give numbers, [N] or [N, D].")
    if array.dtype.kind in "iu" and array.size and (array.min() < -(2**31) or array.max() >= 2**31):
        raise ValueError(f"column {name!r} has whole numbers beyond 32 bits, which a device would cut; give floats or smaller numbers.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is reported below
        kept = array.astype({"b": np.bool_, "i": np.int32, "u": np.int32}.get(array.dtype.kind, np.float32))
    bad = np.flatnonzero(~np.isfinite(kept.reshape(n, -1)).all(axis=1)) if n else []
    if len(bad):
        raise ValueError(f"column {name!r} is {array[bad[0]]} in row {bad[0]} ({len(bad)} rows in all); give finite numbers.")
    return kept
