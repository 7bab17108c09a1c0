"""Exact gradient accumulation: gradients are added, never averaged, over microbatches and over devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.types import Array, Metrics, Params

ConstrainRows = Callable[[Any], Any]  # a tree of arrays → the same tree, its leading axis held to the devices it is dealt out to


def global_sum(tree, axis_name: str | None):
    """The sum over all devices of `axis_name`, or the tree itself under plain jit (where arrays are global)."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def global_rows(tree, axis_name: str | None):
    """All rows of a batch that is split over `axis_name`, in device order."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), tree)


def shards(axis_name: str | None) -> int:
    """How many devices the rows of a batch are split over by hand; 1 under plain jit."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def own_rows(index: Array, axis_name: str | None) -> Array:
    """This device's share of a row index over the whole batch."""
    if axis_name is None:
        return index
    size = index.shape[0] // shards(axis_name)
    return jax.lax.dynamic_slice_in_dim(index, jax.lax.axis_index(axis_name) * size, size)


def accumulate_gradients(
    loss_fn: Callable[[Params, Any], tuple[Array, Metrics]],
    params: Params,
    batch,
    *,
    steps: int = 1,
    axis_name: str | None = None,
    constrain_rows: ConstrainRows | None = None,
) -> tuple[Params, Array, Metrics]:
    """Gradient, loss and metrics of a batch, `steps` microbatches at a time.

    `loss_fn(params, microbatch)` returns a loss and metrics that are already divided by the total of the *whole* batch, so that sums over
    microbatches and devices are exact whatever the rows' lengths. Microbatch i takes rows i, i + steps, …: a batch that is sharded over
    devices stays sharded. `constrain_rows` (`sharding.constrain_rows(mesh)`) holds every microbatch to that where the compiler decides.
    Raises ValueError where the rows (of a device, given `axis_name`) do not divide by `steps`.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if steps == 1:
        (loss, metrics), grads = grad_fn(params, batch)
    else:
        rows = jax.tree.leaves(batch)[0].shape[0]
        if rows % steps:
            each = "" if axis_name is None else f" of each of {shards(axis_name)} devices"
            raise ValueError(f"{rows} rows{each} do not divide into {steps} microbatches; change the batch size or accumulate less.")
        micro = jax.tree.map(lambda x: x.reshape(x.shape[0] // steps, steps, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total, one):
            (loss, metrics), grads = grad_fn(params, one if constrain_rows is None else constrain_rows(one))
            return jax.tree.map(jnp.add, total, (loss, metrics, grads)), None

        shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], micro))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0][0], shapes[0][1], shapes[1]))
        (loss, metrics, grads), _ = jax.lax.scan(add, zeros, micro)
    return global_sum((grads, loss, metrics), axis_name)
