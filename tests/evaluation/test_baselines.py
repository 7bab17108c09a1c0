"""What a reward model has to beat: the longer response, and a bag of words against scikit-learn's figures by hand."""

import numpy as np
import pytest

from jaxrlhf.evaluation import baselines
from jaxrlhf.evaluation.intervals import wilson_interval


def test_the_longer_response_and_a_bag_of_words():
    """Words decide every pair that they know; the longer side is right once, wrong twice, and equal once."""
    train = [("Good, short", "bad and long winded")] * 3 + [("good", "bad")] * 3
    valid = [("good day", "bad day"), ("so good", "so very bad"), ("unheard of", "a novelty"), ("good", "bad bad")]
    lengths = np.array([2, 2, 3, 1]), np.array([2, 3, 2, 2])
    found = baselines.pair_baselines(train, valid, lengths)
    assert found["longer"]["accuracy"] == (0.5 + 0 + 1 + 0) / 4 and found["longer"]["pairs"] == 4
    assert found["bag_of_words"]["accuracy"] == (1 + 1 + 0.5 + 1) / 4
    assert (found["longer"]["low"], found["longer"]["high"]) == wilson_interval(1.5, 4)


def test_the_weights_are_the_penalised_likelihoods():
    """One word apart, n times: w = σ(−w·d)·n·d with d = 1, by bisection; the other word mirrors it."""
    n, low, high = 5, 0.0, 5.0
    for _ in range(60):
        w = (low + high) / 2
        low, high = (w, high) if n / (1 + np.exp(2 * w)) > w else (low, w)
    assert baselines.bag_of_words([("Yes", "no")] * n, ["yes", "NO", "yes yes no", "maybe"]) == pytest.approx([w, -w, w, 0], abs=1e-4)


def test_nothing_to_learn_from_and_nothing_to_tell():
    found = baselines.pair_baselines([], [("a", "b")], (np.array([1]), np.array([1])))
    assert found["bag_of_words"]["accuracy"] == 0.5
    none = baselines.pair_baselines([("a", "b")], [], (np.array([]), np.array([])))
    assert none["longer"] == none["bag_of_words"] == {"accuracy": None, "low": 0.0, "high": 1.0, "pairs": 0}
