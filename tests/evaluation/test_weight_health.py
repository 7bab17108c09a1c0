"""Weights worked by hand, the ends of what they may be, and figures that open."""

import itertools
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from jaxrlhf.evaluation.intervals import equal_bins
from jaxrlhf.evaluation.weight_health import DATA, FIGURE, cumulative_share, weight_health, write_weight_health
from jaxrlhf.losses import weight_summary


def test_by_hand():
    """Weights 1 1 2 4: Σw = 8, Σw² = 22, ESS = 64/22; the short half has 2 of 8 and an ESS of 2, the long half 6 of 8 and 36/20."""
    health = weight_health(np.array([1, 4, 1, 2]), np.array([3.0, 8.5, 3.0, 8.0]), bins=2)
    assert health["pairs"] == 4 and health["zeros"] == 0 and health["mean"] == 2 and health["largest_share"] == 0.5
    assert health["ess"] == pytest.approx(64 / 22) and health["ess_fraction"] == pytest.approx(16 / 22)
    assert list(health["quantiles"]) == ["0", "0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99", "1"]
    wanted = {"0": 1, "0.25": 1, "0.5": 1.5, "0.75": 2.5, "0.95": 3.7, "1": 4}  # linear between the order statistics 1 1 2 4
    assert {q: health["quantiles"][q] for q in wanted} == pytest.approx(wanted)
    short, long = health["by_length"]
    assert short == {"from": 3, "to": 3, "pairs": 2, "mean": 1, "share": 0.25, "ess": pytest.approx(2), "ess_fraction": pytest.approx(1)}
    assert long == {
        "from": 8, "to": 8.5, "pairs": 2, "mean": 3, "share": 0.75, "ess": pytest.approx(36 / 20), "ess_fraction": pytest.approx(0.9),
    }  # fmt: skip
    # log₂ w = 0 2 0 1 and the lengths, by the definition of the correlation (the base of the logarithm cancels).
    x, y = np.array([0, 2, 0, 1.0]), np.array([3.0, 8.5, 3.0, 8.0])
    r = ((x - 0.75) * (y - 5.625)).sum() / np.sqrt(((x - 0.75) ** 2).sum() * ((y - 5.625) ** 2).sum())
    assert health["length_correlation"] == pytest.approx(r) and r > 0.9


def test_agrees_with_the_summary_that_training_reports():
    weights = np.exp(np.random.default_rng(0).normal(size=500)).astype(np.float32)
    health, summary = weight_health(weights, np.arange(500.0)), weight_summary(weights)
    for name in ("ess", "ess_fraction", "mean", "largest_share"):
        assert health[name] == pytest.approx(float(summary[name]), rel=1e-5), name
    for name, quantile in (("q01", "0.01"), ("q50", "0.5"), ("q99", "0.99"), ("min", "0"), ("max", "1")):
        assert health["quantiles"][quantile] == pytest.approx(float(summary[name]), rel=1e-5), name


def test_the_scale_of_the_weights_is_seen_in_what_has_a_scale_alone():
    random = np.random.default_rng(1)
    weights, lengths = np.exp(random.normal(size=300)), random.integers(1, 9, 300)
    one, many = weight_health(weights, lengths), weight_health(weights / weights.max() * 1e300, lengths)  # Σw² would overflow
    for name in ("ess", "largest_share", "length_correlation"):
        assert many[name] == pytest.approx(one[name], rel=1e-9)
    assert [row["share"] for row in many["by_length"]] == pytest.approx([row["share"] for row in one["by_length"]])
    assert many["quantiles"]["1"] == pytest.approx(1e300)
    json.dumps(many, allow_nan=False)


def test_bins_cover_every_pair_once_and_keep_equal_lengths_together():
    random = np.random.default_rng(2)
    for lengths in (random.integers(3, 15, 1000) / 2, np.repeat([1.0, 2.0, 50.0], [90, 9, 1]), np.arange(7.0), np.full(9, 4.0)):
        index = equal_bins(lengths, 5)
        assert sorted(np.concatenate(index).tolist()) == list(range(len(lengths))) and 1 <= len(index) <= 5
        for shorter, longer in itertools.pairwise(index):
            assert lengths[shorter].max() < lengths[longer].min()
    assert [len(i) for i in equal_bins(np.arange(1000.0), 5)] == [200] * 5
    assert len(equal_bins(np.full(9, 4.0), 5)) == 1


