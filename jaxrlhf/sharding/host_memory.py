"""Frozen models that wait in the host's memory."""

from typing import Any

import jax

from jaxrlhf.sharding.mesh import Devices, only_device, raw_mesh

HOST = "pinned_host"  # memory of the host that devices read without a detour


def check_offload(mesh: Devices) -> None:
    """Raise ValueError where a device cannot reach pinned memory of its host, which is where `offload` puts arrays."""
    (single, device), grid = only_device(mesh), raw_mesh(mesh)
    device = (device or jax.devices()[0]) if single or grid is None else grid.devices.flat[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if HOST not in kinds:
        raise ValueError(f"{device} has no {HOST} memory, only {', '.join(kinds)}: model.offload_frozen cannot work here; leave it out.")


def offload(tree: Any) -> Any:
    """The arrays in the host's pinned memory, laid out over the devices as before. What they were copied from goes when its owners do."""
    return jax.block_until_ready(jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(HOST)), tree))


def to_device(tree: Any) -> Any:
    """Offloaded arrays back in the memory of their devices; arrays that are there already are not copied."""

    def back(leaf: jax.Array) -> jax.Array:
        if leaf.sharding.memory_kind != HOST:
            return leaf
        kind = next(iter(leaf.sharding.device_set)).default_memory().kind
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))

    return jax.tree.map(back, tree)
