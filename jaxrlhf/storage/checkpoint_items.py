"""A training state as the flat tables that a checkpoint holds, and whether those of a checkpoint fit."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.sharding import path_of
from jaxrlhf.types import TrainState


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says why and what to do."""


def items_of(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "opt_state": state.opt_state, "state": {"step": state.step, "controller": state.controller}}


def flat(tree: Any) -> dict[str, Any]:
    """Path → array. A Python or numpy scalar becomes a 0-d array: orbax does not return scalars exactly."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    table = {path_of(path): leaf if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else np.asarray(leaf) for path, leaf in leaves}
    if len(table) != len(leaves):
        raise ValueError("two leaves of the state have the same path; do not use '/' in the names of parameters.")
    return table


def unflat(tree: Any, table: dict[str, Any]) -> Any:
    """The leaves of `table` in the structure of `tree`, Python scalars with the type they have in `tree`."""

    def leaf(path: tuple[Any, ...], like: Any) -> Any:
        value = table[path_of(path)]
        return type(like)(value.item()) if isinstance(like, bool | int | float) else value

    return jax.tree_util.tree_map_with_path(leaf, tree)


def struct(leaf: Any) -> Any:
    """What orbax needs to restore a leaf; host arrays stay host arrays (64-bit ones would lose bits on a device)."""
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf


def stored_in(described: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Path → (shape, dtype) of an item on disk; empty where the checkpoint lacks the item."""
    return {} if described is None else {name: (tuple(entry.shape), np.dtype(entry.dtype)) for name, entry in dict(described.tree).items()}


def compare(path: Path, template: dict[str, Any], stored: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Raise CheckpointError at the first difference: orbax would cast or pad without a message."""
    way_out = "the config changed since this checkpoint; restore with the old config, or start in another folder."
    for what, names in (("lacks", template.keys() - stored.keys()), ("also holds", stored.keys() - template.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(f"checkpoint {path} {what} {shown}: {way_out}")
    for name, leaf in template.items():
        shape, dtype = stored[name]
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        if shape != tuple(leaf.shape) or dtype != np.dtype(leaf.dtype):
            have, want = f"{list(shape)} {dtype}", f"{list(leaf.shape)} {np.dtype(leaf.dtype)}"
            raise CheckpointError(f"checkpoint {path} holds {name} as {have}, and the config needs {want}: {way_out}")
