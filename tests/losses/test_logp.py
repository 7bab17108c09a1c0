import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import token_logp, token_stats

from jaxrlhf.losses import sequence_logp

RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(2, 4, 5))).astype(np.float32)
TOKENS = RNG.integers(0, 5, (2, 4))


def loop(logits, temperature):
    """log π, entropy and log Σπ² of one position, the slow way and in float64."""
    exps = [math.exp(float(z) / temperature) for z in logits]
    probs = [e / sum(exps) for e in exps]
    return [math.log(p) for p in probs], -sum(p * math.log(p) for p in probs), math.log(sum(p * p for p in probs))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2])
def test_against_a_loop(temperature):
    stats = token_stats(LOGITS, TOKENS, temperature=temperature)
    for b in range(2):
        for t in range(4):
            logps, entropy, sum_sq = loop(LOGITS[b, t], temperature)
            assert float(stats.logp_BT[b, t]) == pytest.approx(logps[TOKENS[b, t]], rel=1e-5, abs=1e-5)
            assert float(stats.entropy_BT[b, t]) == pytest.approx(entropy, rel=1e-5, abs=1e-5)
            assert float(stats.log_sum_sq_BT[b, t]) == pytest.approx(sum_sq, rel=1e-5, abs=1e-5)
    np.testing.assert_array_equal(token_logp(LOGITS, TOKENS, temperature=temperature), stats.logp_BT)


def test_the_temperature_is_1_unless_given():
    np.testing.assert_array_equal(token_logp(LOGITS, TOKENS), token_logp(LOGITS, TOKENS, temperature=1.0))


def test_uniform_logits_by_hand():
    stats = token_stats(jnp.full((1, 1, 8), 3.0), jnp.zeros((1, 1), jnp.int32), temperature=0.5)
    assert float(stats.logp_BT[0, 0]) == pytest.approx(-math.log(8))
    assert float(stats.entropy_BT[0, 0]) == pytest.approx(math.log(8))
    assert float(stats.log_sum_sq_BT[0, 0]) == pytest.approx(-math.log(8))


def test_half_precision_logits_are_scored_in_float32():
    half = jnp.asarray(LOGITS, jnp.bfloat16)
    logp = token_logp(half, TOKENS, temperature=0.9)
    assert logp.dtype == jnp.float32
    np.testing.assert_array_equal(logp, token_logp(half.astype(jnp.float32), TOKENS, temperature=0.9))


def test_forbidden_tokens_have_finite_entropy_and_gradients():
    logits = jnp.asarray(LOGITS).at[..., 4].set(-jnp.inf)
    tokens = jnp.minimum(TOKENS, 3)
    stats = token_stats(logits, tokens)
    np.testing.assert_allclose(stats.entropy_BT, token_stats(logits[..., :4], tokens).entropy_BT, rtol=1e-5)
    np.testing.assert_allclose(stats.log_sum_sq_BT, token_stats(logits[..., :4], tokens).log_sum_sq_BT, rtol=1e-5, atol=1e-6)

    def everything(logits):
        s = token_stats(logits, tokens)
        return jnp.sum(s.logp_BT + s.entropy_BT + s.log_sum_sq_BT)

    assert bool(jnp.all(jnp.isfinite(jax.grad(everything)(logits))))


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature 0 must be above 0"):
        token_logp(LOGITS, TOKENS, temperature=0)


def test_sequence_logp_is_a_sum_that_padding_does_not_reach():
    logp = jnp.array([[-1.0, -2.0, jnp.nan], [-0.5, -jnp.inf, jnp.inf]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    np.testing.assert_array_equal(sequence_logp(logp, mask), [-3.0, -0.5])
    gradient = jax.grad(lambda x: jnp.sum(sequence_logp(x, mask)))(logp)
    np.testing.assert_array_equal(gradient, mask)


def test_against_torch(golden):
    data = golden("preference_losses")
    for side in range(2):
        logits, tokens = jnp.array(data["inputs"]["logits"][side]), jnp.array(data["inputs"]["tokens"][side])
        stats = token_stats(logits, tokens)
        np.testing.assert_allclose(stats.logp_BT, data["stats"]["logp"][side], rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(stats.entropy_BT, data["stats"]["entropy"][side], rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(stats.log_sum_sq_BT, data["stats"]["log_sum_sq"][side], rtol=1e-5, atol=2e-6)
        sequence = sequence_logp(stats.logp_BT, jnp.array(data["inputs"]["masks"][side]))
        np.testing.assert_allclose(sequence, data["stats"]["sequence_logp"][side], rtol=1e-5)
