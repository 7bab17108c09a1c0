"""Where arrays live: the mesh, one table from parameter path to axes, and the functions that put trees there.

The engine is `jax.jit` over a mesh with three axes. `data` splits the batch and copies the parameters; `fsdp` splits both; `tensor`
splits the width of the layers. The maths never sees the mesh: XLA derives the communication from where the inputs live. `pmap` is a
thin wrapper for those who want one replica a device. Only this file imports `jax.sharding`.
"""

import functools
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# (pattern, axes), first match wins; patterns are searched in paths like "backbone/layers_0/attention/q/kernel", so the moments of an
# optimizer and the parts of {"policy": …, "critic": …} follow their parameter by its path's end. Kernels are [in, out].
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # Column-parallel: the output width is split, so attention heads and hidden units stay whole on a shard.
    (r"\b(q|k|v|up|gate|dense)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"\b(q|k|v|up|gate|dense)/bias$", PartitionSpec("tensor")),
    # Row-parallel: the input width is split; XLA adds the partial results.
    (r"\b(out|down)/kernel$", PartitionSpec("tensor", "fsdp")),
    # Vocabulary (or positions): tables are [V, D], the output head is [D, V] or [D, 1].
    (r"/embedding$", PartitionSpec("tensor", "fsdp")),
    (r"\bhead/kernel$", PartitionSpec("fsdp", "tensor")),
    # Norms, the remaining biases, counters: replicated.
    (r"(\bscale|\bbias|\bcount)$", PartitionSpec()),
)

_log = logging.getLogger(__name__)
Step = Callable[..., tuple[Any, Any]]  # (state, batch, *rest) → (state, metrics); `rest` (a key) is the same on every device


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
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def data_shards(mesh: Mesh) -> int:
    """How many parts a batch is cut into."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def path_of(path: tuple[Any, ...]) -> str:
    """A tree path as "backbone/layers_0/attention/q/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The axes of one leaf: the first rule that fits, less the axes that do not divide."""
    spec = next((axes for pattern, axes in RULES if re.search(pattern, path)), None)
    if spec is None or len(spec) > len(shape):
        if len(shape) > 1 and mesh.size > mesh.shape["data"]:
            _say_once(f"{path} {list(shape)}: no rule in the sharding table fits; it is replicated.")
        return PartitionSpec()
    kept = []
    for axis, size in zip(spec, shape, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            if size > 1:
                _say_once(
                    f"{path} {list(shape)}: {size} does not divide over {mesh.shape[axis]} {axis} shards; replicated along that axis."
                )
            axis = None
        kept.append(axis)
    return PartitionSpec(*kept)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a tree of parameters or optimizer state (arrays or ShapeDtypeStructs), by the table."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, _spec(path_of(path), np.shape(leaf), mesh)), tree)


def _only_device(mesh: Mesh | None) -> tuple[bool, Any]:
    """(True, device) where there is nothing to shard. None: the default device, whose arrays stay uncommitted and cost jit nothing."""
    if mesh is None:
        return True, None
    if mesh.size > 1:
        return False, None
    device = mesh.devices.flat[0]
    return True, None if device == jax.devices()[0] else device


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) or sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    # Several processes: every one holds the whole array and hands over its own part.
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Put parameters, optimizer state or a whole TrainState on the mesh by the table; numpy leaves are welcome.

    The arrays handed in stay valid unless a later step that donates its input is given the very same buffers (device_put does not copy
    what already lives in the right place).
    """
    single, device = _only_device(mesh)
    if single or mesh is None:
        return jax.device_put(tree, device)
    return jax.tree.map(_put, tree, shardings(tree, mesh))


def template(tree: Any, mesh: Mesh | None) -> Any:
    """ShapeDtypeStructs with shardings: what `checkpoint.restore` needs to put every leaf where it belongs, on any mesh."""
    single, device = _only_device(mesh)
    if single or mesh is None:
        where = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), _dtype(leaf), sharding=where), tree)
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(np.shape(leaf), _dtype(leaf), sharding=where), tree, shardings(tree, mesh))


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jax.numpy.asarray(leaf).dtype


def check_batch_size(batch_size: int, shards: int, *, name: str = "batch_size") -> None:
    """Raise ValueError unless `batch_size` divides over `shards`; the message names the nearest size that does."""
    if batch_size % shards:
        fits = max(batch_size // shards, 1) * shards
        raise ValueError(f"{name} {batch_size} does not divide over {shards} data shards; try {fits}.")


def rows_at_once(rows: int, batch_size: int, mesh: Mesh | None) -> int:
    """Batch size of a pass over `rows` rows without training: no larger than it need be, and one that divides over the mesh.

    Such passes fill their last batch anyway, so rounding up changes no result.
    """
    shards = 1 if mesh is None else data_shards(mesh)
    return -(-min(batch_size, max(rows, 1)) // shards) * shards


def place_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Put a batch on the mesh, its leading axis cut over `data` and `fsdp`. Every process passes the same global batch.

    Raises ValueError where the batch size does not divide over the data shards.
    """
    single, device = _only_device(mesh)
    if single or mesh is None:
        return jax.device_put(batch, device)
    for leaf in jax.tree.leaves(batch):
        if np.ndim(leaf):
            check_batch_size(np.shape(leaf)[0], data_shards(mesh))
    rows, whole = NamedSharding(mesh, PartitionSpec(BATCH_AXES)), NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: _put(leaf, rows if np.ndim(leaf) else whole), batch)


