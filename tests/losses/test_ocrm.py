"""OCRM's weights: exact where the mathematics is exact, equal to the published code where it is asked to be."""

import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import response_mask, token_logp

from jaxrlhf.losses import (
    effective_sample_size,
    eta_for_ess,
    importance_weights,
    relative_log_ratio,
    sequence_logp,
    weight_summary,
)

ETA_FOR_ESS = jax.jit(eta_for_ess)


# A language model small enough to enumerate: vocabulary 4, length 3, EOS = PAD = 3.
EOS, LENGTH = 3, 3


def all_responses():
    """Each response once: tokens up to EOS, then padding (which is EOS too)."""
    rows = set()
    for row in itertools.product(range(4), repeat=LENGTH):
        end = row.index(EOS) + 1 if EOS in row else LENGTH
        rows.add(row[:end] + (EOS,) * (LENGTH - end))
    return np.array(sorted(rows))


def log_probabilities(responses, seed):
    """Sequence log-probs under a random table of logits for every prefix."""
    rng = np.random.default_rng(seed)
    table = {}
    logits = np.empty((*responses.shape, 4))
    for b, row in enumerate(responses):
        for t in range(LENGTH):
            logits[b, t] = table.setdefault(tuple(row[:t]), 1.5 * rng.normal(size=4))
    return sequence_logp(token_logp(jnp.asarray(logits), responses), response_mask(responses, (EOS,)))


@pytest.fixture
def toy():
    with jax.enable_x64(True):
        responses = all_responses()
        rng = np.random.default_rng(7)
        yield log_probabilities(responses, 1), log_probabilities(responses, 2), jnp.asarray(rng.normal(size=len(responses)))


def test_the_toy_model_is_a_distribution(toy):
    policy, sft, _ = toy
    assert policy.shape == (1 + 3 + 9 * 4,)
    assert float(jnp.sum(jnp.exp(policy))) == pytest.approx(1, abs=1e-12)
    assert float(jnp.sum(jnp.exp(sft))) == pytest.approx(1, abs=1e-12)


def pair_expectations(policy, sft, score, **weighting):
    """E_π[l] and E_SFT[w l] by summing over all ordered pairs; the label is deterministic, the loss Bradley–Terry's."""
    first, second = (index.ravel() for index in np.indices((len(policy), len(policy))))
    prefers_first = np.cos(5 * first) > np.cos(5 * second)
    chosen, rejected = np.where(prefers_first, first, second), np.where(prefers_first, second, first)
    loss = jax.nn.softplus(score[rejected] - score[chosen])
    ratio = relative_log_ratio(policy, sft, alpha=weighting.pop("alpha"))
    weights = importance_weights(ratio[chosen], ratio[rejected], **weighting)
    on_policy = jnp.sum(jnp.exp(policy[first] + policy[second]) * loss)
    weighted = jnp.sum(jnp.exp(sft[first] + sft[second]) * weights * loss)
    unweighted = jnp.sum(jnp.exp(sft[first] + sft[second]) * loss)
    return float(on_policy), float(weighted), float(unweighted)


def test_weighted_offline_risk_is_the_on_policy_risk(toy):
    on_policy, weighted, unweighted = pair_expectations(*toy, alpha=0.0, eta=1.0)
    assert weighted == pytest.approx(on_policy, rel=1e-12)
    assert abs(unweighted - on_policy) > 0.01 * on_policy  # the correction had something to correct


def test_flattened_or_relative_weights_are_biased(toy):
    for alpha, eta in [(0.0, 0.5), (0.1, 1.0)]:
        on_policy, weighted, _ = pair_expectations(*toy, alpha=alpha, eta=eta)
        assert abs(weighted - on_policy) > 1e-3 * on_policy


def test_the_relative_ratio_is_exact_against_the_mixture(toy):
    policy, sft, score = toy
    mixture = 0.3 * jnp.exp(policy) + 0.7 * jnp.exp(sft)
    ratio = jnp.exp(relative_log_ratio(policy, sft, alpha=0.3))
    assert float(jnp.sum(mixture * ratio * score)) == pytest.approx(float(jnp.sum(jnp.exp(policy) * score)), abs=1e-12)


