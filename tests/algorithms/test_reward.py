"""Columns that a pair loss reads: refused before anything is built where nothing makes them, filled in where the loss says with what."""

import dataclasses

import numpy as np
import pytest

from jaxrlhf.algorithms.reward import check_columns, reward_loss, with_columns
from jaxrlhf.config import RewardConfig
from jaxrlhf.types import PairBatch, PairLoss


def loss(outputs, batch, *, total=None, center=0.0):
    return 0.0, {}


def tokens(**columns) -> PairBatch:
    grid, ones = np.zeros((3, 2), np.int32), np.ones((3, 2), bool)
    rows = np.ones(3, np.float32), np.ones(3, bool), np.arange(3)
    return PairBatch(grid, ones, grid, ones, grid, ones, *rows, columns)  # type: ignore[arg-type]


def test_columns_that_nothing_makes_are_refused_before_anything_is_built():
    reads = PairLoss("scalar", ("margin", "gap"), loss, (None, 0.5))
    check_columns(reads, "mine:update", name="x")
    check_columns(PairLoss("scalar", ("margin",), loss), None, name="x")
    with pytest.raises(ValueError, match=r"^x reads column 'gap', which nothing makes: this method has no reward update\. Name a method"):
        check_columns(reads, None, name="x")
    with pytest.raises(ValueError, match=r"this method has reward update 'nearest', which adds none\."):
        check_columns(reads, "nearest", name="x")
    for missing in ((), (0.0, None)):
        with pytest.raises(
            ValueError, match=r"reads column 'gap', which no reward update has made in round 1; give PairLoss\(…, defaults="
        ):
            check_columns(reads._replace(defaults=missing), "mine:update", name="x")
    with pytest.raises(ValueError, match=r"reads column 'margin', which nothing makes"):
        check_columns(reads, None, name="x", given=())


def test_defaults_stand_for_columns_until_an_update_makes_them():
    reads = PairLoss("scalar", ("margin", "gap"), loss, (None, 0.5))
    margin, gap = np.arange(3, dtype=np.float32), np.ones((3, 2), np.int32)
    filled = with_columns(tokens(margin=margin), reads, name="x", updated=False).columns
    assert filled["margin"] is margin and filled["gap"].tolist() == [0.5] * 3 and filled["gap"].dtype == np.float32
    whole = tokens(margin=margin, gap=gap, more=margin)
    assert with_columns(whole, reads, name="x", updated=True) is whole
    with pytest.raises(
        ValueError, match=r"^x reads column 'gap', but after the reward update the pairs carry gab, margin; return pairs whose"
    ):
        with_columns(tokens(margin=margin, gab=gap), reads, name="x", updated=True)
    with pytest.raises(ValueError, match=r"^x reads column 'margin', but the pairs carry none; return"):
        with_columns(tokens(), reads, name="x", updated=False)


def test_one_default_a_column():
    reads = PairLoss("scalar", ("gap",), loss, (0.0, 1.0))
    with pytest.raises(ValueError, match=r"reward.loss 'm:x' has 1 columns and 2 defaults; give one each, or none"):
        reward_loss(RewardConfig(loss="m:x"), lambda name: reads)


def test_a_reloaded_loss_is_the_one_that_is_trained_with():
    """The same name, another object behind it: nothing of the old one is kept; the same object gives the same trainer."""
    found = [PairLoss("scalar", (), lambda *a, total=None, center=0.0: None) for _ in range(2)]
    config = RewardConfig(loss="m:x", center_rewards_coefficient=0.1)
    now = [found[0]]

    def plugin(name):
        return now[0]

    first, again = reward_loss(config, plugin), reward_loss(config, plugin)
    now[0] = found[1]
    other = reward_loss(config, plugin)
    assert first is again and first.loss.func is found[0].loss and other.loss.func is found[1].loss  # type: ignore[attr-defined]
    assert reward_loss(dataclasses.replace(config, center_rewards_coefficient=0.2), plugin).loss.keywords == {"center": 0.2}  # type: ignore[attr-defined]
