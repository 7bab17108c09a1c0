import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.losses import adaptive_kl, gae, kl_estimate, shaped_rewards, value_mask

MASK = jnp.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)


def test_estimators_by_hand():
    logp, reference = jnp.array([[math.log(0.5)]]), jnp.array([[math.log(0.25)]])
    d = math.log(2)
    for estimator, expected in (("k1", d), ("k2", d * d / 2), ("k3", 0.5 - 1 + d)):
        assert float(kl_estimate(logp, reference, estimator=estimator)[0, 0]) == pytest.approx(expected, rel=1e-5)
        assert kl_estimate(logp, logp, estimator=estimator)[0, 0] == 0
    with pytest.raises(ValueError, match="'k4' is not one of"):
        inspect.unwrap(kl_estimate)(logp, reference, estimator="k4")


def test_k1_and_k3_are_unbiased_and_k3_and_k2_are_never_negative():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    exact = float(np.sum(p * np.log(p / q)))
    logp, reference = jnp.log(jnp.asarray(p))[None], jnp.log(jnp.asarray(q))[None]
    values = {name: np.asarray(kl_estimate(logp, reference, estimator=name))[0] for name in ("k1", "k2", "k3")}
    assert np.sum(p * values["k1"]) == pytest.approx(exact, rel=1e-5)
    assert np.sum(p * values["k3"]) == pytest.approx(exact, rel=1e-5)
    assert np.all(values["k2"] >= 0) and np.all(values["k3"] >= 0) and np.any(values["k1"] < 0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_mask_keeps_padding_out_of_value_and_gradient(estimator):
    logp, reference = jnp.array([[-1.0, jnp.nan, -jnp.inf]]), jnp.array([[-2.0, -1.0, -jnp.inf]])
    mask = jnp.array([[True, False, False]])
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(kl_estimate(x, reference, estimator=estimator, mask=mask)))(logp)
    assert bool(jnp.isfinite(value)) and bool(jnp.all(jnp.isfinite(gradient))) and bool(jnp.all(gradient[0, 1:] == 0))


def test_where_the_score_lands():
    scores, nothing = jnp.array([1.5, -2.25, 0.75, 9.0]), jnp.zeros((4, 4))
    after = shaped_rewards(scores, nothing, MASK, kl_coef=0.1)
    np.testing.assert_array_equal(after, [[0, 0, 1.5, 0], [0, 0, 0, -2.25], [0, 0, 0, 0.75], [0, 0, 0, 0]])
    at = shaped_rewards(scores, nothing, MASK, kl_coef=0.1, placement="at_eos")
    np.testing.assert_array_equal(at, [[0, 1.5, 0, 0], [0, 0, -2.25, 0], [0, 0, 0, 0.75], [0, 0, 0, 0]])
    for placed, placement in ((after, "after_eos"), (at, "at_eos")):
        assert bool(jnp.all((placed == 0) | value_mask(MASK, placement)))  # GAE will see it


def test_the_penalty_covers_the_response_and_nothing_else():
    kl = jnp.where(MASK, 2.0, jnp.nan)
    rewards = shaped_rewards(jnp.zeros(4), kl, MASK, kl_coef=0.5)
    np.testing.assert_array_equal(rewards, jnp.where(MASK, -1.0, 0.0))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16, jnp.float32])
def test_rewards_are_floats_whatever_comes_in(dtype):
    rewards = shaped_rewards(jnp.array([3, 1, 2, 0], dtype), jnp.ones((4, 4), dtype), MASK, kl_coef=0.25)
    assert rewards.dtype == jnp.float32
    np.testing.assert_array_equal(rewards[0], [-0.25, -0.25, 3.0, 0.0])
    fractional = shaped_rewards(jnp.array([0.75, 0, 0, 0]), jnp.zeros((4, 4), jnp.int32), MASK, kl_coef=1)
    assert fractional[0, 2] == 0.75


@pytest.mark.parametrize("placement", ["after_eos", "at_eos"])
def test_undiscounted_return_is_the_score_minus_the_penalty(placement):
    rng = np.random.default_rng(0)
    scores, kl = rng.normal(size=4).astype(np.float32), rng.normal(size=(4, 4)).astype(np.float32)
    rewards = shaped_rewards(scores, kl, MASK, kl_coef=0.3, placement=placement)
    _, returns = gae(rewards, jnp.zeros((4, 4)), value_mask(MASK, placement), gamma=1.0, lam=1.0)
    expected = scores - 0.3 * np.sum(np.where(MASK, kl, 0), axis=1)
    np.testing.assert_allclose(returns[:3, 0], expected[:3], rtol=1e-5, atol=1e-6)


def test_padding_more_changes_nothing_but_the_room_after_eos():
    scores, kl = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.ones((4, 4))
    short = shaped_rewards(scores, kl, MASK, kl_coef=0.1)
    longer = shaped_rewards(scores, jnp.pad(kl, ((0, 0), (0, 2))), jnp.pad(MASK, ((0, 0), (0, 2))), kl_coef=0.1)
    np.testing.assert_array_equal(longer[:2, :4], short[:2])
    assert float(longer[2, 4]) == 3.0  # now there is room after the last token


def test_adaptive_coefficient():
    assert float(adaptive_kl(0.2, 6.0, target=6, horizon=10000, steps=256)) == pytest.approx(0.2)
    assert float(adaptive_kl(0.2, 6.6, target=6, horizon=10000, steps=1000)) == pytest.approx(0.2 * 1.01)
    assert float(adaptive_kl(0.2, 600.0, target=6, horizon=10000, steps=1000)) == pytest.approx(0.2 * 1.02)
    assert float(adaptive_kl(0.2, 0.0, target=6, horizon=10000, steps=1000)) == pytest.approx(0.2 * 0.98)
    traced = jax.jit(lambda coef, kl: adaptive_kl(coef, kl, target=6, horizon=100, steps=10))(jnp.float32(0.1), jnp.float32(9))
    assert float(traced) == pytest.approx(0.1 * 1.02)
    assert float(adaptive_kl(0.2, 0.55, target=0.5, horizon=1, steps=1)) == pytest.approx(0.2 * 1.1)
    for target, horizon in ((0, 10), (10, 0)):
        with pytest.raises(ValueError, match=f"target {target} and horizon {horizon} must be above 0"):
            adaptive_kl(0.1, 1.0, target=target, horizon=horizon, steps=1)


def test_against_torch(golden):
    data = golden("ppo_losses")
    inputs = {k: jnp.array(v) for k, v in data["inputs"].items()}
    kl = kl_estimate(inputs["old_logp"], inputs["reference_logp"])
    rewards = shaped_rewards(inputs["scores"], kl, inputs["mask"], kl_coef=data["settings"]["kl_coef"])
    np.testing.assert_allclose(rewards, data["expected"]["rewards"], rtol=1e-5, atol=1e-6)
