"""Epochs are partitions, resuming is exact, fillers count nowhere, trimming loses no token."""

from dataclasses import fields
from itertools import islice

import jax
import numpy as np
import pytest

from jaxrlhf.data.batches import batches, batches_per_epoch, evaluation_batches, permutation, take, trim
from jaxrlhf.types import PairBatch, PromptBatch, TextBatch

PINNED = ([1, 4, 0, 2, 7, 6, 3, 5], [4, 2, 7, 3, 0, 1, 6, 5])


def pair_table(n, L=12, T=10, seed=0):
    rng = np.random.default_rng(seed)
    left = np.arange(L)[::-1][None] < rng.integers(1, L - 3, n)[:, None]
    right = [np.arange(T)[None] < rng.integers(1, T - 3, n)[:, None] for _ in range(2)]
    tokens = [rng.integers(1, 99, (n, w)).astype(np.int32) for w in (L, T, T)]
    return PairBatch(
        tokens[0], left, tokens[1], right[0], tokens[2], right[1],
        np.arange(n, dtype=np.float32), np.ones(n, bool), np.arange(n, dtype=np.int32), {"margin": np.arange(n) * 2.0},
    )  # fmt: skip


def other_tables(n):
    p = pair_table(n)
    yield PromptBatch(p.prompt_BL, p.prompt_mask_BL, p.row_mask_B, p.index_B)
    yield TextBatch(p.prompt_BL, p.prompt_mask_BL, p.chosen_BT, p.chosen_mask_BT, p.row_mask_B, p.index_B)


def real_rows(batch):
    return batch.index_B[batch.row_mask_B].tolist()


def order(several):
    return [row for batch in several for row in real_rows(batch)]


@pytest.mark.parametrize(("n", "size"), [(10, 4), (12, 4), (3, 8), (1, 1), (5, 1)])
def test_every_epoch_is_a_partition_in_an_order_of_its_own(n, size):
    table = pair_table(n)
    per_epoch = batches_per_epoch(table, size)
    got = list(batches(table, size, seed=3, epochs=4))
    assert len(got) == 4 * per_epoch and all(b.index_B.shape == (size,) for b in got)
    orders = [order(got[e * per_epoch : (e + 1) * per_epoch]) for e in range(4)]
    assert all(sorted(o) == list(range(n)) for o in orders)
    if n >= 10:
        assert len({tuple(o) for o in orders}) == 4
        assert orders[0] != order(islice(batches(table, size, seed=4), per_epoch))


def test_rows_travel_whole():
    table = pair_table(10)
    for batch in batches(table, 4, seed=0, epochs=1):
        for whole, part in zip(jax.tree.leaves(table), jax.tree.leaves(batch), strict=True):
            if whole.dtype != bool or whole.ndim == 2:
                np.testing.assert_array_equal(part, whole[batch.index_B])


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7, 30])
def test_resuming_gives_the_same_batches(start):
    table = pair_table(10)
    whole = list(islice(batches(table, 4, seed=1, bucket=2), start + 5))
    again = list(islice(batches(table, 4, seed=1, bucket=2, start=start), 5))
    for a, b in zip(whole[start:], again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_starting_after_the_last_epoch_yields_nothing():
    assert list(batches(pair_table(10), 4, seed=1, start=6, epochs=2)) == []
    assert len(list(batches(pair_table(10), 4, seed=1, start=5, epochs=2))) == 1


def test_the_order_of_an_epoch_is_pinned():
    """Runs are resumed after upgrades: these numbers may never change."""
    assert permutation(0, 0, 8).tolist() == PINNED[0] and permutation(7, 3, 8).tolist() == PINNED[1]


def test_streams_that_share_a_seed_share_no_order():
    """Stream and seed are two numbers: neither another name nor another seed gives an order that was there before."""
    table = pair_table(10)
    orders = [
        order(batches(table, 4, seed=seed, name=name, epochs=1)) for seed in (0, 1) for name in ("sft", "reward/r1", "reward/r2", "ppo")
    ]
    assert len({tuple(o) for o in orders}) == 8
    assert order(batches(table, 4, seed=0, epochs=1)) == permutation(0, 0, 10, "batches").tolist() == permutation(0, 0, 10).tolist()
    resumed = list(batches(table, 4, seed=0, name="sft", start=2, epochs=2))
    whole = list(batches(table, 4, seed=0, name="sft", epochs=2))[2:]
    assert [real_rows(b) for b in resumed] == [real_rows(b) for b in whole]


def test_evaluation_is_ordered_and_drops_nothing():
    for table in (pair_table(10), *other_tables(10)):
        got = list(evaluation_batches(table, 4, bucket=4))
        assert order(got) == list(range(10))
        assert got[-1].row_mask_B.tolist() == [True, True, False, False]


def test_rows_that_were_fillers_stay_fillers():
    table = pair_table(4)
    table.row_mask_B[2] = False
    assert sorted(real_rows(next(batches(table, 4, seed=0)))) == [0, 1, 3]


@pytest.mark.parametrize("bucket", [1, 4, 5, 100])
def test_trimming_keeps_every_token_and_common_widths(bucket):
    table = pair_table(6)
    for whole, batch in zip(evaluation_batches(table, 2), evaluation_batches(table, 2, bucket=bucket), strict=True):
        L, T = batch.prompt_BL.shape[1], batch.chosen_BT.shape[1]
        assert L == 12 or L % bucket == 0
        assert T == 10 or T % bucket == 0
        assert batch.rejected_BT.shape == batch.chosen_mask_BT.shape == (2, T) and batch.prompt_mask_BL.shape == (2, L)
        for name in ("prompt_BL", "chosen_BT", "rejected_BT"):
            mask = name.replace("_B", "_mask_B")
            np.testing.assert_array_equal(getattr(whole, name)[getattr(whole, mask)], getattr(batch, name)[getattr(batch, mask)])
        np.testing.assert_array_equal(batch.prompt_mask_BL, whole.prompt_mask_BL[:, 12 - L :])  # still left-padded
        np.testing.assert_array_equal(batch.chosen_mask_BT, whole.chosen_mask_BT[:, :T])
        if bucket == 1:
            assert batch.prompt_mask_BL.any(axis=0).all() and (batch.chosen_mask_BT | batch.rejected_mask_BT).any(axis=0).all()


def test_trim_works_on_every_table_and_leaves_empty_masks_a_column():
    for table in other_tables(3):
        assert type(trim(table)) is type(table) and trim(table).prompt_BL.shape[1] < 12
    table = pair_table(2)
    table.chosen_mask_BT[:] = table.rejected_mask_BT[:] = False
    assert trim(table).chosen_BT.shape == (2, 1)
    with pytest.raises(ValueError, match="multiple of 0"):
        trim(table, 0)


def test_take_keeps_numbers_and_columns():
    part = take(pair_table(9), np.array([7, 2]))
    assert part.index_B.tolist() == [7, 2] and part.columns["margin"].tolist() == [14.0, 4.0] and len(fields(part)) == 10


def test_bad_arguments_say_what_is_wrong():
    with pytest.raises(ValueError, match="at least one row"):
        next(batches(take(pair_table(3), np.array([], int)), 2, seed=0))
    for bad in ({"batch_size": 0}, {"batch_size": 2, "start": -1}):
        with pytest.raises(ValueError, match="batch_size"):
            next(batches(pair_table(3), seed=0, **bad))
    with pytest.raises(ValueError, match=r"lengths \[2, 3\]"):
        table = pair_table(3)
        table.columns["short"] = np.zeros(2)
        next(batches(table, 2, seed=0))
