"""Shapes of batches, and how many bytes a tree of shapes takes on one device."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf import sharding
from jaxrlhf.plan.models import FIRST, depth, one_layer
from jaxrlhf.types import PairBatch, TextBatch

NUMBER = jax.ShapeDtypeStruct((), jnp.float32)
BIAS = jax.ShapeDtypeStruct((), jnp.float32, weak_type=True)  # a number of Python's


def bytes_on_device(tree: Any, mesh: Any) -> int:
    """What one device holds of a tree of shapes that lives where the sharding table says. Layers are alike: the first is measured."""
    leaves = jax.tree_util.tree_leaves_with_path(sharding.template(one_layer(tree), mesh))
    layers = depth(tree)
    sizes = ((path, _size(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)) for path, leaf in leaves)
    return sum(size * (layers if any(getattr(part, "key", "") == FIRST for part in path) else 1) for path, size in sizes)


def bytes_of_rows(tree: Any, mesh: Any) -> int:
    """What one device holds of arrays whose rows are cut over the devices."""
    return -(-sum(_size(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)) // sharding.data_shards(mesh))


def _size(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * (8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize)


def ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def bools(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


def floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def texts(rows: int, L: int, T: int) -> TextBatch:
    return TextBatch(ints(rows, L), bools(rows, L), ints(rows, T), bools(rows, T), bools(rows), ints(rows))


def pairs(rows: int, L: int, T: int, columns: tuple[str, ...]) -> PairBatch:
    sides = (ints(rows, T), bools(rows, T), ints(rows, T), bools(rows, T))
    made = {name: floats(rows) for name in columns}
    return PairBatch(ints(rows, L), bools(rows, L), *sides, floats(rows), bools(rows), ints(rows), made)
