"""Raw rows, each with the place it came from, out of JSONL(.gz), JSON, Parquet, patterns, folders of shards and hub ids.

A row that cannot be read is yielded as a `Fault` in its place, so that the caller decides between dropping and stopping, and no row
disappears between two others. Local paths never touch the network.

A row means the same in every format, whatever rows stand beside it. A table has one set of keys for the objects of a column, in one order
and null where a row has none, and one type for its numbers; so a null inside of a column is an absent key, keys inside of a column are
sorted, and a whole number is an integer, in rows of JSON too.
"""

import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from jaxrlhf.data.read_report import DataError
from jaxrlhf.files import digests
from jaxrlhf.storage import copies, remote

T = TypeVar("T")
Source = str | Path
SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz", ".parquet")
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:\[([\w.]+)\])?")


@dataclass(frozen=True)
class Fault:
    """Why a row could not be read."""

    reason: str


Row = dict[str, Any]
Located = tuple[str, Row | Fault]  # ("file:line", row); lines and rows are numbered from 1
# The order in which OpenAI's API, and after it transformers' `get_json_schema`, writes tools and calls.
_TOOL_KEYS = ("id", "type", "function", "name", "description", "parameters", "properties", "required", "arguments")
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)  # what reading damaged gzip raises
_INT64 = 2.0**63  # what a table's integers end before


def iter_rows(source: Source | Sequence[Source], *, split: str = "train", subset: str | None = None) -> Iterator[Located]:
    """Rows of one source or of several in turn. `split` and `subset` matter to hub ids only, and `org/name[split]` names its own.

    Raises FileNotFoundError for a missing file and DataError for a source that is neither a file nor looks like a hub id.
    """
    for one in [source] if isinstance(source, str | Path) else source:
        files = source_files(one)
        for found in [_iter_hub(str(one), split, subset)] if files is None else map(_iter_file, files):
            for where, row in found:
                try:
                    yield where, row if isinstance(row, Fault) else {name: plain(value) for name, value in row.items()}
                except RecursionError:
                    yield where, Fault("nested too deeply")


def source_identity(source: Source) -> str:
    """What the rows of a source depend on: files by their bytes, in the order they are read; a hub id by what the hub holds now."""
    files = source_files(source)
    if files is None:
        return str(hub_rows(*_hub_id(str(source), "train"), None)._fingerprint)
    return hashlib.sha256(b"".join(digests(files))).hexdigest()[:20]


