"""Win rates and their intervals, and the accuracy of reward models."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import binomtest, ttest_1samp, ttest_rel

from jaxrlhf.evaluation.diagnostics import agreement_with_gold, pair_accuracy
from jaxrlhf.evaluation.intervals import Interval, as_fields, from_fields, mean_interval, proportion, unpaired_difference, wilson_interval
from jaxrlhf.evaluation.winrate import by_length, length_controlled, outcomes, paired_difference, rate_of, score, win_rate


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


def test_wilson_interval_covers():
    random = np.random.default_rng(0)
    for n, p in ((50, 0.1), (200, 0.5), (30, 0.8)):
        ends = np.array([wilson_interval(int(wins), n) for wins in random.binomial(n, p, 4000)])
        assert 0.93 < ((ends[:, 0] <= p) & (p <= ends[:, 1])).mean() < 0.98


def test_score_by_hand():
    won = outcomes(np.array([3.0, 2.0, 1.0, 5.0]), np.array([1.0, 2.0, 4.0, 4.0]))
    assert won.tolist() == [1.0, 0.5, 0.0, 1.0]
    found = score(won)
    assert found.value == 0.625 and found.low < 0.625 < found.high and found.n == 4
    assert rate_of(won) == win_rate(np.array([3.0, 2.0, 1.0, 5.0]), np.array([1.0, 2.0, 4.0, 4.0]))
    assert score(won) == found
    assert score(np.full(9, 0.5)).value == 0.5
    assert np.isnan(score(np.zeros(0)).value)
    with pytest.raises(ValueError, match=r"1 \(won\), 0.5 \(tied\) or 0 \(lost\)"):
        score(np.array([0.2]))


@pytest.mark.parametrize("kind", ["outcomes", "numbers"])
def test_the_interval_of_a_mean_is_scipys(kind):
    random = np.random.default_rng(1)
    values = random.choice([0.0, 0.5, 1.0], 15, p=[0.3, 0.2, 0.5]) if kind == "outcomes" else random.normal(2, 3, 15)
    ours, theirs = mean_interval(values), ttest_1samp(values, 0).confidence_interval()
    assert ours == pytest.approx((values.mean(), theirs.low, theirs.high, 15))
    assert ours.direction == 1 and mean_interval(-values).direction == -1 and mean_interval(values - values.mean()).direction == 0
    with pytest.raises(ValueError, match="not finite"):
        mean_interval(np.array([0.0, np.nan]))


def test_the_interval_of_a_mean_of_few_covers():
    """Of fifteen prompts: where the percentile bootstrap, which stood here, covers about 92 %."""
    random = np.random.default_rng(7)
    ends = np.array([mean_interval(random.normal(1, 2, 15))[1:3] for _ in range(2000)])
    assert 0.94 < ((ends[:, 0] <= 1) & (ends[:, 1] >= 1)).mean() < 0.96


def test_the_difference_of_two_proportions_is_newcombes():
    """Example (b) of Newcombe (1998): 9 of 10 against 3 of 10, method 10: .1705 to .8090."""
    found = unpaired_difference(proportion(9, 10), proportion(3, 10))
    assert found[:3] == pytest.approx((0.6, 0.1705, 0.8090), abs=5e-5) and found.direction == 1
    assert unpaired_difference(proportion(5, 10), proportion(3, 10)).direction == 0


def test_an_interval_survives_its_row():
    found = proportion(3, 10)
    assert from_fields(as_fields("x", found), "x") == found and from_fields({}, "x") is None and as_fields("x", None)["x_n"] is None
    lone = as_fields("x", mean_interval(np.ones(4)))
    assert lone == {"x": 1.0, "x_low": None, "x_high": None, "x_n": 4} and np.isnan(from_fields(lone, "x").low)  # type: ignore[union-attr]
    assert proportion(0, 0).direction == 0 and as_fields("x", proportion(0, 0))["x"] is None


def test_an_interval_of_outcomes_that_are_all_alike_has_a_width():
    """0 of 20 is no proof of 0: the exact interval ends at .168. What has not varied has no interval of a mean at all."""
    lost, won = score(np.zeros(20)), score(np.ones(20))
    assert lost.high == pytest.approx(0.168, abs=0.01), f"0 of 20: [{lost.low}, {lost.high}]"
    assert (lost.low, won.high) == (0.0, 1.0) and won.low == pytest.approx(1 - lost.high)
    assert 0.2 < score(np.full(9, 0.5)).low < 0.4  # nine ties
    same = paired_difference(np.zeros(20), np.zeros(20))
    assert same.difference == 0 and np.isnan(same.low), f"20 equal differences: [{same.low}, {same.high}]"
    assert np.isnan(mean_interval(np.full(20, 3.0)).high) and np.isnan(mean_interval(np.ones(1)).low)


def test_a_few_agreeing_prompts_prove_nothing():
    few = paired_difference(np.array([1.0, 1.1, 1.2]), np.zeros(3))
    assert few.p == pytest.approx(ttest_1samp([1.0, 1.1, 1.2], 0).pvalue), few


def test_equal_lengths_outside_the_data_are_not_made_up():
    d = np.arange(1.0, 41.0)  # A is longer on every prompt
    won = (d > 20).astype(float)
    assert length_controlled(won, d) is None, length_controlled(won, d)
    assert length_controlled(won, -d) is None and length_controlled(won, d - 1) is not None


def test_score_interval_covers():
    random = np.random.default_rng(2)
    chances = [0.25, 0.15, 0.6]  # lost, tied, won
    inside = 0
    for _ in range(400):
        found = score(random.choice([0.0, 0.5, 1.0], 100, p=chances))
        inside += found.low <= 0.675 <= found.high
    assert 0.915 < inside / 400 < 0.98


def test_a_paired_difference_uses_the_pairs():
    random = np.random.default_rng(3)
    prompt = random.normal(0, 10, 300)  # hard and easy prompts
    a, b = prompt + random.normal(1, 1, 300), prompt + random.normal(0, 1, 300)
    found = paired_difference(a, b)
    assert found.difference == pytest.approx((a - b).mean()) and found.n == 300
    half = 1.96 * (a - b).std() / np.sqrt(300)
    assert (found.low, found.high) == pytest.approx((found.difference - half, found.difference + half), abs=0.02)
    assert found.p < 0.001 and found.low > 0  # unpaired the noise of the prompts would hide it
    turned = paired_difference(b, a)
    assert turned.difference == -found.difference and turned.p < 0.001
    assert paired_difference(a, a).p == 1.0 and paired_difference(a, b).p == pytest.approx(ttest_rel(a, b).pvalue)
    assert paired_difference(np.ones(9), np.zeros(9)).p == 2 * 0.5**9  # the sign test
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        paired_difference(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="not finite"):
        paired_difference(np.array([0.0, np.inf]), np.zeros(2))


def test_p_is_uniform_where_nothing_differs():
    random = np.random.default_rng(4)
    p = np.array([paired_difference(random.normal(size=80), random.normal(size=80)).p for _ in range(300)])
    for level in (0.05, 0.3, 0.7):
        assert abs((p < level).mean() - level) < 4 * np.sqrt(level * (1 - level) / 300)


def test_length_control_is_a_penalised_logistic_regression():
    random = np.random.default_rng(5)
    d = random.normal(20, 40, 250)
    won = (random.random(250) < expit(-0.4 + 1.2 * d / 40)).astype(float)
    won[:25] = 0.5
    found = length_controlled(won, d)
    assert found is not None

    def loss(x):
        logits = x[0] + x[1] * d / d.std()
        return np.sum(np.logaddexp(0, logits) - won * logits) + 0.005 * np.sum(x**2)

    best = minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9})
    assert (found.score, found.length_effect) == pytest.approx((expit(best.x[0]), best.x[1]), abs=1e-6)
    errors = np.sqrt(np.linalg.inv(np.array([[loss2(loss, best.x, i, j) for i in (0, 1)] for j in (0, 1)]))[0, 0])
    assert (found.low, found.high) == pytest.approx(tuple(expit(best.x[0] + s * 1.96 * errors) for s in (-1, 1)), abs=1e-4)
    assert found.score < 0.5 < won.mean()  # it won by being longer
    assert found.length_effect == pytest.approx(1.2, abs=0.4)


def loss2(loss, x, i, j, h=1e-3):
    """A second derivative by differences."""
    e = np.eye(2) * h
    return (loss(x + e[i] + e[j]) - loss(x + e[i] - e[j]) - loss(x - e[i] + e[j]) + loss(x - e[i] - e[j])) / (4 * h * h)


def test_length_control_recovers_the_truth_and_its_interval_covers():
    random = np.random.default_rng(6)
    inside, scores = 0, []
    for _ in range(300):
        d = random.normal(1, 1, 200)
        found = length_controlled((random.random(200) < expit(0.3 + 1.0 * d)).astype(float), d)
        assert found is not None
        scores.append(found.score)
        inside += found.low <= expit(0.3) <= found.high
    assert np.mean(scores) == pytest.approx(expit(0.3), abs=0.02) and 0.92 < inside / 300 < 0.985


def test_length_control_at_its_edges():
    d = np.linspace(-10, 9, 40)
    separated = length_controlled((d > 0).astype(float), d)  # length decides all: the score at equal lengths is not known
    assert separated is not None and np.isfinite(separated).all()
    assert separated.low < 0.25 and separated.high > 0.75 and separated.length_effect > 5
    everything = length_controlled(np.ones(50), np.linspace(-1, 1, 50))
    assert everything is not None and 0.99 < everything.score < 1 and everything.low < 0.95
    equal = length_controlled(np.array([1.0, 1.0, 0.0, 0.5]), np.zeros(4))
    assert equal is not None and equal.score == pytest.approx(0.625, abs=2e-3) and equal.length_effect == 0
    assert length_controlled(np.array([1.0, 0.0]), np.array([3.0, 3.0])) is None  # equal lengths were never seen
    assert length_controlled(np.zeros(0), np.zeros(0)) is None
    big = length_controlled(np.array([1.0, 0.0, 1.0, 0.0]), np.array([1e9, -1e9, 5.0, 3.0]))
    assert big is not None and np.isfinite(big).all()


def test_by_length():
    won = np.array([1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 1.0, 1.0])
    d = np.array([-8, -7, 0, 0, 0, 2, 5, 9.0])
    bins = by_length(won, d, bins=4)
    assert sum(b.n for b in bins) == 8 and all(x.high < y.low for x, y in pairwise(bins))
    assert (bins[0].low, bins[0].high, bins[0].n, bins[0].score, bins[0].win_rate, bins[0].mean_difference) == (-8, -7, 2, 0.5, 0.5, -7.5)
    assert (bins[1].n, bins[1].score, bins[1].win_rate) == (3, 0.5, 1 / 3)  # equal differences stay together
    assert [b.n for b in by_length(np.ones(6), np.zeros(6))] == [6]
    assert by_length(np.zeros(0), np.zeros(0)) == []
    with pytest.raises(ValueError, match="one difference an outcome"):
        by_length(np.ones(2), np.ones(3))


def test_an_interval_that_touches_zero_has_no_direction():
    ends = ((-2.0, 0.0), (0.0, 2.0), (-2.0, -1e-9), (1e-9, 2.0), (-1.0, 1.0))
    assert [Interval(0.5, low, high, 9).direction for low, high in ends] == [0, 0, -1, 1, 0]
