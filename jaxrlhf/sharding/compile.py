"""Compile a step or a pass for the devices it runs on. The step is one pure function; the value passed as `mesh` decides:

- one device (None, or a mesh of one): plain `jax.jit`;
- a mesh with `data` alone: `jax.shard_map`, every device on its own rows, gradients summed once per optimizer step;
- a mesh with `fsdp` or `tensor`: `jax.jit`, and XLA derives the communication from the shardings of the inputs;
- `Replicas`: `jax.pmap`, which JAX keeps in maintenance mode and implements with jit and shard_map.
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
    batch_specs,
    data_shards,
    is_data_parallel,
    only_device,
    raw_mesh,
    warn_once,
)
from jaxrlhf.sharding.rules import shardings, struct, template


@functools.cache
def constrain_rows(mesh: Devices) -> Callable[..., Any] | None:
    """A sharding constraint for use inside a step: the leading axis of every leaf over `data` and `fsdp`, as `place_batch` does outside.

        constrain(tree, heads=None)      heads: the axis to shard over `tensor`, where it divides (keys and values of attention)
        constrain(table_VD, table=True)  an embedding table: whole along D, sharded over `tensor` along V where that divides

    With sharded parameters XLA may shard activations by features and gather them again in every layer. It also loses the sharding of rows
    in a gather with a dynamic index, as in a shuffled minibatch. Rows that do not divide over the mesh are left to XLA, with a warning.
    None where every device has its own rows anyway; equal meshes give the same function.
    """
    grid = raw_mesh(mesh)
    if grid is None or grid.size == 1 or is_data_parallel(mesh):
        return None
    shards, across = data_shards(grid), grid.shape["tensor"]

    def constrain(tree: Any, *, heads: int | None = None, table: bool = False) -> Any:
        if table:
            spec = PartitionSpec("tensor" if tree.shape[0] % across == 0 else None)
            return jax.lax.with_sharding_constraint(tree, NamedSharding(grid, spec))
        count = np.shape(jax.tree.leaves(tree)[0])[0]
        if count % shards:
            warn_once(f"{count} rows at once do not divide over {shards} data shards; every device may compute all of them.")
            return tree

        def constrain_leaf(leaf: jax.Array) -> jax.Array:
            cut = heads is not None and leaf.shape[heads] % across == 0
            spec = PartitionSpec(BATCH_AXES, *(["tensor" if axis == heads else None for axis in range(1, leaf.ndim)] if cut else ()))
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(grid, spec))

        return jax.tree.map(constrain_leaf, tree)

    return constrain


def row_constraints(mesh: Devices) -> dict[str, Any]:
    """What a model needs of a mesh (`models.model.build_model`): `constrain`, and over how many devices XLA shards the rows."""
    constrain = constrain_rows(mesh)
    return {"constrain": constrain, "row_shards": 1 if constrain is None else data_shards(mesh)}


class Compiled(Protocol):
    """A function that compiles on its first call with new shapes."""

    def __call__(self, first: Any, batch: Any, /, *rest: Any) -> Any: ...

    def lower(self, first: Any, batch: Any, /, *rest: Any) -> Any:
        """As `jax.jit(…).lower`: the result has `.compile()` and `.as_text()`. Takes arrays or ShapeDtypeStructs of global arrays."""
        ...


def step(make_step: Callable[..., Callable], mesh: Devices, *, donate: bool = True) -> Compiled:
    """Compile a training step for the devices of `mesh`.

        step(lambda axis_name: make_pair_step(model, loss, optimizer, axis_name=axis_name), mesh)

    `make_step(axis_name=…)` returns (state, batch, *rest) → (state, metrics). It gets an axis name where every device sees only its own
    rows and must sum over that axis. `state` comes from `place`, `batch` from `place_batch`; `rest` (a key, frozen parameters) has no
    rows. The new state has the sharding of the old one. `donate` reuses the old state's memory, so the old state cannot be read
    afterwards. Raises ValueError where the batch does not divide over the devices.
    """
    return _compiled(make_step, mesh, ("state", WHOLE), (0,) if donate else ())


def rows(function: Callable[..., Any], mesh: Devices, *, per_device: bool = False) -> Compiled:
    """Compile a pass without training, (params, batch, *rest) → rows: sampling, scoring, log-probs, encoders.

    A row of the result depends only on its own row of the batch, on `params` and on `rest`, so no device waits for another where all
    have the whole model. Every leaf of the result has the rows of the batch. `per_device`: shard_map on every mesh, for what XLA does not
    shard by rows (it would gather all rows for a top-k); `params` and `rest` must then be whole on every device (`replicate`).
    """
    return _compiled(lambda axis_name: function, mesh, ROWS, (), per_device=per_device)


def rows_and_metrics(make: Callable[..., Callable], mesh: Devices) -> Compiled:
    """As `rows`, for (params, batch, *rest) → (rows, metrics): `make(axis_name=…)` as in `step`; metrics are over the global batch."""
    return _compiled(make, mesh, (ROWS, WHOLE), ())


def _compiled(make: Callable[..., Callable], mesh: Devices, out: Any, donated: tuple[int, ...], *, per_device: bool = False) -> Compiled:
    grid = raw_mesh(mesh)
    if only_device(mesh)[0] or grid is None:
        return jax.jit(make(axis_name=None), donate_argnums=donated)
    if isinstance(mesh, Replicas):
        return _Pmapped(make(axis_name="data"), grid, out, donated)
    if is_data_parallel(mesh) or per_device:
        return _MeshJit(_per_device(make(axis_name="data"), grid, out), grid, out, donated)
    return _MeshJit(_checked(make(axis_name=None), grid), grid, out, donated)


def _per_device(function: Callable, grid: Mesh, out: Any) -> Callable:
    """The function under `jax.shard_map`, on each device's own rows."""
    specs = jax.tree.map(lambda kind: WHOLE if kind == "state" else kind, out)

    @functools.wraps(function)  # JAX's messages name the function and its arguments
    def run(first: Any, batch: Any, *rest: Any) -> Any:
        into = (WHOLE, batch_specs(batch, grid), *(WHOLE for _ in rest))
        # The step sums over the axis explicitly: nothing is left for the check of replicated values.
        return jax.shard_map(function, mesh=grid, in_specs=into, out_specs=specs, check_vma=False)(first, batch, *rest)

    return run


