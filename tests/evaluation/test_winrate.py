"""Win rates and their intervals, and the accuracy of reward models."""

import numpy as np
import pytest
from scipy.stats import binomtest

from jaxrlhf.evaluation.diagnostics import agreement_with_gold, pair_accuracy
from jaxrlhf.evaluation.winrate import wilson_interval, win_rate


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (3, 10), (10, 10), (250, 500), (1, 1)])
def test_wilson_interval_is_scipys(wins, n):
    expected = binomtest(wins, n).proportion_ci(method="wilson")
    assert wilson_interval(wins, n) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_interval_of_nothing_and_of_everything():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 7)[0] == 0.0 and wilson_interval(7, 7)[1] == 1.0


def test_ties_are_no_wins():
    won = win_rate(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 2.0, 1.0]))
    assert (won.win_rate, won.tie_rate, won.n) == (0.5, 0.25, 4)
    assert won.win_rate_low < 0.5 < won.win_rate_high
    assert win_rate(np.zeros(0), np.zeros(0)).win_rate == 0


def test_bad_scores_are_refused():
    with pytest.raises(ValueError, match=r"equal length, not shapes \(2,\) and \(3,\)"):
        win_rate(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match=r"not finite"):
        win_rate(np.array([0.0, np.nan]), np.zeros(2))


def test_pair_accuracy_counts_a_tie_as_half():
    assert pair_accuracy(np.array([2.0, 1.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0, 3.0])) == 0.5
    assert pair_accuracy(np.zeros(0), np.zeros(0)) is None


def test_agreement_leaves_golds_ties_out():
    gold = np.array([1.0, 0.0, 5.0]), np.array([0.0, 1.0, 5.0])
    assert agreement_with_gold((np.array([9.0, 3.0, 0.0]), np.array([8.0, 4.0, 1.0])), gold) == 1.0
    assert agreement_with_gold((np.array([9.0, 5.0, 0.0]), np.array([8.0, 4.0, 1.0])), gold) == 0.5
    assert agreement_with_gold((np.array([1.0]), np.array([2.0])), (np.array([3.0]), np.array([3.0]))) is None