def test_exact_where_float32_exponentials_vanish():
    policy, reference = jnp.array([-300.0, -310.0, -300.0]), jnp.array([-310.0, -300.0, -300.0])
    assert bool(jnp.all(jnp.exp(policy) == 0))
    expected = [-math.log(0.1 + 0.9 * math.exp(-10)), -10 - math.log(0.1 * math.exp(-10) + 0.9), 0.0]
    np.testing.assert_allclose(relative_log_ratio(policy, reference, alpha=0.1), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(relative_log_ratio(policy, reference, alpha=0), [10.0, -10.0, 0.0])


def test_limits_of_the_ratio():
    impossible = relative_log_ratio(jnp.array([-jnp.inf, -5.0]), jnp.array([-5.0, -jnp.inf]), alpha=0.1)
    assert impossible[0] == -jnp.inf and float(impossible[1]) == pytest.approx(math.log(10))
    weights = importance_weights(impossible, jnp.zeros(2), eta=0.0)
    np.testing.assert_array_equal(weights, [1.0, 1.0])
    assert importance_weights(impossible, jnp.zeros(2), eta=1.0)[0] == 0
    for alpha in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"alpha {alpha} must lie in \[0, 1\)"):
            relative_log_ratio(jnp.zeros(1), jnp.zeros(1), alpha=alpha)


@settings(max_examples=50, deadline=None)
@given(st.floats(-2000, 0), st.floats(-2000, 0), st.floats(0.01, 0.99))
def test_the_relative_ratio_is_bounded_and_monotone(policy, reference, alpha):
    value = float(relative_log_ratio(jnp.array([policy]), jnp.array([reference]), alpha=alpha)[0])
    assert value <= math.log(1 / alpha) + 1e-5
    assert value >= min(policy - reference, 0) - math.log(2) - 1e-3