def plain(value: Any) -> Any:
    """`value` as every format can say it: none of its keys null, whole numbers as integers, and the keys in one order: that of the tool
    schemas and calls that models were trained on first, others sorted behind them."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {key: plain(value[key]) for key in sorted(value, key=_place) if value[key] is not None}
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < _INT64 else value


def _place(key: str) -> tuple[int, str]:
    return (_TOOL_KEYS.index(key) if key in _TOOL_KEYS else len(_TOOL_KEYS)), key


def source_files(source: Source) -> list[Path] | None:
    """The files one source stands for: itself, a folder's shards, or a pattern's matches by name; None where it can only be a hub id."""
    if remote.is_url(source):
        return _remote_files(str(source))
    path = remote.as_path(source).expanduser()
    if path.is_dir():
        return _shards(path)
    if path.exists():
        return [path]
    if set("*?[") & set(path.name) and path.name.lower().endswith(SUFFIXES):
        found = sorted(Path(name) for name in glob.glob(str(path)))
        if not found:
            raise FileNotFoundError(f"{source}: no file matches this pattern.")
        return found
    return None


def _iter_file(path: Path) -> Iterator[Located]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _iter_parquet(path)
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path} is not a data file known here; the name must end in one of {', '.join(SUFFIXES)}.")
    return _iter_array(path) if ".json" in name and ".jsonl" not in name and _first_byte(path) == b"[" else _iter_lines(path)


def _remote_files(url: str) -> list[Path]:
    """The copies on this machine of the files at a URL, which may be a pattern or a folder."""
    there = remote.expand(url)
    if there != [url]:
        chosen = [one for one in there if one.lower().endswith(SUFFIXES) and not one.rsplit("/", 1)[1].startswith(".")]
        if not there or (not chosen and set("*?[") & set(url)):
            raise FileNotFoundError(f"{url}: no file there, or none that matches.")
        there = chosen if set("*?[") & set(url) else _one_set(chosen, url)
    return [copies.cached(one) for one in there]


def _shards(folder: Path) -> list[Path]:
    """The data files of a folder, if they are the shards of one set (train-00000-of-00002.parquet, …); an error if they mix sets."""
    files = sorted(p for p in folder.iterdir() if p.name.lower().endswith(SUFFIXES) and not p.name.startswith("."))
    return _one_set(files, folder)


def _one_set(files: list[T], folder: Source) -> list[T]:
    """The files, if they are the shards of one set."""
    names = [str(one).rsplit("/", 1)[-1] for one in files]
    sets = {re.sub(r"[-_]?\d+(-of-\d+)?$", "", name.split(".")[0]) for name in names}
    if len(sets) != 1:
        listed = ", ".join(names[:8]) or "no data file"
        raise DataError(f"{folder} is a folder and not the shards of one set; it holds {listed}. Name the file to read.")
    return files


def _open(path: Path) -> Any:
    """Binary reader; gzip is recognised by its magic bytes, not by the name."""
    with path.open("rb") as file:
        magic = file.read(2)
    return gzip.open(path, "rb") if magic == b"\x1f\x8b" else path.open("rb")


def _first_byte(path: Path) -> bytes:
    """Of the content; nothing where it cannot be read, which whoever reads the lines will say."""
    with _open(path) as file, suppress(*_BROKEN):
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    return b""


def _decode(raw: bytes) -> Row | Fault:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Fault(f"not UTF-8: byte {raw[error.start]:#04x} at position {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Fault(f"not JSON: {error}")
    return row if isinstance(row, dict) else Fault(f"not a JSON object: a {type(row).__name__}")


def _iter_lines(path: Path) -> Iterator[Located]:
    number = 0
    with _open(path) as file:
        while True:
            number += 1
            try:
                raw = file.readline()
            except _BROKEN as error:
                yield f"{path}:{number}", Fault(f"damaged gzip: the stream breaks here and whatever followed is lost ({error})")
                return
            if not raw:
                return
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if raw.strip():  # a blank line is no row
                yield f"{path}:{number}", _decode(raw)


def _iter_array(path: Path) -> Iterator[Located]:
    try:
        with _open(path) as file:
            rows = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError, *_BROKEN) as error:
        raise DataError(
            f"{path} starts as a JSON array but cannot be read: {error}. JSON lines survive one bad row; an array does not."
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", row if isinstance(row, dict) else Fault(f"not a JSON object: a {type(row).__name__}")


def _iter_parquet(path: Path) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024, columns=_text_columns(file.schema_arrow)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable Parquet file (after row {number}): {error}. Write or download it again.") from error


def _iter_hub(name: str, split: str, subset: str | None) -> Iterator[Located]:
    name, split = _hub_id(name, split)
    for number, row in enumerate(hub_rows(name, split, subset), start=1):
        yield f"{name}[{split}]:{number}", dict(row) if isinstance(row, dict) else Fault(f"not an object: a {type(row).__name__}")


def _hub_id(name: str, split: str) -> tuple[str, str]:
    """(org/name, split) of a hub id; FileNotFoundError or DataError for what can be none."""
    if name.lower().endswith(SUFFIXES):
        raise FileNotFoundError(f"{name}: no such file.")
    match = _HUB_ID.fullmatch(name)
    if not match:
        raise DataError(f"{name!r} is neither an existing file or folder nor a hub id of the form org/name or org/name[split].")
    return match[1], match[2] or split


@cache
def hub_rows(name: str, split: str, subset: str | None) -> Any:
    """The text columns of a hub data set, loaded once a process: what a run reads late is what it was named by at its start."""
    import datasets

    try:
        rows: Any = datasets.load_dataset(name, subset, split=split)
        return rows.select_columns(_text_columns(rows.features.arrow_schema))
    except Exception as error:  # the library raises a dozen kinds; all of them mean that there are no rows
        raise DataError(
            f"{name!r} is no existing path, and as a hub id (subset {subset!r}, split {split!r}) it could not be loaded: "
            f"{type(error).__name__}: {error}. Check the spelling, or download it and give the file."
        ) from error


def _text_columns(schema: Any) -> list[str]:
    """Columns worth reading: token ids that were computed beforehand can be a hundred times the text, and no schema uses them."""
    import pyarrow as pa

    def is_ids(kind: Any) -> bool:
        return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)

    return [field.name for field in schema if not is_ids(field.type)]
