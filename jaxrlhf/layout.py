"""The devices and the layout of arrays over them: the mesh, and one table from parameter path to axes.

`data` splits the batch and copies the parameters; `fsdp` splits both; `tensor` splits the width of the layers. `jaxrlhf.sharding` puts
arrays there and compiles what runs on them; what it offers of this file is imported from there.
"""

import functools
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
ROWS, WHOLE = PartitionSpec(BATCH_AXES), PartitionSpec()

# (pattern, axes), first match wins; patterns are searched in paths like "backbone/layers_0/attention/q/kernel", so the moments of an
# optimizer and the parts of {"policy": …, "critic": …} follow their parameter by its path's end. Kernels are [in, out].
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # Column-parallel: the output width is split, so attention heads and hidden units stay whole on a shard.
    (r"\b(q|k|v|up|gate|dense)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"\b(q|k|v|up|gate|dense)/bias$", PartitionSpec("tensor")),
    # Row-parallel: the input width is split; XLA adds the partial results.
    (r"\b(out|down)/kernel$", PartitionSpec("tensor", "fsdp")),
    # Adapters beside these kernels: cut as W is on the side that faces it, whole along the rank.
    (r"\b(q|k|v|up|gate)/lora_a$", PartitionSpec("fsdp")),
    (r"\b(q|k|v|up|gate)/lora_b$", PartitionSpec(None, "tensor")),
    (r"\b(out|down)/lora_a$", PartitionSpec("tensor")),
    (r"\b(out|down)/lora_b$", PartitionSpec(None, "fsdp")),
    # Vocabulary (or positions): tables are [V, D], the output head is [D, V] or [D, 1].
    (r"/embedding$", PartitionSpec("tensor", "fsdp")),
    (r"\bhead/kernel$", PartitionSpec("fsdp", "tensor")),
    # Norms, the remaining biases, counters: replicated.
    (r"(\bscale|\bbias|\bcount)$", PartitionSpec()),
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replicas:
    """The devices of a mesh that has only its `data` axis, run by `jax.pmap`: every device holds a whole copy of the model."""

    mesh: Mesh

    def __post_init__(self):
        if self.mesh.size != self.mesh.shape["data"]:
            raise ValueError(
                f"fsdp={self.mesh.shape['fsdp']}, tensor={self.mesh.shape['tensor']}: pmap copies the model to every device, so "
                "mesh.fsdp and mesh.tensor must be 1; set them, or mesh.engine jit."
            )
        if jax.process_count() > 1:
            raise ValueError(f"pmap runs in one process and there are {jax.process_count()}; set mesh.engine jit.")


Devices = Mesh | Replicas | None  # what the library passes around as `mesh`; None: the default device


def grid_of(mesh: Devices) -> Mesh | None:
    """The mesh itself, whichever engine runs on it."""
    return mesh.mesh if isinstance(mesh, Replicas) else mesh


def only_device(mesh: Devices) -> tuple[bool, Any]:
    """(True, device) where there is nothing to shard. None: the default device, whose arrays stay uncommitted and cost jit nothing."""
    grid = grid_of(mesh)
    if grid is None:
        return True, None
    if grid.size > 1:
        return False, None
    device = grid.devices.flat[0]
    return True, None if device == jax.devices()[0] else device


def by_hand(mesh: Devices) -> bool:
    """Whether every device holds all parameters and works on its own rows: then nothing is left to the compiler to cut."""
    grid = grid_of(mesh)
    return grid is not None and grid.size > 1 and grid.size == grid.shape["data"]


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` × `fsdp` × `tensor` devices (default: all of them); one axis may be −1, "all the rest".

    Raises ValueError where the product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes: dict[str, int] = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {shown}: an axis is a positive number, or -1 for all the rest.")
    free: list[str] = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh {shown}: only one axis may be -1; give {free[1]} a number.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % fixed:
        raise ValueError(f"mesh {shown}: {fixed} does not divide the {len(devices)} devices there are; give axes whose product does.")
    if free:
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise ValueError(f"mesh {shown} wants {fixed} devices and there are {len(devices)}; make one axis -1, or pass `devices`.")
    return Mesh(_arranged(devices, tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(devices: list[Any], sizes: tuple[int, ...]) -> np.ndarray:
    """The devices in the shape of the mesh: in their order, and on TPUs so that neighbours on an axis are neighbours on the torus."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    from jax.experimental import mesh_utils

    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def data_shards(mesh: Devices) -> int:
    """How many parts a batch is cut into."""
    grid = grid_of(mesh)
    return 1 if grid is None else math.prod(grid.shape[name] for name in BATCH_AXES)


def path_of(path: tuple[Any, ...]) -> str:
    """A tree path as "backbone/layers_0/attention/q/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.cache
def say_once(message: str) -> None:
    _log.warning(message)


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The axes of one leaf: the first rule that fits, less the axes that do not divide."""
    spec = next((axes for pattern, axes in RULES if re.search(pattern, path)), None)
    if spec is None or len(spec) > len(shape):
        if len(shape) > 1 and mesh.size > mesh.shape["data"]:
            say_once(f"{path} {list(shape)}: no rule in the sharding table fits; it is replicated.")
        return PartitionSpec()
    kept = []
    for axis, size in zip(spec, shape, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            if size > 1:
                say_once(f"{path} {list(shape)}: {size} does not divide over {mesh.shape[axis]} {axis} shards; replicated along that axis.")
            axis = None
        kept.append(axis)
    return PartitionSpec(*kept)


def shardings(tree: Any, mesh: Mesh | Replicas) -> Any:
    """The sharding of every leaf of a tree of parameters or optimizer state (arrays or ShapeDtypeStructs), by the table.

    Of `Replicas` it is spelled as `jax.pmap` spells that of its results: a state that comes from a step compiles nothing anew.
    """
    if isinstance(mesh, Replicas):
        line = Mesh(mesh.mesh.devices.ravel(), ("data",), axis_types=(AxisType.Auto,))
        return jax.tree.map(lambda leaf: NamedSharding(line, WHOLE), tree)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, _spec(path_of(path), np.shape(leaf), mesh)), tree)


def check_batch_size(batch_size: int, shards: int, *, name: str = "batch_size", parts: int = 1) -> None:
    """Raise ValueError unless each of `parts` minibatches or microbatches divides over `shards`; the message names the nearest size."""
    if batch_size % (shards * parts):
        fits = max(batch_size // (shards * parts), 1) * shards * parts
        over = f"{shards} data shards" + (f" × {parts} minibatches or microbatches" if batch_size % shards == 0 else "")
        raise ValueError(f"{name} {batch_size} does not divide over {over}; try {fits}.")


def rows_at_once(rows: int, batch_size: int, mesh: Devices) -> int:
    """Batch size of a pass over `rows` rows without training: no larger than it need be, and one that divides over the mesh.

    Such passes fill their last batch anyway, so rounding up changes no result.
    """
    shards = data_shards(mesh)
    return -(-min(batch_size, max(rows, 1)) // shards) * shards


def struct(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), _dtype(leaf), sharding=where)


def template(tree: Any, mesh: Devices) -> Any:
    """ShapeDtypeStructs with shardings: what `checkpoint.restore` needs to put every leaf where it belongs, on any mesh."""
    single, device = only_device(mesh)
    if single or mesh is None:
        where = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
        return jax.tree.map(lambda leaf: struct(leaf, where), tree)
    return jax.tree.map(struct, tree, shardings(tree, mesh))


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jax.numpy.asarray(leaf).dtype
