"""Passes over rows: a table batch by batch, kept as it goes; and a batch a few rows at a time inside one program."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.data.batches import Table, batches_per_epoch, evaluation_batches
from jaxrlhf.storage.blocks import NOWHERE, Blocks, Results
from jaxrlhf.types import Progress


def over_batches(
    read: Callable[[Any], Any],
    table: Table,
    batch_size: int,
    *,
    mesh: Any = None,
    bucket: int = 0,
    ahead: bool = True,
    blocks: Blocks = NOWHERE,
    progress: Progress | None = None,
) -> Results:
    """`read(batch)`, a tuple of arrays [B, …], of all N ≥ 1 rows of a table, in order: numpy [N, …].

    `ahead`: a batch is handed to the device before the last one's results are waited for. `progress(done, total)` hears of batches, and
    `blocks` keeps what was computed: a pass that was stopped goes on there, to the same bits.
    """
    n = len(table.index_B)
    if n == 0:
        raise ValueError("there is nothing to read: the table has no rows.")
    size = sharding.rows_at_once(n, batch_size, mesh)
    kept = blocks.of(f"{n} by {size}", *(np.asarray(leaf) for leaf in jax.tree.leaves(table)))

    def compute(start: int) -> Iterator[Results]:
        results = (read(sharding.place_batch(batch, mesh)) for batch in evaluation_batches(table, size, bucket=bucket, start=start))
        return one_behind(results) if ahead else map(sharding.gather, results)

    return tuple(array[:n] for array in kept.collect(batches_per_epoch(table, size), compute, progress=progress))


def one_behind(results: Iterable[Any]) -> Iterator[Any]:
    """Each result on the host, after the next one was handed to the device."""
    waiting = None
    for result in results:
        if waiting is not None:
            yield sharding.gather(waiting)
        waiting = result
    if waiting is not None:
        yield sharding.gather(waiting)


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
