import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.losses import gae, masked_whiten, rloo_advantages, value_mask

GAE = jax.jit(gae)


def test_value_mask_by_hand():
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(value_mask(mask, "after_eos"), np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], bool))
    np.testing.assert_array_equal(value_mask(mask, "at_eos"), mask)


def test_unknown_placement():
    with pytest.raises(ValueError, match="'somewhere' is not one of"):
        inspect.unwrap(value_mask)(jnp.ones((1, 2), bool), "somewhere")


def test_by_hand():
    # γ = ½, λ = ½: δ = (1 + ½·2 − 1, 0 + ½·4 − 2, 3 − 4) = (1, 0, −1); A₂ = −1, A₁ = −¼, A₀ = 1 − 1/16
    advantages, returns = gae(jnp.array([[1.0, 0.0, 3.0]]), jnp.array([[1.0, 2.0, 4.0]]), jnp.ones((1, 3), bool), gamma=0.5, lam=0.5)
    np.testing.assert_allclose(advantages[0], [15 / 16, -1 / 4, -1])
    np.testing.assert_allclose(returns[0], [31 / 16, 7 / 4, 3])


def test_lambda_one_is_the_discounted_return_and_lambda_zero_one_step():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 2, 5)).astype(np.float32)
    full = np.ones((2, 5), bool)
    _, returns = GAE(rewards, values, full, gamma=0.9, lam=1.0)
    discounted = [[sum(0.9 ** (s - t) * rewards[b, s] for s in range(t, 5)) for t in range(5)] for b in range(2)]
    np.testing.assert_allclose(returns, discounted, rtol=1e-5, atol=1e-6)
    advantages, _ = GAE(rewards, values, full, gamma=0.9, lam=0.0)
    np.testing.assert_allclose(advantages, rewards + 0.9 * np.pad(values[:, 1:], ((0, 0), (0, 1))) - values, rtol=1e-5, atol=1e-6)


def loop(rewards, values, mask, gamma, lam):
    """Row by row over the masked positions only: what is outside does not exist."""
    advantages = np.zeros_like(rewards)
    for b in range(len(rewards)):
        following_value = following_advantage = 0.0
        for t in reversed(range(int(mask[b].sum()))):
            delta = rewards[b, t] + gamma * following_value - values[b, t]
            following_advantage = delta + gamma * lam * following_advantage
            following_value = values[b, t]
            advantages[b, t] = following_advantage
    return advantages, np.where(mask, advantages + values, 0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_against_a_loop_with_rubbish_outside_the_mask(seed, gamma, lam):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, 4, 5)).astype(np.float32)
    mask = np.arange(5) < rng.integers(0, 6, 4)[:, None]
    expected = loop(rewards, values, mask, gamma, lam)
    dirty = [np.where(mask, x, rng.choice([np.nan, np.inf, 1e30])).astype(np.float32) for x in (rewards, values)]
    for mine, theirs in zip(GAE(*dirty, mask, gamma=gamma, lam=lam), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_integer_rewards_and_gradients_stay_finite():
    mask = jnp.array([[True, True, False]])
    advantages, _ = gae(jnp.array([[0, 1, 9]]), jnp.zeros((1, 3)), mask, gamma=1, lam=0.5)
    np.testing.assert_allclose(advantages, [[0.5, 1.0, 0.0]])
    gradient = jax.grad(lambda v: jnp.sum(gae(v, v, mask, gamma=0.9, lam=0.5)[0]))(jnp.array([[1.0, 2.0, jnp.nan]]))
    assert bool(jnp.all(jnp.isfinite(gradient)))


def test_against_torch(golden):
    data = golden("ppo_losses")
    inputs, expected = ({k: jnp.array(v) for k, v in data[part].items()} for part in ("inputs", "expected"))
    mask = value_mask(inputs["mask"], "after_eos")
    np.testing.assert_array_equal(mask, expected["value_mask"])
    settings_ = {key: data["settings"][key] for key in ("gamma", "lam")}
    advantages, returns = gae(expected["rewards"], inputs["old_values"], mask, **settings_)
    np.testing.assert_allclose(advantages, expected["advantages"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, expected["returns"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masked_whiten(advantages, inputs["mask"]), expected["whitened_advantages"], rtol=1e-4, atol=1e-5)
    whitened = masked_whiten(expected["rewards"], mask, shift_mean=False)
    np.testing.assert_allclose(whitened, expected["whitened_rewards"], rtol=1e-4, atol=1e-5)


def test_leave_one_out_by_hand_and_against_a_loop():
    np.testing.assert_allclose(rloo_advantages(jnp.array([1.0, 4.0, 1.0, 5.0, 5.0, 5.0]), samples=3), [-1.5, 3, -1.5, 0, 0, 0])
    returns = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    expected = [[row[i] - np.mean(np.delete(row, i)) for i in range(4)] for row in returns]
    mine = np.asarray(rloo_advantages(returns.ravel(), samples=4)).reshape(3, 4)
    np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mine.sum(axis=1), 0, atol=1e-5)
    assert rloo_advantages(jnp.array([1, 2]), samples=2).dtype == jnp.float32
    with pytest.raises(ValueError, match="6 rows do not form groups of 4"):
        rloo_advantages(jnp.ones(6), samples=4)
    with pytest.raises(ValueError, match="groups of 1; samples must be 2 or more"):  # nothing to compare with: 0 / 0
        rloo_advantages(jnp.ones(6), samples=1)
