"""Reliability, drift, KL budget and the curves, by hand."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from jaxrlhf.evaluation.curves import Curve, Point, curve_of, estimate, over_seeds
from jaxrlhf.evaluation.diagnostics import agreement_with_gold, drift, kl_budget, reliability
from jaxrlhf.evaluation.intervals import mean_interval


def logit(p):
    return math.log(p / (1 - p))


def test_reliability_by_hand():
    """Two pairs at P = .92 of which one is right, three at .62 of which two are; a gold tie is left out."""
    d = [logit(0.92), -logit(0.92), logit(0.62), logit(0.62), -logit(0.62), 3.0]
    gold = [1, 1, 1, 0, 0, 5], [0, 0, 0, 1, 1, 5]  # of the second pair the score prefers what gold does not
    found = reliability((np.array(d), np.zeros(6)), (np.array(gold[0]), np.array(gold[1])))
    assert found["pairs"] == 5 and found["accuracy"] == pytest.approx(3 / 5)
    filled = {round(row["low"], 2): row for row in found["bins"] if row["pairs"]}
    assert set(filled) == {0.6, 0.9} and len(found["bins"]) == 10
    assert filled[0.9]["pairs"] == 2 and filled[0.9]["accuracy"] == 0.5 and filled[0.9]["confidence"] == pytest.approx(0.92)
    assert filled[0.6]["accuracy"] == pytest.approx(2 / 3)
    assert found["ece"] == pytest.approx(2 / 5 * (0.92 - 0.5) + 3 / 5 * (2 / 3 - 0.62))


def test_reliability_does_not_depend_on_the_order_of_a_pair():
    rng = np.random.default_rng(0)
    scores, gold = rng.normal(size=(2, 300)), rng.normal(size=(2, 300))
    swapped = reliability((scores[1], scores[0]), (gold[1], gold[0]))
    found = reliability((scores[0], scores[1]), (gold[0], gold[1]))
    assert found["accuracy"] == pytest.approx(agreement_with_gold((scores[0], scores[1]), (gold[0], gold[1])))
    for one, other in zip(found["bins"], swapped["bins"], strict=True):
        assert one["pairs"] == other["pairs"] and one["accuracy"] == pytest.approx(other["accuracy"])


def test_a_calibrated_model_is_reliable_and_a_sharpened_one_is_not():
    rng = np.random.default_rng(1)
    d = rng.normal(0, 1.5, 20_000)
    first = rng.random(20_000) < 1 / (1 + np.exp(-d))
    gold = (first.astype(float), 1 - first)
    zeros = np.zeros_like(d)
    assert reliability((d, zeros), gold)["ece"] < 0.02
    assert reliability((4 * d, zeros), gold)["ece"] > 0.1


@pytest.mark.parametrize(("sharpness", "n"), [(1, 60), (1, 500), (2, 60), (2, 500)])
def test_the_interval_of_the_ece_covers(sharpness, n):
    """Of pairs whose P is right, and of pairs whose scores are twice too large."""
    rng = np.random.default_rng(n)

    def found(n):
        d = rng.normal(0, 1.5, n)
        first = (rng.random(n) < 1 / (1 + np.exp(-d))).astype(float)
        return reliability((sharpness * d, np.zeros(n)), (first, 1 - first))

    truth = found(20_000)["ece"]
    ends = [(one["ece_low"], one["ece_high"]) for one in (found(n) for _ in range(100))]
    assert sum(low <= truth <= high for low, high in ends) >= 92
    assert n < 500 or sharpness == 1 or sum(low > 0 for low, _ in ends) >= 80  # five hundred tell a model that is too sure


def sure(n, right, confidence):
    """n pairs of one confidence, of which so many are right."""
    gold = (np.arange(n) < right).astype(float)
    return reliability((np.full(n, logit(confidence)), np.zeros(n)), (gold, 1 - gold))


def test_pairs_that_are_all_right_tell_no_exact_ece():
    found = sure(20, 20, 1 / (1 + math.exp(-3)))
    assert found["ece"] == pytest.approx(0.0474, abs=1e-4)
    assert (found["ece_low"], found["ece_high"]) == (0.0, pytest.approx(0.0474 + 0.161, abs=0.01))  # Wilson's of 20 of 20 is .839
    alone = sure(1, 1, 0.9)
    assert (alone["ece_low"], alone["ece_high"], alone["ece_n"]) == (None, None, 1)


@pytest.mark.parametrize(("n", "confidence", "truth"), [(20, 0.97, 0.9), (20, 0.95, 0.95), (50, 0.99, 0.95), (100, 0.99, 0.97)])
def test_the_interval_of_few_and_sure_pairs_covers(n, confidence, truth):
    """Exactly: the chance of every number of right pairs, and whether the interval made of it holds |truth − confidence|."""
    ends = [(one["ece_low"], one["ece_high"]) for one in (sure(n, right, confidence) for right in range(n + 1))]
    holds = np.array([low <= abs(truth - confidence) <= high for low, high in ends])
    assert binom.pmf(np.arange(n + 1), n, truth) @ holds >= 0.95


def test_reliability_of_extremes_and_of_nothing():
    found = reliability((np.array([800.0, 0.0]), np.array([0.0, 0.0])), (np.array([1, 1]), np.array([0, 0])))
    assert found["bins"][-1]["pairs"] == 1 and found["bins"][0]["accuracy"] == 0.5  # equal scores are half right
    nothing = reliability((np.array([1.0]), np.array([0.0])), (np.array([2.0]), np.array([2.0])))
    assert nothing["pairs"] == 0 and nothing["ece"] is None and nothing["accuracy"] is None


def test_drift_by_hand():
    before = np.array([[1.0, 2.0, 0.0, 3.0], [0.0, 3.0, 1.0, 3.0]])  # prefers: chosen, rejected, rejected, neither
    same = drift(before, 2 * before + 5)
    assert same["agreement"] == 0.875  # 3 agree, the tie counts one half
    assert same["correlation"] == pytest.approx(1) and same["scale"] == pytest.approx(2)
    assert drift(before, before[::-1])["agreement"] == 0.125
    flat = drift(before, np.ones_like(before))
    assert flat["correlation"] is None and flat["scale"] == 0 and flat["agreement"] == 0.5
    assert drift(np.zeros((2, 0)), np.zeros((2, 0)))["agreement"] is None
    with pytest.raises(ValueError, match="same pairs"):
        drift(before, before[:, :2])


def spent(*rounds):
    """Of (the round whose policy is the reference, KL to it)."""
    rows = [{"round": n, "reference": reference, "penalty": kl} for n, (reference, kl) in enumerate(rounds, 1)]
    told = kl_budget(rows)
    assert [row["penalty"] for row in told] == [row["penalty"] for row in rows]
    return [row["spent"] for row in told]


def test_kl_budget_adds_legs_and_takes_levels():
    assert spent((0, 1.0), (1, 0.5), (2, 0.25), (3, None), (4, 0.5), (0, 3.0)) == [1.0, 1.5, 1.75, None, None, 3.0]


def test_kl_budget_counts_a_round_once_where_the_reference_stood_still():
    """Rounds 2 and 4 were not due: each pays for its distance to the policy that the round before went away from, and so for both."""
    assert spent((0, 1.0), (0, 1.5), (2, 0.25), (2, 0.5)) == [1.0, 1.5, 1.75, 2.0]


POINTS = (
    Point(0, 0.0, 1.0),
    Point(1, 1.0, 3.0, proxy_start=-1.0, proxy=1.0, proxy_scale=2.0, start=0),
    Point(2, 4.0, 2.0, proxy_start=5.0, proxy=9.0, proxy_scale=4.0, start=1, refit=True),
)


def test_curve_gains_peak_and_gap():
    """Proxy gains 2 of scale 2, then 4 of scale 4: two deviations; the jump of the refit (1 → 5) is no gain. Gold gains 1 of 2."""
    curve = Curve(POINTS, gold_scale=2.0)
    assert curve.proxy_gain == [0.0, 1.0, 2.0] and curve.gold_gain == [0.0, 1.0, 0.5]
    assert curve.peak is POINTS[1] and curve.lost == 1.0 and curve.gap == 1.5
    assert Curve(POINTS[1:2]).proxy_gain == [1.0]  # π_SFT is no point of it
    assert Curve(POINTS[:2], gold_scale=2.0).gap == 0.0 and Curve(POINTS[:1], gold_scale=2.0).gap is None
    assert [p.root_kl for p in POINTS] == [0, 1, 2] and Point(1, -1e-3, None).root_kl == 0


def test_a_round_that_starts_from_sft_counts_from_there():
    again = Curve((*POINTS[:2], Point(2, 4.0, 2.0, proxy_start=5.0, proxy=9.0, proxy_scale=4.0, start=0)), gold_scale=2.0)
    assert again.proxy_gain == [0.0, 1.0, 1.0]


def test_curves_without_gold_or_scale_have_no_gap():
    no_scale = Curve(POINTS)
    assert no_scale.gap is None and no_scale.peak is POINTS[1]
    blind = Curve(tuple(Point(p.round, p.kl, None, p.proxy_start, p.proxy) for p in POINTS), 1.0)
    assert blind.peak is None and blind.lost is None and blind.gap is None and Curve(()).gap is None


def test_a_scale_holds_until_the_next_fit():
    rows = [{"round": n, "kl_sft": float(n), "gold": 0.0, "proxy_start": 0.0, "proxy": 1.0} for n in range(4)]
    curve = curve_of(rows, starts={3: 0}, fitted={1, 3}, scales={1: 2.0, 3: 5.0}, gold_scale=None)
    assert [p.proxy_scale for p in curve.points] == [None, 2.0, 2.0, 5.0]
    assert [p.refit for p in curve.points] == [False, False, False, True] and [p.start for p in curve.points] == [0, 0, 1, 0]


def test_seeds_that_do_not_vary_tell_no_difference():
    """One pair more of 19 at each of two seeds: the spread is 0, or 4e-17 by rounding, and would call anything a difference."""
    for changes in ([13 / 19 - 12 / 19, 12 / 19 - 11 / 19], [0.0, 0.0], [0.25, 0.25]):
        assert estimate(changes).interval.direction == 0 == mean_interval(np.array(changes)).direction
        assert math.isnan(estimate(changes).interval.low) and math.isnan(mean_interval(np.array(changes)).low)
    assert estimate([0.25, 0.26]).interval.direction == 1


def test_bands():
    assert estimate([1.0, None, 3.0]) == (2, 2.0, pytest.approx(1.0), 1.0) and estimate([2.0]) == (1, 2.0, None, 2.0)
    assert estimate([None]) is None
    assert [None if one is None else one.n for one in over_seeds([[1.0, 2.0], [1.0], [None, 4.0]])] == [2, 2]
