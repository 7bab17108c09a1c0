"""Make a mesh with the axes data, fsdp and tensor (or replicas for pmap), and check batch sizes against it.

`data` shards the batch and replicates the parameters; `fsdp` shards both; `tensor` shards the width of the layers.
"""

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

_log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
ROWS, WHOLE = PartitionSpec(BATCH_AXES), PartitionSpec()


@dataclass(frozen=True)
class Replicas:
    """A mesh with only its `data` axis, run by `jax.pmap`: every device holds a whole copy of the model."""

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


def raw_mesh(mesh: Devices) -> Mesh | None:
    """The mesh itself, for jit and for pmap."""
    return mesh.mesh if isinstance(mesh, Replicas) else mesh


def only_device(mesh: Devices) -> tuple[bool, Any]:
    """(True, device) where there is only one device. Device None: the default one, whose arrays stay uncommitted."""
    grid = raw_mesh(mesh)
    if grid is None:
        return True, None
    if grid.size > 1:
        return False, None
    device = grid.devices.flat[0]
    return True, None if device == jax.devices()[0] else device


def is_data_parallel(mesh: Devices) -> bool:
    """Whether every device holds all parameters and works on its own rows, so that XLA has nothing to shard."""
    grid = raw_mesh(mesh)
    return grid is not None and grid.size > 1 and grid.size == grid.shape["data"]


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` × `fsdp` × `tensor` devices (default: all of them); one axis may be −1: all remaining devices.

    Raises ValueError where the product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes: dict[str, int] = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {shown}: an axis is a positive number, or -1 for all remaining devices.")
    free: list[str] = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh {shown}: only one axis may be -1; give {free[1]} a number.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % fixed:
        raise ValueError(f"mesh {shown}: {len(devices)} devices do not divide by {fixed}; give axes whose product divides {len(devices)}.")
    if free:
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise ValueError(f"mesh {shown} needs {fixed} devices and there are {len(devices)}; make one axis -1, or pass `devices`.")
    return Mesh(_arranged(devices, tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(devices: list[Any], sizes: tuple[int, ...]) -> np.ndarray:
    """The devices in the shape of the mesh: in order, and on TPUs so that neighbours on an axis are neighbours in the torus."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    from jax.experimental import mesh_utils

    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def data_shards(mesh: Devices) -> int:
    """How many shards a batch has."""
    grid = raw_mesh(mesh)
    return 1 if grid is None else math.prod(grid.shape[name] for name in BATCH_AXES)


def axis_sizes(mesh: Devices) -> dict[str, int]:
    """How many devices each axis has."""
    grid = raw_mesh(mesh)
    return {name: 1 if grid is None else grid.shape[name] for name in AXES}


@functools.cache
def warn_once(message: str) -> None:
    _log.warning(message)


def check_batch_size(batch_size: int, shards: int, *, name: str = "batch_size", parts: int = 1) -> None:
    """Raise ValueError unless each of `parts` minibatches or microbatches divides over `shards`; the message names the nearest size."""
    if batch_size % (shards * parts):
        fits = max(batch_size // (shards * parts), 1) * shards * parts
        over = f"{shards} data shards" + (f" × {parts} minibatches or microbatches" if batch_size % shards == 0 else "")
        raise ValueError(f"{name} {batch_size} does not divide over {over}; try {fits}.")


def batch_specs(batch: Any, mesh: Mesh) -> Any:
    """ROWS for every leaf with rows, WHOLE for scalars. Raises ValueError where the rows do not divide over the mesh."""
    for leaf in jax.tree.leaves(batch):
        if np.ndim(leaf):
            check_batch_size(np.shape(leaf)[0], data_shards(mesh))
    return jax.tree.map(lambda leaf: ROWS if np.ndim(leaf) else WHOLE, batch)


def rows_at_once(rows: int, batch_size: int, mesh: Devices) -> int:
    """Batch size of a pass over `rows` rows without training: no larger than needed, and divisible over the mesh.

    Such passes pad their last batch anyway, so rounding up changes no result.
    """
    shards = data_shards(mesh)
    return -(-min(batch_size, max(rows, 1)) // shards) * shards


def mesh_of(config: Any) -> Devices:
    """The devices that a config's section `mesh` asks for: its axes, and `engine` "jit" or "pmap".

    Raises ValueError for axes that do not fit the devices, and for a pmap over more than `data` or more than one process.
    """
    mesh = make_mesh(config.data, config.fsdp, config.tensor)
    if config.engine == "jit":
        return mesh
    if config.engine != "pmap":
        raise ValueError(f"mesh.engine {config.engine!r} is unknown; use jit or pmap.")
    return Replicas(mesh)
