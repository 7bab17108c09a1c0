"""Write, read and repair metrics.jsonl, which has a line for each logged step."""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf.files import read_json_lines, write_lines
from jaxrlhf.formatting import as_strict_json

FILE = "metrics.jsonl"
RESERVED = ("stage", "round", "step")
_log = logging.getLogger(__name__)


def scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Device scalars as Python numbers, fetched together. Strings, bools and None stay. Raises ValueError for larger arrays."""
    out = {}
    for name, value in jax.device_get(dict(metrics)).items():
        if isinstance(value, np.ndarray | np.generic):
            if value.size != 1:
                raise ValueError(f"metric {name} has shape {list(value.shape)}; log a scalar, its mean for example.")
            value = value.item() if value.dtype.kind in "biu" else float(value.item())
        out[name] = value
    return out


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; what is no line of ours is left out with a warning. None where there is no file."""
    lines, others = read_json_lines(path, _is_ours)
    if others:
        _log.warning("%s: %d lines that are no metrics are left out.", path, others)
    return lines


def _is_ours(line: Mapping[str, Any]) -> bool:
    whole = isinstance(line.get("step"), int) and isinstance(line.get("round"), int | None)
    return whole and isinstance(line.get("stage"), str)


def repair(path: Path) -> None:
    """Take out a half-written last line, so that the next one starts on its own, and what is no line of ours."""
    lines = read(path)
    content = path.read_bytes() if path.exists() else b""
    if content.count(b"\n") != len(lines) or content[-1:] not in (b"\n", b""):
        write_lines(path, map(to_line, lines))


def put(path: Path, stage: str, round: int | None, lines: Collection[dict[str, Any]]) -> None:
    """Have `lines` as those of `stage` in `round`, at the end: the stages of a file stand in the order in which a run came to them."""
    known = read(path)
    wanted = [*(line for line in known if (line["stage"], line["round"]) != (stage, round)), *lines]
    if wanted != known:
        write_lines(path, map(to_line, wanted))


def keep_only(path: Path, stages: Collection[tuple[str, int | None]]) -> None:
    """Remove the lines of every (stage, round) that is not in `stages`."""
    lines = read(path)
    kept = [line for line in lines if (line["stage"], line["round"]) in stages]
    if len(kept) < len(lines):
        write_lines(path, map(to_line, kept))


def to_line(fields: Mapping[str, Any]) -> str:
    return json.dumps(as_strict_json(dict(fields)), ensure_ascii=False) + "\n"