def _checked(function: Callable, grid: Mesh) -> Callable:
    """The function after a check that its batch divides over the mesh."""

    @functools.wraps(function)
    def run(first: Any, batch: Any, *rest: Any) -> Any:
        batch_specs(batch, grid)
        return function(first, batch, *rest)

    return run


class _MeshJit:
    """`jax.jit` over a mesh, with the shardings of its outputs fixed."""

    def __init__(self, function: Callable, grid: Mesh, out: Any, donated: tuple[int, ...]):
        self._function, self._grid, self._out, self._donated = function, grid, out, donated
        self._jitted: dict[Any, Any] = {}

    def _for(self, first: Any) -> Any:
        of_state = "state" in jax.tree.leaves(self._out)
        kind = jax.tree.structure(first) if of_state else None
        if kind not in self._jitted:

            def place_of(spec: Any) -> Any:
                return shardings(first, self._grid) if spec == "state" else NamedSharding(self._grid, spec)

            where = jax.tree.map(place_of, self._out)
            self._jitted[kind] = jax.jit(self._function, donate_argnums=self._donated, out_shardings=where)
        return self._jitted[kind]

    def __call__(self, first: Any, batch: Any, /, *rest: Any) -> Any:
        return self._for(first)(first, batch, *rest)

    def lower(self, first: Any, batch: Any, /, *rest: Any) -> Any:
        of_rows = jax.tree.map(lambda spec: NamedSharding(self._grid, spec), batch_specs(batch, self._grid))
        placed = jax.tree.map(struct, batch, of_rows)
        return self._for(first).lower(template(first, self._grid), placed, *(template(more, self._grid) for more in rest))


class _Pmapped:
    """`jax.pmap` without its device axis: arrays go in and come out with all rows in one axis."""

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
        specs, kind = jax.tree.flatten(batch_specs(batch, self._grid))
        key = (len(rest), kind, tuple(specs))
        if key not in self._mapped:
            axes = (None, jax.tree.unflatten(kind, [0 if spec == ROWS else None for spec in specs]), *(None for _ in rest))
            out = jax.tree.map(lambda spec: 0 if spec == ROWS else None, self._out)
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