def test_published_table_and_published_code(golden):
    # (L_π, L_SFT): published float32 result, exact result
    table = {
        (-80.0, -95.0): (1.86, 2.303), (-110.0, -120.0): (-27.1, 2.302), (-110.0, -100.0): (-27.1, -9.895),
        (-150.0, -160.0): (-67.1, 2.302), (-40.0, -45.0): (2.244, 2.244),
    }  # fmt: skip
    policy, reference = (jnp.array(x) for x in zip(*table, strict=True))
    published, exact = zip(*table.values(), strict=True)
    np.testing.assert_allclose(relative_log_ratio(policy, reference, alpha=0.1, floor=1e-36), published, atol=0.05)
    np.testing.assert_allclose(relative_log_ratio(policy, reference, alpha=0.1), exact, atol=6e-4)

    data = golden("ocrm_weights")
    policy, reference = jnp.array(data["policy"]), jnp.array(data["reference"])
    compat = relative_log_ratio(policy, reference, alpha=data["alpha"], floor=data["floor"])
    np.testing.assert_allclose(compat, data["published"], rtol=1e-5, atol=1e-5)
    ours = relative_log_ratio(policy, reference, alpha=data["alpha"])
    np.testing.assert_allclose(ours, data["exact"], rtol=1e-5, atol=1e-5)
    plain = relative_log_ratio(policy, reference, alpha=0)
    for ratio, name in ((compat, "weights_published"), (ours, "weights_exact"), (plain, "weights_plain")):
        np.testing.assert_allclose(importance_weights(ratio, ratio[::-1], eta=data["eta"]), data[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("policy", "reference", "published", "exact"),
    [
        ((-60, -60), (-60, -60), 1.000, 1.000),
        ((-100, -100), (-110, -110), 0.966, 1.0046),
        ((-120, -120), (-100, -100), 0.929, 0.961),
        ((-200, -180), (-150, -150), 0.807, 0.923),
        ((-300, -300), (-120, -120), 0.648, 0.698),
    ],
)
def test_weights_of_pairs_at_the_published_settings(policy, reference, published, exact):
    policy, reference = (jnp.array(x, jnp.float32)[:, None] for x in (policy, reference))
    for floor, expected in ((1e-36, published), (None, exact)):
        sides = [relative_log_ratio(p, r, alpha=0.1, floor=floor) for p, r in zip(policy, reference, strict=True)]
        assert float(importance_weights(*sides, eta=0.001)[0]) == pytest.approx(expected, abs=6e-4)


def test_which_response_was_chosen_does_not_matter():
    a, b = jnp.array([0.5, -1.0]), jnp.array([2.0, 0.1])
    np.testing.assert_array_equal(importance_weights(a, b, eta=0.3), importance_weights(b, a, eta=0.3))


def test_mean_normalisation_is_over_the_array_and_survives_overflow():
    chosen, rejected = jnp.array([200.0, 199.0, 0.0]), jnp.array([0.0, 0.0, 0.0])
    assert bool(jnp.isinf(importance_weights(chosen, rejected, eta=1.0)[0]))
    weights = importance_weights(chosen, rejected, eta=1.0, normalize="mean")
    np.testing.assert_allclose(weights, 3 * np.array([1, math.exp(-1), 0]) / (1 + math.exp(-1)), rtol=1e-6)
    small = importance_weights(chosen / 100, rejected, eta=0.5, normalize="mean")
    raw = importance_weights(chosen / 100, rejected, eta=0.5)
    np.testing.assert_allclose(small, raw / jnp.mean(raw), rtol=1e-6)
    with pytest.raises(ValueError, match="'sum' is not one of"):
        inspect.unwrap(importance_weights)(chosen, rejected, eta=1.0, normalize="sum")


def test_weights_carry_no_gradient():
    for normalize in ("none", "mean"):
        gradient = jax.grad(lambda r, n=normalize: jnp.sum(importance_weights(r, r, eta=1.0, normalize=n) ** 2))(jnp.arange(3.0))
        assert bool(jnp.all(gradient == 0))


def test_effective_sample_size_by_hand():
    assert effective_sample_size(jnp.ones(7)) == pytest.approx(7)
    assert effective_sample_size(jnp.array([1.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_sample_size(jnp.array([1.0, 3.0])) == pytest.approx(16 / 10)
    for scale in (1e30, 1e-30):  # whose squares no float32 holds
        assert effective_sample_size(scale * jnp.array([1.0, 3.0])) == pytest.approx(16 / 10)
    assert effective_sample_size(jnp.zeros(3)) == 0


def test_eta_meets_its_target_over_many_random_instances():
    rng = np.random.default_rng(0)
    at_one = 0
    for case in range(200):
        scale = 10 ** rng.uniform(-2, 3)
        kind = case % 3
        draw = rng.normal if kind == 0 else rng.standard_cauchy if kind == 1 else rng.exponential
        chosen, rejected = (jnp.asarray(scale * draw(size=64), jnp.float32) for _ in range(2))
        target = rng.uniform(0.05, 0.95)
        eta = float(ETA_FOR_ESS(chosen, rejected, target=target))
        assert 0 < eta <= 1
        weights = importance_weights(chosen, rejected, eta=eta, normalize="mean")
        reached = float(effective_sample_size(weights)) / 64
        assert reached >= target * 0.999
        if eta == 1:
            at_one += 1
        else:
            assert reached == pytest.approx(target, rel=0.01)
    assert 10 < at_one < 190  # both outcomes were tried


def test_eta_at_the_edges():
    same = jnp.zeros(5)
    assert ETA_FOR_ESS(same, same, target=1.0) == 1
    assert float(ETA_FOR_ESS(jnp.arange(5.0), same, target=1.0)) < 1e-3
    # a pair the policy cannot produce costs its share at any η > 0
    forbidden = jnp.array([0.0, 0.0, 0.0, 0.0, -jnp.inf])
    assert ETA_FOR_ESS(forbidden, same, target=0.8) == 1
    assert float(ETA_FOR_ESS(forbidden, same, target=0.9)) == 0
    assert eta_for_ess(same, same, target=1) == eta_for_ess(same + 90, same, target=1) == 1  # also where exp overflows
    for target in (1.5, 0):
        with pytest.raises(ValueError, match=rf"target {target} must lie in \(0, 1\]"):
            eta_for_ess(same, same, target=target)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 0.9), st.floats(0.01, 0.1))
def test_ess_falls_as_eta_rises(seed, eta, step):
    ratio = jnp.asarray(np.random.default_rng(seed).normal(size=64) * 3, jnp.float32)
    sizes = [float(effective_sample_size(importance_weights(ratio, ratio, eta=e))) for e in (eta, eta + step)]
    assert sizes[1] <= sizes[0] * (1 + 1e-5)


def test_weight_summary_by_hand():
    summary = weight_summary(jnp.array([0.0, 1.0, 2.0, 3.0, 4.0]))
    expected = {
        "ess": 100 / 30,
        "ess_fraction": 20 / 30,
        "mean": 2,
        "min": 0,
        "max": 4,
        "largest_share": 0.4,
        "q01": 0.04,
        "q05": 0.2,
        "q25": 1,
        "q50": 2,
        "q75": 3,
        "q95": 3.8,
        "q99": 3.96,
    }
    assert {name: float(value) for name, value in summary.items()} == pytest.approx(expected, rel=1e-5)
    assert float(weight_summary(jnp.array([0.1, 0.3]))["largest_share"]) == pytest.approx(0.75)  # also where they sum to less than 1
    assert weight_summary(jnp.zeros(2))["largest_share"] == 0