def test_few_lengths_are_drawn_as_they_are_binned(tmp_path):
    """Three lengths make two bins of the five: edges between quantiles fall together."""
    lengths = np.repeat([2.0, 7.5, 8.0], [9, 2, 29])
    health = write_weight_health(tmp_path, np.linspace(0.1, 3, 40), lengths)
    assert [(row["from"], row["to"], row["pairs"]) for row in health["by_length"]] == [(2, 2, 9), (7.5, 8, 31)]
    assert ElementTree.parse(tmp_path / FIGURE).getroot() is not None


def test_shares_of_the_bins_are_the_whole():
    random = np.random.default_rng(3)
    health = weight_health(random.gamma(0.3, size=400), random.integers(1, 40, 400))
    assert sum(row["share"] for row in health["by_length"]) == pytest.approx(1)
    assert sum(row["pairs"] for row in health["by_length"]) == 400 and len(health["by_length"]) == 5


@pytest.mark.parametrize(
    ("weights", "ess", "zeros"),
    [
        (np.ones(6), 6, 0), (np.array([0, 0, 3, 0, 0, 0.0]), 1, 5), (np.zeros(6), 0, 6), (np.array([0, 0, 0, 2, 2, 2.0]), 3, 3),
        (np.ones(1), 1, 0),
    ],
    ids=["equal", "one-pair", "nothing", "half", "single"],
)  # fmt: skip
def test_extremes_are_finite_and_drawn(tmp_path, weights, ess, zeros):
    health = write_weight_health(tmp_path, weights, np.arange(len(weights)) + 2.0)
    assert health["ess"] == pytest.approx(ess) and health["zeros"] == zeros and health["length_correlation"] is None
    assert json.loads((tmp_path / DATA).read_text()) == health
    assert len(ElementTree.parse(tmp_path / FIGURE).getroot()) > 0


def test_cumulative_share_by_hand():
    x, y = cumulative_share(np.array([1.0, 5.0, 2.0, 0.0]))
    np.testing.assert_allclose(x, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(y, [0, 5 / 8, 7 / 8, 1, 1])
    x, y = cumulative_share(np.ones(100_000))
    assert len(x) <= 400 and (x[0], x[-1]) == (0, 1)
    np.testing.assert_allclose(x, y, atol=1e-9)


def test_the_figure_says_what_it_shows_and_is_the_same_every_time(tmp_path):
    random = np.random.default_rng(4)
    weights, lengths = np.exp(2 * random.normal(size=3000)), random.integers(3, 60, 3000)
    files = []
    for name in "ab":
        (tmp_path / name).mkdir()
        health = write_weight_health(tmp_path / name, weights, lengths)
        files.append((tmp_path / name / FIGURE).read_bytes())
    assert files[0] == files[1] and len(files[0]) < 100_000  # curves and bins, never a point a pair
    text = " ".join(ElementTree.fromstring(files[0]).itertext())
    for label in ("pairs, heaviest first (% of all)", "their part of the total weight (%)", "mean length of a pair's responses (tokens)"):
        assert label in text
    assert f"ESS {health['ess']:.4g} of 3,000" in text and "weight of a pair" in text


@pytest.mark.parametrize(
    ("weights", "lengths", "message"),
    [
        ([], [], "there are no pairs"),
        ([1.0, 2.0], [3.0], r"weights of shape \(2,\) and lengths of shape \(1,\)"),
        ([1.0, -0.5], [3.0, 4.0], r"weight -0.5 is not a finite number ≥ 0"),
        ([1.0, float("nan")], [3.0, 4.0], r"weight nan is not a finite number"),
        ([float("inf"), 1.0], [3.0, 4.0], r"weight inf is not a finite number"),
    ],
)
def test_what_cannot_be_judged_is_refused(weights, lengths, message):
    with pytest.raises(ValueError, match=message):
        weight_health(np.array(weights), np.array(lengths))
