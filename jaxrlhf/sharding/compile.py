"""How a step is compiled: one pure step, under jit on one device, jit over a mesh, or pmap, as the devices it is given say.

- one device (None, or a mesh of one): plain `jax.jit`;
- a mesh of `data` alone: every device computes its own rows under `jax.shard_map`, and gradients are added up once an optimizer step;
- a mesh with `fsdp` or `tensor`: `jax.jit`, and XLA derives the communication from where the inputs live;
- `Replicas`: `jax.pmap`, for those who want it by name; upstream it is in maintenance mode and built on jit and shard_map.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrlhf.sharding.mesh import (
    BATCH_AXES,
    ROWS,
    WHOLE,
    Devices,
    Replicas,
    check_batch_size,
    data_shards,
    is_data_parallel,
    only_device,
    raw_mesh,
    warn_once,
)
from jaxrlhf.sharding.rules import shardings, struct, template


@functools.cache
def constrain_rows(mesh: Devices) -> Callable[..., Any] | None:
    """A function for use inside a step that cuts the leading axis of every leaf over `data` and `fsdp`, as `place_batch` does outside.

        keep(tree, heads=None)      heads: the axis that is cut over `tensor`, where it divides (keys and values of attention)
        keep(table_VD, table=True)  a table to look up rows in: whole in its width, cut over `tensor` along V where that divides

    Where parameters are cut too, the compiler may choose to cut activations by features and to gather them again in every layer; and it
    does not carry the layout of rows through a gather whose index is known at run time only, as in a shuffled minibatch. Rows that do not
    divide over the mesh are left to the compiler, and that is said. None where devices have their own rows anyway; equal meshes give the
    same function.
    """
    grid = raw_mesh(mesh)
    if grid is None or grid.size == 1 or is_data_parallel(mesh):
        return None
    shards, across = data_shards(grid), grid.shape["tensor"]

    def keep(tree: Any, *, heads: int | None = None, table: bool = False) -> Any:
        if table:
            spec = PartitionSpec("tensor" if tree.shape[0] % across == 0 else None)
            return jax.lax.with_sharding_constraint(tree, NamedSharding(grid, spec))
        count = np.shape(jax.tree.leaves(tree)[0])[0]
        if count % shards:
            warn_once(f"{count} rows at once do not divide over {shards} data shards; every device may compute all of them.")
            return tree

        def keep_one(leaf: jax.Array) -> jax.Array:
            cut = heads is not None and leaf.shape[heads] % across == 0
            spec = PartitionSpec(BATCH_AXES, *(["tensor" if axis == heads else None for axis in range(1, leaf.ndim)] if cut else ()))
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(grid, spec))

        return jax.tree.map(keep_one, tree)

    return keep


def row_constraints(mesh: Devices) -> dict[str, Any]:
    """What a model has to know of a mesh (`models.model.build_model`): `constrain`, and over how many devices the compiler cuts rows."""
    keep = constrain_rows(mesh)
    return {"constrain": keep, "row_shards": 1 if keep is None else data_shards(mesh)}


class Compiled(Protocol):
    """A function that compiles on its first call with new shapes."""

    def __call__(self, first: Any, batch: Any, /, *rest: Any) -> Any: ...

    def lower(self, first: Any, batch: Any, /, *rest: Any) -> Any:
        """What `jax.jit(…).lower` gives: `.compile()`, `.as_text()`. ShapeDtypeStructs of the global arrays will do."""
        ...


def step(make_step: Callable[..., Callable], mesh: Devices, *, donate: bool = True) -> Compiled:
    """Compile a training step for the devices of `mesh`.

        step(lambda axis_name: make_pair_step(model, loss, optimizer, axis_name=axis_name), mesh)

    `make_step(axis_name=…)` gives (state, batch, *rest) → (state, metrics); it gets an axis name where every device sees its own rows
    only and sums are over that axis. `state` comes from `place`, `batch` from `place_batch`; `rest` (a key, frozen parameters) has no
    rows. The new state lives where the old one lived: the compiler may not drift to another layout. `donate` gives the old state's
    memory to the new one; the old state is gone afterwards. Raises ValueError where the batch does not divide over the devices.
    """
    return _compiled(make_step, mesh, ("state", WHOLE), (0,) if donate else ())


def rows(function: Callable[..., Any], mesh: Devices, *, apart: bool = False) -> Compiled:
    """Compile a pass without training, (params, batch, *rest) → rows: sampling, scoring, log-probs, encoders.

    A row of the result depends on its own row of the batch, on `params` and on `rest`, so that no device waits for another where all
    have the whole model. Every leaf of the result has the rows of the batch. `apart`: each device on its own rows on every mesh, for what
    the compiler does not cut (it would gather all rows for a top-k); `params` and `rest` are then whole on every device (`replicate`).
    """
    return _compiled(lambda axis_name: function, mesh, ROWS, (), apart=apart)


def rows_and_metrics(make: Callable[..., Callable], mesh: Devices) -> Compiled:
    """As `rows`, for (params, batch, *rest) → (rows, metrics): `make(axis_name=…)` as in `step`, metrics are of the global batch."""
    return _compiled(make, mesh, (ROWS, WHOLE), ())


def _compiled(make: Callable[..., Callable], mesh: Devices, out: Any, donated: tuple[int, ...], *, apart: bool = False) -> Compiled:
    grid = raw_mesh(mesh)
    if only_device(mesh)[0] or grid is None:
        return jax.jit(make(axis_name=None), donate_argnums=donated)
    if isinstance(mesh, Replicas):
        return _Pmapped(make(axis_name="data"), grid, out, donated)
    if is_data_parallel(mesh) or apart:
        return _MeshJit(_per_device(make(axis_name="data"), grid, out), grid, out, donated)
    return _MeshJit(_global(make(axis_name=None), grid), grid, out, donated)


def _row_specs(batch: Any, grid: Mesh) -> Any:
    """ROWS for what has rows, WHOLE for scalars. Raises ValueError where the rows do not divide over the mesh."""
    for leaf in jax.tree.leaves(batch):
        if np.ndim(leaf):
            check_batch_size(np.shape(leaf)[0], data_shards(grid))
    return jax.tree.map(lambda leaf: ROWS if np.ndim(leaf) else WHOLE, batch)


def _per_device(function: Callable, grid: Mesh, out: Any) -> Callable:
    """The function on every device's own rows."""
    specs = jax.tree.map(lambda kind: WHOLE if kind == "state" else kind, out, is_leaf=_is_kind)

    @functools.wraps(function)  # messages about compilations name the function and its arguments
    def run(first: Any, batch: Any, *rest: Any) -> Any:
        into = (WHOLE, _row_specs(batch, grid), *(WHOLE for _ in rest))
        # Each device's rows are its own business, and sums are spelled out: there is nothing for the check of replication to see.
        return jax.shard_map(function, mesh=grid, in_specs=into, out_specs=specs, check_vma=False)(first, batch, *rest)

    return run


