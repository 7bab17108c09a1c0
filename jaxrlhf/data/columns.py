"""Facts about pairs that are computed once and kept on disk (log-probs, similarities), joined to a table by pair id.

A folder of Parquet shards and `header.json`, which says what the numbers were computed from: data set, model and tokenizer hashes,
temperature, limits, and whatever else the writer adds. A header that differs from what the reader expects makes the column stale. Beside it
stand the checksums of the shards, which readers hold them to.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf import distributed
from jaxrlhf.files import faults, finished_folder, identities, listed_files, locked, read_sealed, sealed

FORMAT = 1
_ROWS_PER_SHARD = 100_000


class ColumnError(ValueError):
    """Columns that are missing, stale or unfit to be written."""


def column_header(
    *,
    dataset: str,
    model: str | None = None,
    tokenizer: str | None = None,
    temperature: float | None = None,
    limits: Any = None,
    **more: Any,
) -> dict[str, Any]:
    """The header every writer and reader of a column agrees on: hashes, temperature, limits (a dataclass or a dict), and named extras."""
    return _plain({"dataset": dataset, "model": model, "tokenizer": tokenizer, "temperature": temperature, "limits": limits} | more)


def write_columns(
    folder: str | Path, ids: Sequence[str], columns: Mapping[str, np.ndarray], header: Mapping[str, Any], *, overwrite: bool = False
) -> Path:
    """Write arrays of leading N = len(ids), of one or two axes; the folder appears whole, by rename, or not at all.

    Raises ColumnError for repeated ids, wrong lengths and values that are not finite, naming the pair; FileExistsError for an existing
    folder unless `overwrite`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; delete it or pass overwrite=True.")
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    _check_columns(ids, arrays)
    with finished_folder(folder) as partial:
        shards = []
        for number, start in enumerate(range(0, max(len(ids), 1), _ROWS_PER_SHARD)):
            window = slice(start, start + _ROWS_PER_SHARD)
            data = {"id": pa.array(list(ids[window]), pa.string())} | {name: _to_arrow(a[window]) for name, a in arrays.items()}
            shards.append(f"columns-{number:05d}.parquet")
            pq.write_table(pa.table(data), partial / shards[-1])
        kinds = {name: {"dtype": a.dtype.name, "shape": list(a.shape[1:])} for name, a in arrays.items()}
        body = {"format": FORMAT, "header": _plain(header), "rows": len(ids), "columns": kinds, "shards": shards}
        body = sealed(body | {"files": identities(partial, shards)})
        (partial / "header.json").write_text(json.dumps(body, indent=1, sort_keys=True), encoding="utf-8")
    return folder


def read_header(folder: str | Path) -> dict[str, Any]:
    """What a folder of columns says about itself: {"format", "header", "rows", "columns", "shards"}."""
    path = Path(folder) / "header.json"
    try:
        body = read_sealed(path)
        listed_files(body.get("files", {}))
    except FileNotFoundError as error:
        raise ColumnError(f"{folder} holds no columns ({error}); run the precompute stage that writes it.") from error
    except (OSError, ValueError) as error:
        raise ColumnError(f"{path} cannot be read ({error}). Compute the columns again (delete the folder).") from error
    if body.get("format") != FORMAT:
        raise ColumnError(f"{folder} has column format {body.get('format')!r}, this version reads {FORMAT}; compute the columns again.")
    return body


def cached_columns(
    folder: Path, ids: Sequence[str], names: Sequence[str], header: Mapping[str, Any], compute: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The named columns in `folder`, computed and written there first where they are missing; of several processes the leader does.

    Raises ColumnError as `join_columns`.
    """
    leads = distributed.is_leader()
    with locked(folder.parent / ".locks" / folder.name, f"{folder} is being computed") if leads else nullcontext():
        if not distributed.agree(leads and folder.exists(), f"columns {folder.name}"):
            columns = compute()
            with suppress(FileExistsError) if folder.exists() else nullcontext():  # where no lock holds, another process may be first
                if leads:
                    write_columns(folder, ids, columns, header)
    return distributed.agree_on_columns(join_columns(ids, folder, names, expect=header) if leads else None, f"columns of {folder.name}")


def fingerprint(header: Mapping[str, Any]) -> str:
    """A short name for what a folder of columns was computed from."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:20]


def join_columns(pair_ids: Sequence[str], folder: str | Path, names: Sequence[str], *, expect: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The named columns in the order of `pair_ids`; rows of the folder that are not asked for are ignored.

    Every field of `expect` must equal the folder's header. Raises ColumnError naming the field that differs, the column that is not there,
    or the pair id without a row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, body = Path(folder), read_header(folder)
    for field, wanted in _plain(expect).items():
        found = body["header"].get(field)
        if found != wanted:
            raise ColumnError(
                f"{folder} is stale: it was computed with {field} {found!r}, this run has {wanted!r}. Compute the columns again "
                "(delete the folder), or restore the input they were made from."
            )
    lacking = [name for name in names if name not in body["columns"]]
    if lacking:
        raise ColumnError(f"{folder} has no column {lacking[0]!r}; it holds {', '.join(sorted(body['columns']))}.")
    for fault in faults(folder, body.get("files", {})):
        raise ColumnError(f"{fault}. Compute the columns again (delete the folder).")
    try:
        table = pa.concat_tables([pq.read_table(folder / shard, columns=["id", *names]) for shard in body["shards"]])
    except (OSError, pa.ArrowException) as error:
        raise ColumnError(f"{folder} is damaged: {error}. Compute the columns again (delete the folder).") from error
    position = {name: i for i, name in enumerate(table["id"].to_pylist())}
    missing = [name for name in pair_ids if name not in position]
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ColumnError(
            f"pair id {missing[0]!r}{others} has no row in {folder}, which holds {len(position)}; columns are joined by id, none "
            "is guessed. Compute them for this data set."
        )
    rows = np.array([position[name] for name in pair_ids], np.int64)
    return {name: _from_arrow(table[name], body["columns"][name])[rows] for name in names}


def _check_columns(ids: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
    if len(set(ids)) != len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise ColumnError(f"pair id {twice!r} occurs twice; ids must be unique to be joined by (read_pairs makes them so).")
    for name, array in arrays.items():
        if name == "id" or array.ndim not in (1, 2) or array.shape[0] != len(ids) or array.dtype.kind not in "biuf":
            raise ColumnError(
                f"column {name!r} has shape {array.shape} and type {array.dtype} for {len(ids)} ids; it must be [N] or [N, D] numbers "
                "and not be called 'id'."
            )
        if array.dtype.kind == "f":
            bad = np.flatnonzero(~np.isfinite(array).all(axis=tuple(range(1, array.ndim))))
            if len(bad):
                raise ColumnError(
                    f"column {name!r} is {array[bad[0]]} for pair id {ids[bad[0]]!r} ({len(bad)} rows in all); it must be finite."
                )


def _to_arrow(array: np.ndarray) -> Any:
    import pyarrow as pa

    if array.ndim == 1:
        return pa.array(array)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(array).reshape(-1)), array.shape[1])


def _from_arrow(column: Any, kind: Mapping[str, Any]) -> np.ndarray:
    if kind["shape"]:
        column = column.combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False)
        return np.asarray(flat, kind["dtype"]).reshape(-1, *kind["shape"])
    return np.asarray(column.to_numpy(), kind["dtype"])


def _plain(value: Any) -> Any:
    """The value as JSON gives it back: dataclasses and mappings to dicts, tuples to lists, numpy scalars to Python's."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
