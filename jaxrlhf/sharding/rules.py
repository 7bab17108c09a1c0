"""The sharding table, from a parameter's path to mesh axes, and the shardings and templates of whole trees by it."""

import functools
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrlhf.sharding.mesh import WHOLE, Devices, Replicas, only_device, warn_once

# (pattern, axes), first match wins; patterns are searched in paths like "backbone/layers_0/attention/q/kernel", so the moments of an
# optimizer and the entries of {"policy": …, "critic": …} match like the parameter itself. Kernels are [in, out].
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # Column-parallel: the output width is sharded, so attention heads and hidden units stay whole on a shard.
    (r"\b(q|k|v|up|gate|dense)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"\b(q|k|v|up|gate|dense)/bias$", PartitionSpec("tensor")),
    # Row-parallel: the input width is sharded; XLA sums the partial results.
    (r"\b(out|down)/kernel$", PartitionSpec("tensor", "fsdp")),
    # LoRA adapters: the axis they share with their kernel is sharded as there, the rank is whole.
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


def path_of(path: tuple[Any, ...]) -> str:
    """A tree path as "backbone/layers_0/attention/q/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.lru_cache(maxsize=4096)  # a parameter, its moments and its copies in other trees
def _sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where one leaf lives: the axes of the first rule that fits, less those that do not divide."""
    return NamedSharding(mesh, _spec(path, shape, mesh))


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    spec = next((axes for pattern, axes in RULES if re.search(pattern, path)), None)
    if spec is None or len(spec) > len(shape):
        if len(shape) > 1 and mesh.size > mesh.shape["data"]:
            warn_once(f"{path} {list(shape)}: no rule in the sharding table matches; it is replicated.")
        return PartitionSpec()
    kept = []
    for axis, size in zip(spec, shape, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            if size > 1:
                warn_once(
                    f"{path} {list(shape)}: {size} does not divide over {mesh.shape[axis]} {axis} shards; replicated along that axis."
                )
            axis = None
        kept.append(axis)
    return PartitionSpec(*kept)


def shardings(tree: Any, mesh: Mesh | Replicas) -> Any:
    """The sharding of every leaf of a tree of parameters or optimizer state (arrays or ShapeDtypeStructs), by the table.

    For `Replicas` it equals the sharding of `jax.pmap`'s results, so that a state returned by a step does not compile the step again.
    """
    if isinstance(mesh, Replicas):
        line = Mesh(mesh.mesh.devices.ravel(), ("data",), axis_types=(AxisType.Auto,))
        return jax.tree.map(lambda leaf: NamedSharding(line, WHOLE), tree)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _sharding(path_of(path), np.shape(leaf), mesh), tree)


def struct(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jax.numpy.asarray(leaf).dtype
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=where)


def template(tree: Any, mesh: Devices) -> Any:
    """ShapeDtypeStructs with shardings: where `Checkpoints.restore` puts every leaf, on any mesh."""
    single, device = only_device(mesh)
    if single or mesh is None:
        where = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
        return jax.tree.map(lambda leaf: struct(leaf, where), tree)
    return jax.tree.map(struct, tree, shardings(tree, mesh))
