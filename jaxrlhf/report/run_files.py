"""The files of a run folder, read as what they should be: what is not is left out and said in `missing`. Content never raises."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

TEXTS = ("id", "prompt", "reference", "response_1")
TOKENS = ("response_1_tokens", "prompt_tokens")
FIGURES = ("gold_1", "gold_2", "proxy", "proxy_start_1", "kl_sft")
FLAGS = ("ended_1",)
SAMPLE_COLUMNS = (*TEXTS, *TOKENS, *FIGURES, *FLAGS)


def number(value: Any) -> float | int | None:
    """A finite number, or None: NaN and ±inf (in a log the strings "NaN", "Infinity"), texts and truth values cannot be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an int no float holds
        return None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_json(path: Path, missing: list[str], without: str) -> dict[str, Any]:
    """A JSON object; {} where the file is not there, or is not one (said in `missing`)."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        missing.append(f"{path.name} cannot be read ({error}): {without}.")
        return {}
    if not isinstance(body, dict):
        missing.append(f"{path.name} is not a JSON object: {without}.")
        return {}
    return body


def read_record(path: Path, missing: list[str]) -> dict[str, Any]:
    """A stage.json whose fields are of their types; one that is not is left out and said."""
    where = f"stage.json of {path.parent.name}"
    record = read_json(path, missing, f"stage {path.parent.name} is left out; delete its folder and `jaxrlhf run` builds it again")
    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        "hash": (lambda x: isinstance(x, str), "a text"),
        "seconds": (lambda x: number(x) is not None, "a number"),
        "finished": (lambda x: isinstance(x, str), "a text"),
        "result": (lambda x: isinstance(x, dict), "an object"),
        "config": (lambda x: isinstance(x, dict), "an object"),
        "files": (
            lambda x: isinstance(x, dict) and all(isinstance(one, list) and len(one) == 2 for one in x.values()),
            "an object of sizes and checksums",
        ),
        "inputs": (lambda x: isinstance(x, dict) and all(isinstance(one, str) for one in x.values()), "an object of hashes"),
    }
    for name, (good, kind) in kinds.items():
        if record.get(name) is not None and not good(record[name]):
            missing.append(f"{where}: {name} is not {kind}, and is left out.")
            del record[name]
    return record


def read_log(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a line that is being written, or is broken, is left out. One of wrong types is said."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines, wrong = [], 0
    for line in text.splitlines():
        try:
            one = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step, round_ = (one.get("step"), one.get("round")) if isinstance(one, dict) else ("", "")
        if (
            isinstance(one, dict)
            and isinstance(one.get("stage"), str)
            and (step is None or _whole(step))
            and (round_ is None or _whole(round_))
        ):
            lines.append(one)
        else:
            wrong += 1
    if wrong:
        missing.append(f"metrics.jsonl: {wrong} line{'s' if wrong > 1 else ''} without a stage, round and step of ours left out.")
    return lines


def read_yaml(path: Path) -> tuple[dict[str, Any], str]:
    """(the mapping, the text); ({}, text) where it is another thing."""
    try:
        text = path.read_text(encoding="utf-8")
        body = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}, ""
    return (body, text) if isinstance(body, dict) else ({}, text)


def sample_columns(folder: Path, missing: list[str]) -> dict[str, list[Any]]:
    """The columns of a samples.parquet that a report reads; {} where the file is not there or broken."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def fits(name: str, kind: Any) -> bool:
        if pa.types.is_null(kind):
            return True
        if name in TOKENS:
            return pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if name in FIGURES:
            return pa.types.is_floating(kind) or pa.types.is_integer(kind)
        return pa.types.is_boolean(kind) if name in FLAGS else pa.types.is_string(kind) or pa.types.is_large_string(kind)

    path = folder / "samples.parquet"
    try:
        file = pq.ParquetFile(path)
        there = [name for name in SAMPLE_COLUMNS if name in file.schema_arrow.names]
        good = [name for name in there if fits(name, file.schema_arrow.field(name).type)]
        columns = file.read(columns=good).to_pydict()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, pa.ArrowException) as error:
        missing.append(f"samples.parquet of {folder.name} cannot be read ({error}): its samples are not shown.")
        return {}
    missing += [
        f"samples.parquet of {folder.name}: column {name} is of a wrong type, and is left out." for name in there if name not in good
    ]
    return columns


def read_scores(path: Path, missing: list[str]) -> np.ndarray | None:
    """Finite scores [2, M] of an .npy file; None where it is not there (folders from before they were kept) or not that."""
    try:
        with path.open("rb") as file:
            scores = np.load(file, allow_pickle=False)
        if isinstance(scores, np.ndarray) and scores.dtype.kind in "fiu" and scores.ndim == 2 and len(scores) == 2:
            if np.isfinite(scores).all():
                return scores if scores.shape[1] else None
            why = "not all of them are finite"
        else:
            why = "not numbers of shape [2, M]"
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy's reader, or that of the format it takes the file for, raises what it likes
        why = str(error) or type(error).__name__
    missing.append(f"{path.name} of {path.parent.name} cannot be used ({why}): no drift, and no comparable proxy, of that reward model.")
    return None
