"""Seeded epochs over a table (a pytree of numpy arrays with leading N) → batches with leading B, on the host.

An epoch is a partition: one global permutation, cut into batches; sharding comes after. Loops that fit a model to the rows end their epochs
with a batch that is not full (`batches`); loops that ask a policy to answer them never do (`endless_batches`). Nothing but the number of
batches already seen is needed to resume.
"""

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import jax
import numpy as np

from jaxrlhf.types import PairBatch, PromptBatch, TextBatch

Table = TypeVar("Table", PairBatch, PromptBatch, TextBatch)

# Which token fields share a width: prompts are padded on the left, responses on the right.
_LEFT = {"prompt_BL": "prompt_mask_BL"}
_RIGHT = {"chosen_BT": "chosen_mask_BT", "rejected_BT": "rejected_mask_BT", "response_BT": "response_mask_BT"}


def batches(
    table: Table,
    batch_size: int,
    *,
    seed: int,
    name: str = "batches",
    shuffle: bool = True,
    bucket: int = 0,
    start: int = 0,
    epochs: int | None = None,
) -> Iterator[Table]:
    """Batches of exactly `batch_size` rows, epoch after epoch (for ever, or `epochs` times).

    The order of an epoch depends on (seed, name, epoch) alone; loops that share a seed but not a `name` share no order.
    The last batch of an epoch is filled with rows whose `row_mask_B` is False.
    start: number of batches to skip; the rest are bit for bit those that an uninterrupted run would have seen.
    bucket: if > 0, padding common to a batch is cut off, down to a multiple of `bucket` (few shapes, few compilations).
    """
    n = _check(table, batch_size, start)
    per_epoch = batches_per_epoch(table, batch_size)
    first, offset = divmod(start, per_epoch)
    for epoch in itertools.count(first) if epochs is None else range(first, epochs):
        order = permutation(seed, epoch, n, name) if shuffle else np.arange(n)
        for b in range(offset, per_epoch):
            yield _batch(table, order[b * batch_size : (b + 1) * batch_size], batch_size, bucket)
        offset = 0


def endless_batches(table: Table, batch_size: int, *, seed: int, name: str, bucket: int = 0, start: int = 0) -> Iterator[Table]:
    """Batches without filler, for ever: where an epoch ends inside a batch, the next one's permutation goes on.

    For loops that ask and do not fit: each row is answered anew, and a batch may hold a row of a short table several times. A row's number
    is its place in the table plus n an epoch, so that its answers differ. `name`, `start` and `bucket` are as in `batches`.
    """
    n = _check(table, batch_size, start)
    for first in itertools.count(start * batch_size, batch_size):
        epochs = range(first // n, (first + batch_size - 1) // n + 1)
        numbers = np.concatenate([permutation(seed, epoch, n, name) + n * epoch for epoch in epochs])
        numbers = numbers[first % n : first % n + batch_size]
        batch = _batch(table, numbers % n, batch_size, bucket)
        yield replace(batch, index_B=numbers.astype(np.int32))


def evaluation_batches(table: Table, batch_size: int, *, bucket: int = 0, start: int = 0) -> Iterator[Table]:
    """Every row once, in order, from batch `start` on; the last batch is filled with rows whose `row_mask_B` is False."""
    return batches(table, batch_size, seed=0, shuffle=False, bucket=bucket, start=start, epochs=1)


def batches_per_epoch(table: Table, batch_size: int) -> int:
    return -(-number_of_rows(table) // batch_size)


def number_of_rows(table: Table) -> int:
    return int(np.shape(table.row_mask_B)[0])


def permutation(seed: int, epoch: int, n: int, name: str = "batches") -> np.ndarray:
    """The order of an epoch of stream `name`.

    From the raw bits of a counter-based generator, which no version of numpy or JAX may change.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(name.encode()), epoch])).random_raw(n)
    return np.argsort(bits, kind="stable")


def take(table: Table, rows: np.ndarray) -> Table:
    """Some rows of a table, in the order given. `index_B` goes along: a row keeps its number."""
    return jax.tree.map(lambda a: np.asarray(a)[rows], table)


def sides(pairs: PairBatch) -> Iterator[TextBatch]:
    """The chosen and the rejected responses of pairs, as texts."""
    for response, mask in ((pairs.chosen_BT, pairs.chosen_mask_BT), (pairs.rejected_BT, pairs.rejected_mask_BT)):
        yield TextBatch(pairs.prompt_BL, pairs.prompt_mask_BL, response, mask, pairs.row_mask_B, pairs.index_B)


def trim(table: Table, multiple: int = 1) -> Table:
    """Cut padding that is common to all rows: prompts on the left, responses on the right (chosen and rejected alike).

    Widths stay multiples of `multiple` (or the full width). Columns are left alone.
    """
    if multiple < 1:
        raise ValueError(f"trim to a multiple of {multiple}; it must be at least 1.")
    changes = {}
    for side, fields in ((-1, _LEFT), (1, _RIGHT)):
        masks = [np.asarray(getattr(table, m)) for m in fields.values() if hasattr(table, m)]
        if not masks:
            continue
        full = masks[0].shape[1]
        used = max(_used(mask[:, ::side]) for mask in masks)
        width = min(full, max(1, -(-used // multiple)) * multiple)
        window = slice(full - width, full) if side < 0 else slice(0, width)
        names = [name for pair in fields.items() for name in pair if hasattr(table, name)]
        changes |= {name: np.asarray(getattr(table, name))[:, window] for name in names}
    return replace(table, **changes)


def _used(mask: np.ndarray) -> int:
    """Columns up to the last one that any row uses."""
    columns = np.flatnonzero(mask.any(axis=0))
    return int(columns[-1]) + 1 if len(columns) else 0


def _batch(table: Table, rows: np.ndarray, batch_size: int, bucket: int) -> Table:
    # Filler rows repeat a real row of the batch: finite in every computation, and no wider than the others.
    filled = np.concatenate([rows, np.full(batch_size - len(rows), rows[0], rows.dtype)])
    batch = take(table, filled)
    batch = replace(batch, row_mask_B=np.asarray(batch.row_mask_B, bool) & (np.arange(batch_size) < len(rows)))
    return trim(batch, bucket) if bucket > 0 else batch


def _check(table: Table, batch_size: int, start: int) -> int:
    n = number_of_rows(table)
    lengths = {int(np.shape(leaf)[0]) for leaf in jax.tree.leaves(table)}
    if n < 1 or lengths != {n}:
        raise ValueError(f"a table needs at least one row and one length for all its arrays; found lengths {sorted(lengths)}.")
    if batch_size < 1 or start < 0:
        raise ValueError(f"batch_size is {batch_size} and start {start}; they must be at least 1 and at least 0.")
    return n
