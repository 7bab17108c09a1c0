"""Keep frozen models in the host's memory and bring them to the devices when they are needed."""

from typing import Any

import jax

from jaxrlhf.sharding.mesh import Devices, only_device, raw_mesh

HOST = "pinned_host"  # the kind of host memory that devices read directly


def check_offload(mesh: Devices) -> None:
    """Raise ValueError where the devices cannot read pinned host memory, which is where `offload` puts arrays."""
    (single, device), grid = only_device(mesh), raw_mesh(mesh)
    device = (device or jax.devices()[0]) if single or grid is None else grid.devices.flat[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if HOST not in kinds:
        raise ValueError(f"{device} has no {HOST} memory, only {', '.join(kinds)}: model.offload_frozen cannot work here; leave it out.")


def offload(tree: Any) -> Any:
    """Copies in pinned host memory with the same sharding. The arrays passed in stay until nothing refers to them."""
    return jax.block_until_ready(jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(HOST)), tree))


def to_device(tree: Any) -> Any:
    """Offloaded arrays back in device memory; arrays that are there already are not copied."""

    def back(leaf: jax.Array) -> jax.Array:
        if leaf.sharding.memory_kind != HOST:
            return leaf
        kind = next(iter(leaf.sharding.device_set)).default_memory().kind
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))

    return jax.tree.map(back, tree)
