"""Safetensors files, whole or sharded: read slice by slice, written tensor by tensor, and never seen half finished."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
# After this many bytes of slices a file is mapped anew, so that its pages do not pile up.
RELEASE_BYTES = 2**28
# numpy's names and those of the format, the narrowest first.
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name → the file that holds it."""
    index, whole = folder / INDEX, folder / WHOLE
    if index.is_file():
        named = read_json(index)["weight_map"]
        if outside := [file for file in named.values() if not isinstance(file, str) or file != Path(file).name]:
            raise ValueError(f"{index} names {outside[0]!r}, which is no file of its own folder; copy the model again, or fetch another.")
        found = {name: folder / file for name, file in named.items()}
        absent = sorted({file.name for file in found.values() if not file.is_file()})
        if absent:
            raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, which {INDEX} names; copy the folder again.")
        return found
    if whole.is_file():
        with safe_open(whole, framework="np") as file:
            return dict.fromkeys(file.keys(), whole)
    raise FileNotFoundError(f"{folder} holds neither {WHOLE} nor {INDEX}; weights are read from safetensors only, convert others first.")


class TensorReader:
    """Slices of tensors by name as float32, whatever float they are stored in (bfloat16 included).

    Files are mapped, not read whole. The pages that slices have touched belong to the file, not to this process' own memory, and are
    let go of after RELEASE_BYTES.
    """

    def __init__(self, folder: Path):
        self.files = tensor_files(folder)
        self._path: Path | None = None
        self._file: Any = None
        self._touched = 0

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header. ValueError where it holds no floats."""
        stored = self._slice(name)
        dtype = stored.get_dtype()
        if dtype not in DTYPES.values():
            shown = dtype.replace("U", "uint").replace("I", "int") if dtype[1:].isdigit() else dtype
            raise ValueError(f"{name} in {self.files[name]} is {shown}; weights must be {', '.join(DTYPES)}.")
        return tuple(stored.get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """One slice of a tensor, in memory of its own."""
        part = self._slice(name)[index]
        self._touched += part.nbytes
        return part.astype(np.float32, copy=False)

    def _slice(self, name: str) -> Any:
        path = self.files[name]
        if path != self._path or self._touched >= RELEASE_BYTES:
            self.close()
            self._path, self._file = path, safe_open(path, framework="np")
        return self._file.get_slice(name)

    def close(self) -> None:
        """Unmap the file at hand; the next slice maps its own."""
        self._path, self._file, self._touched = None, None, 0


class Tensor(NamedTuple):
    """A tensor yet to be written: what the header says of it, and a function that makes it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shards_of(tensors: Iterable[Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[list[Tensor]]:
    """Which tensors a file holds, in the order in which they lie there: at most `max_shard_bytes`, or one larger tensor by itself."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes {max_shard_bytes} must be positive.")
    shards: list[list[Tensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.nbytes > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    # The order of the safetensors library: the widest dtype first, so that all stay aligned, then by name.
    order = list(DTYPES)
    return [sorted(shard, key=lambda tensor: (-order.index(tensor.dtype.name), tensor.name)) for shard in shards]


def write_shards(shards: list[list[Tensor]], folder: Path) -> None:
    """model.safetensors, or numbered files and their index. One tensor at a time is made, written and forgotten."""
    if len(shards) == 1:
        return _write_file(shards[0], folder / WHOLE)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(shard, folder / name)
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / INDEX)


def _write_file(tensors: list[Tensor], path: Path) -> None:
    """The safetensors format: the header's length in 8 bytes, the header as JSON filled up to a multiple of 8, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    end = 0
    for tensor in tensors:
        offsets = [end, end := end + tensor.nbytes]
        header[tensor.name] = {"dtype": DTYPES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            made = np.ascontiguousarray(tensor.make())
            if (made.shape, made.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(f"{tensor.name} is {made.dtype}{list(made.shape)}, not {tensor.dtype}{list(tensor.shape)} as announced.")
            file.write(made.reshape(-1).view(np.uint8).data)


def write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
