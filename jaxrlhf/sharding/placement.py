"""Put arrays on a mesh, and bring them back."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxrlhf.sharding.mesh import WHOLE, Devices, batch_specs, only_device, raw_mesh
from jaxrlhf.sharding.rules import path_of, shardings


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    # Several processes: each holds the whole array and passes the slices of its own devices.
    if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def place(tree: Any, mesh: Devices) -> Any:
    """Put parameters, optimizer state or a whole TrainState on the mesh by the sharding table; leaves may be numpy arrays.

    `jax.device_put` does not copy what is in the right place already: a step that donates its input may then delete the arrays passed here.
    """
    single, device = only_device(mesh)
    if single or mesh is None:
        return jax.device_put(tree, device)
    return jax.tree.map(_put, tree, shardings(tree, mesh))


def uncommitted(tree: Any, mesh: Devices) -> Any:
    """A restored checkpoint as `place` would have put it; the arrays passed in are deleted.

    On the default device `place` leaves arrays uncommitted, and a checkpoint returns committed ones: jit compiles another program for
    those, which the compilation cache does not have. Leaf by leaf through the host, so that no second copy of the tree exists.
    """
    single, device = only_device(mesh)
    if not single or device is not None:
        return tree

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        host = np.array(leaf)
        leaf.delete()
        return jax.device_put(host)

    return jax.tree.map(moved, tree)


def place_batch(batch: Any, mesh: Devices) -> Any:
    """Put a batch on the mesh, its leading axis sharded over `data` and `fsdp`. Every process passes the same global batch.

    Raises ValueError where the batch size does not divide over the data shards.
    """
    (single, device), grid = only_device(mesh), raw_mesh(mesh)
    if single or grid is None:
        return jax.device_put(batch, device)
    return jax.tree.map(lambda leaf, spec: _put(leaf, NamedSharding(grid, spec)), batch, batch_specs(batch, grid))


def replicate(tree: Any, mesh: Devices) -> Any:
    """Put a whole copy of every leaf on every device of the mesh."""
    (single, device), grid = only_device(mesh), raw_mesh(mesh)
    if single or grid is None:
        return jax.device_put(tree, device)
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(grid, WHOLE)), tree)


def build(shapes: Any, mesh: Devices, read: Callable[[str, tuple[slice, ...]], np.ndarray]) -> Any:
    """Arrays placed by the sharding table and filled from `read(path, index)`, one slice of one leaf of `shapes` at a time.

    A process reads what its own devices hold, each slice once even if several devices hold it; no whole array is ever built.
    """
    single, device = only_device(mesh)
    if single or mesh is None:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _sent(read(path_of(path), tuple(slice(0, size) for size in leaf.shape)), [device])[0], shapes
        )

    def fill(path: tuple[Any, ...], leaf: Any, where: NamedSharding) -> jax.Array:
        holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
        for device, index in where.addressable_devices_indices_map(leaf.shape).items():
            bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index or (), leaf.shape, strict=True))
            holders.setdefault(bounds, []).append(device)
        parts = [
            part
            for bounds, devices in holders.items()
            for part in _sent(read(path_of(path), tuple(slice(*pair) for pair in bounds)), devices)
        ]
        return jax.make_array_from_single_device_arrays(leaf.shape, where, parts)

    return jax.tree_util.tree_map_with_path(fill, shapes, shardings(shapes, mesh))


def _sent(part: np.ndarray, devices: list[Any]) -> list[jax.Array]:
    """A copy on each device. Waits for the transfer, so that later slices do not pile up in host memory."""
    return jax.block_until_ready([jax.device_put(part, device) for device in devices])


def init_on_mesh(make: Callable[..., Any], mesh: Devices, *args: Any) -> Any:
    """The parameters that `make(*args)` computes, each device its own shard by the sharding table; the same bits on any mesh."""
    single, device = only_device(mesh)
    if single or mesh is None:
        return jax.device_put(make(*args), device)
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, *args), mesh))(*replicate(args, mesh))


def gather(tree: Any) -> Any:
    """Every array whole on this host, as numpy: for export, metrics and tests. With several processes all must call it."""
    return jax.tree.map(_whole, tree)


def _whole(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return x
    if not x.is_fully_addressable and not x.is_fully_replicated:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    # A jax.Array caches its copy on the host. A new array over the same buffers is freed together with that copy.
    return np.asarray(jax.make_array_from_single_device_arrays(x.shape, x.sharding, [shard.data for shard in x.addressable_shards]))
