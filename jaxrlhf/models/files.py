"""Safetensors files, whole or sharded, read one tensor at a time and written so that nothing is ever half there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name → the file that holds it."""
    index, whole = folder / INDEX, folder / WHOLE
    if index.is_file():
        found = {name: folder / file for name, file in read_json(index)["weight_map"].items()}
        absent = sorted({file.name for file in found.values() if not file.is_file()})
        if absent:
            raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, which {INDEX} names; copy the folder again.")
        return found
    if whole.is_file():
        with safe_open(whole, framework="np") as file:
            return dict.fromkeys(file.keys(), whole)
    raise FileNotFoundError(f"{folder} holds neither {WHOLE} nor {INDEX}; weights are read from safetensors only, convert others first.")


class TensorReader:
    """Tensors by name as float32, whatever float they are stored in (bfloat16 included)."""

    def __init__(self, folder: Path):
        self.files = tensor_files(folder)
        self._open: dict[Path, Any] = {}

    def __call__(self, name: str) -> np.ndarray:
        path = self.files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="np")
        tensor = self._open[path].get_tensor(name)
        if tensor.dtype.name not in ("float32", "float16", "bfloat16", "float64"):
            raise ValueError(f"{name} in {path} is {tensor.dtype.name}; weights must be float16, bfloat16, float32 or float64.")
        return tensor.astype(np.float32)


def write_tensors(tensors: Iterable[tuple[str, np.ndarray]], folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """One file, or numbered shards of at most `max_shard_bytes` (a larger tensor has a shard to itself) and their index.

    Tensors are taken one by one and written when a shard is full, so a whole second copy of the model never stands in memory.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes {max_shard_bytes} must be positive.")
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}.partial"
        save_file(pending, path, metadata={"format": "pt"})
        shards.append((path, list(pending)))
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(held.nbytes for held in pending.values()) + tensor.nbytes > max_shard_bytes:
            flush()
        pending[name] = np.ascontiguousarray(tensor)
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        shards[0][0].rename(folder / WHOLE)
        return
    weight_map = {}
    for number, (path, names) in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / INDEX)


def write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def finished_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name at the end, replacing what was there; on an error nothing changes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    work.chmod(0o755)
    try:
        yield work
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            os.replace(folder, old)
            work.rename(folder)
            shutil.rmtree(old)
        else:
            work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
