"""Tensors of a folder → the parameter tree, each device's part read from the files straight to where it belongs."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from jaxrlhf import sharding
from jaxrlhf.models.hub.safetensors import TensorReader
from jaxrlhf.models.hub.tensor_names import Entry, Index, leaf
from jaxrlhf.types import Params


def read_params(reader: TensorReader, entries: Sequence[Entry], stored: dict[str, str], wanted: Params, mesh: Any) -> Params:
    """The leaves of `entries` as float32 arrays on `mesh`, by the sharding table.

    `stored` maps an entry's name to its tensor's name in the files; `wanted` is a tree with the shapes of (at least) those leaves. A
    process reads the slices that its own devices hold, each once; beside the arrays one slice at a time stands in memory.

    ValueError, before anything is read, for a tensor of another shape, or one that holds no floats; and for NaN and infinity.
    """
    check_shapes(reader, entries, stored, wanted)
    parts = [(path, entry, part) for entry in entries for part, path in enumerate(entry.paths)]
    shapes: dict[Any, Any] = {path: leaf(wanted, path) for path, _, _ in parts}
    holders = {"/".join(path): (entry, part) for path, entry, part in parts}

    def read(path: str, index: Index) -> np.ndarray:
        entry, part = holders[path]
        return entry.read(lambda piece: reader.read(stored[entry.name], piece), part, index)

    try:
        return sharding.build(unflatten_dict(shapes), mesh, read)
    finally:
        reader.close()


def check_shapes(reader: TensorReader, entries: Sequence[Entry], stored: dict[str, str], wanted: Params) -> None:
    """ValueError for a tensor of another shape than its leaves have in `wanted`, or one that holds no floats."""
    for entry in entries:
        name = stored[entry.name]
        found, fits = reader.shape(name), entry.shape([leaf(wanted, path).shape for path in entry.paths])
        if found != fits:
            raise ValueError(
                f"{entry.name} in {reader.files[name].parent} has shape {list(found)}, "
                f"which does not fit the shape that config.json gives, {list(fits)}."
            )


def check_names(folder: Path, model: str, *, missing: Collection[str], unknown: Collection[str]) -> None:
    """ValueError where the files lack tensors of the `model` or hold others; at most eight of each are named."""
    found = (("missing:", sorted(missing)), ("unknown:", sorted(unknown)))
    parts = [f"{label} {', '.join(n if n.isprintable() else ascii(n) for n in names[:8])}" for label, names in found if names]
    if parts:
        raise ValueError(f"the tensors in {folder} are not those of the {model} its config.json describes; {'; '.join(parts)}.")