def keep_rows(mesh: Mesh | None) -> Callable[[Any], Any]:
    """A function for use inside jit that cuts the leading axis of every leaf over `data` and `fsdp`, as `place_batch` does outside.

    The compiler carries the layout of its inputs along, but not through a gather of rows that are known at run time only: a shuffled
    minibatch would be whole on every device. Rows that do not divide over the mesh are left to the compiler, and that is said.
    """
    if mesh is None or mesh.size == 1:
        return lambda tree: tree
    rows, shards = NamedSharding(mesh, PartitionSpec(BATCH_AXES)), data_shards(mesh)

    def keep(tree: Any) -> Any:
        count = np.shape(jax.tree.leaves(tree)[0])[0]
        if count % shards:
            _say_once(f"a minibatch of {count} rows does not divide over {shards} data shards; every device may compute all of it.")
            return tree
        return jax.lax.with_sharding_constraint(tree, rows)

    return keep


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Put a whole copy of every leaf on every device of the mesh."""
    single, device = _only_device(mesh)
    if single or mesh is None:
        return jax.device_put(tree, device)
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def jit_rows(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """`jax.jit` of (rows, *rest) → rows, every device on its own rows and nothing sent between them.

    For what treats each row by itself and the compiler does not cut: it would gather all rows on every device for a top-k. `rows` comes
    from `place_batch`, `rest` from `replicate`.
    """
    if mesh is None or mesh.size == 1:
        return jax.jit(function)
    rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()

    def run(first: Any, *rest: Any) -> Any:
        specs = (rows, *(whole for _ in rest))
        # Each device's rows are its own business: there is nothing for the check of replication to see.
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(first, *rest)

    return jax.jit(run)


def gather(tree: Any) -> Any:
    """The whole of every array on this host, as numpy: for export, metrics and tests."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)


def jit(step: Step, mesh: Mesh | None, *, donate: bool = True) -> Step:
    """`jax.jit` of a step whose new state lives where the old one lived: the compiler may not drift to another layout.

    `donate` gives the old state's memory to the new one; the old state is gone afterwards.
    """
    donated = (0,) if donate else ()
    if _only_device(mesh)[0] or mesh is None:
        return jax.jit(step, donate_argnums=donated)
    whole = NamedSharding(mesh, PartitionSpec())
    compiled: dict[Any, Step] = {}

    def run(state: Any, batch: Any, *rest: Any) -> tuple[Any, Any]:
        kind = jax.tree.structure(state)
        if kind not in compiled:
            compiled[kind] = jax.jit(step, donate_argnums=donated, out_shardings=(shardings(state, mesh), whole))
        return compiled[kind](state, batch, *rest)

    return run


def pmap(make_step: Callable[..., Step], *, devices: Sequence[Any] | None = None, donate: bool = True) -> Step:
    """One replica a device: builds the step with `axis_name="data"` and runs it under `jax.pmap`.

        step = pmap(lambda axis_name: make_pair_step(model, loss, optimizer, axis_name=axis_name))

    The result takes and returns what an ordinary step does: a state without a device axis, and a global batch [B, …] that it cuts over
    the devices. The state stays replicated on the devices between calls. Upstream `jax.pmap` is in maintenance mode and built on jit;
    `jit` over a mesh does the same and more. Raises ValueError where the batch does not divide over the devices.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    step = make_step(axis_name="data")

    @functools.cache
    def mapped(rest: int) -> Step:
        axes = (None, 0) + (None,) * rest
        return jax.pmap(step, "data", in_axes=axes, out_axes=(None, None), devices=devices, donate_argnums=(0,) if donate else ())

    def cut(leaf: Any) -> Any:
        check_batch_size(np.shape(leaf)[0], len(devices))
        return leaf.reshape(len(devices), -1, *leaf.shape[1:])

    def run(state: Any, batch: Any, *rest: Any) -> tuple[Any, Any]:
        return mapped(len(rest))(state, jax.tree.map(cut, batch), *rest)

    return run
