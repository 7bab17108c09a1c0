"""Put arrays on a mesh, and bring them back."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxrlhf.sharding.mesh import ROWS, WHOLE, Devices, check_batch_size, data_shards, only_device, raw_mesh
from jaxrlhf.sharding.rules import path_of, shardings


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    # Several processes: every one holds the whole array and hands over the part of its own devices.
    if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def place(tree: Any, mesh: Devices) -> Any:
    """Put parameters, optimizer state or a whole TrainState on the mesh by the table; numpy leaves are welcome.

    The arrays handed in stay valid unless a later step that donates its input is given the very same buffers (device_put does not copy
    what already lives in the right place).
    """
    single, device = only_device(mesh)
    if single or mesh is None:
        return jax.device_put(tree, device)
    return jax.tree.map(_put, tree, shardings(tree, mesh))


def uncommitted(tree: Any, mesh: Devices) -> Any:
    """A tree that was restored from a checkpoint as `place` would have put it; the arrays handed in are used up.

    On the default device `place` leaves arrays uncommitted, and what a checkpoint gives back is committed: jit makes another program of
    that, which the cache of compiled programs does not have. Leaf by leaf through the host, so that no second copy of the tree exists.
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
    """Put a batch on the mesh, its leading axis cut over `data` and `fsdp`. Every process passes the same global batch.

    Raises ValueError where the batch size does not divide over the data shards.
    """
    (single, device), grid = only_device(mesh), raw_mesh(mesh)
    if single or grid is None:
        return jax.device_put(batch, device)
    for leaf in jax.tree.leaves(batch):
        if np.ndim(leaf):
            check_batch_size(np.shape(leaf)[0], data_shards(grid))
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(grid, ROWS if np.ndim(leaf) else WHOLE)), batch)


def replicate(tree: Any, mesh: Devices) -> Any:
    """Put a whole copy of every leaf on every device of the mesh."""
    (single, device), grid = only_device(mesh), raw_mesh(mesh)
    if single or grid is None:
        return jax.device_put(tree, device)
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(grid, WHOLE)), tree)


def build(shapes: Any, mesh: Devices, read: Callable[[str, tuple[slice, ...]], np.ndarray]) -> Any:
    """Arrays placed by the table and filled from `read(path, index)`, one slice (with bounds) of one leaf of `shapes` at a time.

    A process asks for what its own devices hold, each slice once however many of them hold it, and no whole is ever put together.
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
    """A copy on each device, there when this returns, so that slices read later do not pile up before it."""
    return jax.block_until_ready([jax.device_put(part, device) for device in devices])


def init_on_mesh(make: Callable[..., Any], mesh: Devices, *args: Any) -> Any:
    """The parameters that `make(*args)` computes, each device computing its own part by the table; the same bits on any mesh."""
    single, device = only_device(mesh)
    if single or mesh is None:
        return jax.device_put(make(*args), device)
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, *args), mesh))(*replicate(args, mesh))


def gather(tree: Any) -> Any:
    """The whole of every array on this host, as numpy: for export, metrics and tests. Of several processes all must call it."""
    return jax.tree.map(_whole, tree)


def _whole(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return x
    if not x.is_fully_addressable and not x.is_fully_replicated:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    # An array keeps the copy on the host that was made of it; this one over the same memory goes, and its copy with it.
    return np.asarray(jax.make_array_from_single_device_arrays(x.shape, x.sharding, [shard.data for shard in x.addressable_shards]))
