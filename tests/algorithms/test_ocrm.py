"""The weights a run makes of log-probs: against enumeration, against the public code's own formula, and at the ends of its knobs."""

import itertools

import numpy as np
import pytest

from jaxrlhf.algorithms.ocrm import weights_of
from jaxrlhf.config import WeightsConfig


def columns(chosen, rejected):
    return {"chosen_logp": np.asarray(chosen, np.float32), "rejected_logp": np.asarray(rejected, np.float32)}


def test_plain_weights_change_the_sampler_exactly():
    """α = 0, η = 1 over all pairs of all texts of 3 tokens from 3: Σ p_sft w f = Σ p_π f for any f."""
    random = np.random.default_rng(0)
    texts = list(itertools.product(range(3), repeat=3))
    logp = {}
    for name in ("policy", "sft"):
        steps = random.normal(size=(3, 3, 3))  # position, previous token, token
        steps -= np.log(np.exp(steps).sum(-1, keepdims=True))
        logp[name] = np.array([sum(steps[t, text[t - 1] if t else 0, text[t]] for t in range(3)) for text in texts])
    i, j = (index.ravel() for index in np.meshgrid(range(27), range(27)))
    f = random.normal(size=27 * 27)
    weights, report = weights_of(
        columns(logp["policy"][i], logp["policy"][j]), columns(logp["sft"][i], logp["sft"][j]), WeightsConfig(alpha=0.0, eta=1.0)
    )
    old, new = (np.exp(logp[name][i] + logp[name][j]) for name in ("sft", "policy"))
    np.testing.assert_allclose((old * weights * f).sum(), (new * f).sum(), rtol=1e-5)
    np.testing.assert_allclose((old * weights).sum(), 1, rtol=1e-5)
    assert report["pairs"] == 729 and report["eta"] == 1.0 and 1 < report["ess"] < 729


def logps(n=200, spread=8.0):
    random = np.random.default_rng(1)
    sft = [-40 + 5 * random.normal(size=n) for _ in range(2)]
    return columns(*(s + spread * random.normal(size=n) for s in sft)), columns(*sft)


@pytest.mark.parametrize("target", [0.05, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_ess_meets_its_target(target, alpha):
    policy, sft = logps()
    weights, report = weights_of(policy, sft, WeightsConfig(alpha=alpha, eta="ess", ess_target=target))
    share = np.square(weights.astype(np.float64).sum()) / np.square(weights.astype(np.float64)).sum() / len(weights)
    assert report["ess_fraction"] == pytest.approx(share, rel=1e-4)
    # The largest exponent that keeps it; 1 keeps even more where the ratio is bounded (α > 0).
    assert share == pytest.approx(target, rel=0.01) or (report["eta"] == 1.0 and share >= target)


def test_eta_0_gives_exactly_ones():
    for normalize in ("none", "mean"):
        weights, report = weights_of(*logps(), WeightsConfig(alpha=0.1, eta=0.0, normalize=normalize))
        assert weights.dtype == np.float32 and (weights == 1).all() and report["ess_fraction"] == 1


def test_mean_normalisation_changes_the_scale_alone():
    policy, sft = logps()
    plain, _ = weights_of(policy, sft, WeightsConfig(alpha=0.0, eta=0.05))
    scaled, report = weights_of(policy, sft, WeightsConfig(alpha=0.0, eta=0.05, normalize="mean"))
    np.testing.assert_allclose(scaled, plain / plain.mean(), rtol=1e-4)
    assert report["mean"] == pytest.approx(1, rel=1e-4)


# (policy chosen, sft chosen, policy rejected, sft rejected) → the public formula's weight and the exact one, at α = .1 and η = .001.
PUBLIC = [
    ((-60, -60, -60, -60), 1.000, 1.000),
    ((-100, -110, -100, -110), 0.966, 1.0046),
    ((-120, -100, -120, -100), 0.929, 0.961),
    ((-200, -150, -180, -150), 0.807, 0.923),
    ((-300, -120, -300, -120), 0.648, 0.698),
]


@pytest.mark.parametrize(("values", "public", "exact"), PUBLIC)
def test_reference_compat_is_the_public_code_and_the_default_is_exact(values, public, exact):
    policy, sft = columns([values[0]], [values[2]]), columns([values[1]], [values[3]])
    ours, _ = weights_of(policy, sft, WeightsConfig())
    theirs, _ = weights_of(policy, sft, WeightsConfig(reference_compat=True))
    assert ours[0] == pytest.approx(exact, abs=6e-4) and theirs[0] == pytest.approx(public, abs=6e-4)
    by_hand = [np.float64(p) - np.logaddexp(np.log(0.1) + p, np.log(0.9) + s) for p, s in ((values[0], values[1]), (values[2], values[3]))]
    assert ours[0] == pytest.approx(np.exp(0.001 * sum(by_hand)), rel=1e-6)
