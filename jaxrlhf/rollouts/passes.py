"""Rows a few at a time inside one program: what a pass needs beside its parameters then grows with the part, not with the batch."""

from collections.abc import Callable
from typing import Any

import jax


def in_passes(read: Callable[[Any], Any], rows: Any, passes: int) -> Any:
    """`read(rows)` in so many passes, where each row of the result depends on its own row alone.

    Pass i takes rows i, i + passes, …: a batch that is sharded over devices stays sharded. Raises ValueError where the rows do not divide.
    """
    if passes == 1:
        return read(rows)
    count = jax.tree.leaves(rows)[0].shape[0]
    if count % passes:
        raise ValueError(f"{count} rows do not divide into {passes} passes; change the batch size or the number of passes.")
    parts = jax.tree.map(lambda x: x.reshape(count // passes, passes, *x.shape[1:]).swapaxes(0, 1), rows)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(count, *x.shape[2:]), jax.lax.map(read, parts))