def _global(function: Callable, grid: Mesh) -> Callable:
    """The function as it is, once its batch has been looked at."""

    @functools.wraps(function)
    def run(first: Any, batch: Any, *rest: Any) -> Any:
        _row_specs(batch, grid)
        return function(first, batch, *rest)

    return run


def _is_kind(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec | str)


class _MeshJit:
    """`jax.jit` over a mesh, its outputs held where they belong."""

    def __init__(self, function: Callable, grid: Mesh, out: Any, donated: tuple[int, ...]):
        self._function, self._grid, self._out, self._donated = function, grid, out, donated
        self._jitted: dict[Any, Any] = {}

    def _for(self, first: Any) -> Any:
        of_state = "state" in jax.tree.leaves(self._out, is_leaf=_is_kind)
        kind = jax.tree.structure(first) if of_state else None
        if kind not in self._jitted:

            def place_of(spec: Any) -> Any:
                return shardings(first, self._grid) if spec == "state" else NamedSharding(self._grid, spec)

            where = jax.tree.map(place_of, self._out, is_leaf=_is_kind)
            self._jitted[kind] = jax.jit(self._function, donate_argnums=self._donated, out_shardings=where)
        return self._jitted[kind]

    def __call__(self, first: Any, batch: Any, /, *rest: Any) -> Any:
        return self._for(first)(first, batch, *rest)

    def lower(self, first: Any, batch: Any, /, *rest: Any) -> Any:
        of_rows = jax.tree.map(lambda spec: NamedSharding(self._grid, spec), _row_specs(batch, self._grid), is_leaf=_is_kind)
        placed = jax.tree.map(struct, batch, of_rows)
        return self._for(first).lower(template(first, self._grid), placed, *(template(more, self._grid) for more in rest))


class _Pmapped:
    """`jax.pmap`, its device axis hidden: arrays go in and come out with all their rows in one axis."""

    def __init__(self, function: Callable, grid: Mesh, out: Any, donated: tuple[int, ...]):
        self._function, self._grid, self._out, self._donated = function, grid, out, donated
        self._mapped: dict[Any, Any] = {}
        where = NamedSharding(grid, ROWS)
        self._cut = jax.jit(lambda leaves: [self._deal(leaf) for leaf in leaves], out_shardings=where)
        self._join = jax.jit(lambda tree: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree), out_shardings=where)

    def _deal(self, leaf: Any) -> Any:
        return leaf.reshape(self._grid.size, -1, *leaf.shape[1:])

    def _dealt(self, batch: Any) -> Any:
        """The batch with a device axis before its rows; scalars as they are."""
        leaves, kind = jax.tree.flatten(batch)
        cut = iter(self._cut([leaf for leaf in leaves if np.ndim(leaf)]))
        return jax.tree.unflatten(kind, [next(cut) if np.ndim(leaf) else leaf for leaf in leaves])

    def _for(self, batch: Any, rest: tuple) -> Any:
        specs, kind = jax.tree.flatten(_row_specs(batch, self._grid), is_leaf=_is_kind)
        key = (len(rest), kind, tuple(specs))
        if key not in self._mapped:
            axes = (None, jax.tree.unflatten(kind, [0 if spec == ROWS else None for spec in specs]), *(None for _ in rest))
            out = jax.tree.map(lambda spec: 0 if spec == ROWS else None, self._out, is_leaf=_is_kind)
            devices = self._grid.devices.ravel().tolist()
            self._mapped[key] = jax.pmap(self._function, "data", in_axes=axes, out_axes=out, devices=devices, donate_argnums=self._donated)
        return self._mapped[key]

    def __call__(self, first: Any, batch: Any, /, *rest: Any) -> Any:
        made = self._for(batch, rest)(first, self._dealt(batch), *rest)
        if self._out == ROWS:
            return self._join(made)
        return (self._join(made[0]), made[1]) if self._out[0] == ROWS else made

    def lower(self, first: Any, batch: Any, /, *rest: Any) -> Any:
        dealt = jax.tree.map(lambda leaf: jax.eval_shape(self._deal, leaf) if np.ndim(leaf) else leaf, batch)
        return self._for(batch, rest).lower(first, dealt, *rest)
