"""Write, read and repair metrics.jsonl, which has a line for each logged step."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf.files import write_lines
from jaxrlhf.formatting import as_strict_json

FILE = "metrics.jsonl"
RESERVED = ("stage", "round", "step")


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
    """The lines of a metrics.jsonl without a half-written last one (the process was killed); none where there is no file."""
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error}); delete that line.") from error
    return lines


def repair(path: Path) -> None:
    """Cut off a half-written last line, so that the next one starts on its own."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)


def forget(path: Path, stage: str, round: int | None, *, after: int) -> None:
    """Remove the lines of `stage` in `round` after step `after`: a resumed run takes those steps again."""
    rewrite(path, lambda line: (line["stage"], line["round"]) != (stage, round) or line["step"] <= after)


def rewrite(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Remove the lines for which `keep` is false."""
    lines = read(path)
    kept = [line for line in lines if keep(line)]
    if len(kept) < len(lines):
        write_lines(path, map(to_line, kept))


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(to_line(line) for line in lines)


def to_line(fields: Mapping[str, Any]) -> str:
    return json.dumps(as_strict_json(dict(fields)), ensure_ascii=False) + "\n"
