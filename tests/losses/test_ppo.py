import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.losses import ppo_policy_loss, ppo_policy_stats, ppo_value_loss, ppo_value_stats
from jaxrlhf.losses.ppo import ppo_rollout_loss

ONE = jnp.ones((1, 1), bool)


def one(ratio, advantage, **options):
    value, gradient = jax.value_and_grad(ppo_policy_loss)(
        jnp.array([[math.log(ratio)]]), jnp.zeros((1, 1)), jnp.array([[advantage]]), ONE, **{"clip": 0.2, **options}
    )
    return float(value), float(gradient[0, 0])


def test_policy_loss_by_hand():
    assert one(1.0, 2.0) == pytest.approx((-2.0, -2.0))
    assert one(1.5, 2.0) == pytest.approx((-2.4, 0.0))  # clipped at 1.2, no push
    assert one(0.5, 2.0) == pytest.approx((-1.0, -1.0))  # below the clip, still pulled up
    assert one(0.5, -2.0) == pytest.approx((1.6, 0.0))
    assert one(1.5, -2.0) == pytest.approx((3.0, 3.0))
    assert one(1.5, 2.0, clip_high=0.4) == pytest.approx((-2.8, 0.0))
    assert one(0.7, -2.0, clip_high=0.4) == pytest.approx((1.6, 0.0))  # the lower edge is still `clip`
    assert one(9.0, -2.0) == pytest.approx((18.0, 18.0))
    assert one(9.0, -2.0, dual_clip=3) == pytest.approx((6.0, 0.0))
    assert one(2.0, -2.0, dual_clip=3) == pytest.approx((4.0, 4.0))
    assert one(9.0, 2.0, dual_clip=3) == pytest.approx((-2.4, 0.0))  # positive advantages are left alone
    with pytest.raises(ValueError, match=r"dual_clip 1.0 must be above 1"):
        one(1.0, 1.0, dual_clip=1.0)


def loop_policy(logp, old, advantages, mask, low, high, dual):
    losses, clipped, kls, ratios = [], [], [], []
    for x, o, a, m in zip(logp.ravel(), old.ravel(), advantages.ravel(), mask.ravel(), strict=True):
        if m:
            ratio = math.exp(x - o)
            plain, bounded = -a * ratio, -a * min(max(ratio, 1 - low), 1 + high)
            loss = max(plain, bounded)
            losses.append(min(loss, -a * dual) if dual and a < 0 else loss)
            clipped.append(bounded > plain)
            kls.append(0.5 * (x - o) ** 2)
            ratios.append(ratio)
    mean = np.mean
    return mean(losses), {"clipfrac": mean(clipped), "approxkl": mean(kls), "ratio": mean(ratios)}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 1.5, 3.0]))
def test_policy_loss_against_a_loop_with_rubbish_outside_the_mask(seed, dual):
    rng = np.random.default_rng(seed)
    logp, old, advantages = rng.normal(size=(3, 3, 4))
    mask = np.arange(4) < rng.integers(1, 5, 3)[:, None]
    expected, stats = loop_policy(logp, old, advantages, mask, 0.2, 0.3, dual)
    dirty = [jnp.asarray(np.where(mask, x, rng.choice([np.nan, np.inf, -np.inf])), jnp.float32) for x in (logp, old, advantages)]
    loss, gradients = jax.value_and_grad(ppo_policy_loss, argnums=(0, 1, 2))(*dirty, mask, clip=0.2, clip_high=0.3, dual_clip=dual)
    assert float(loss) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for gradient in gradients:
        assert bool(jnp.all(jnp.isfinite(gradient))) and bool(jnp.all(gradient[~mask] == 0))
    mine = ppo_policy_stats(*dirty, mask, clip=0.2, clip_high=0.3)
    assert {k: float(v) for k, v in mine.items()} == pytest.approx(stats, rel=1e-5, abs=1e-6)


def test_a_collapsed_token_does_not_poison_the_gradient():
    for sign in (1.0, -1.0):
        loss, gradient = jax.value_and_grad(ppo_policy_loss)(
            jnp.array([[sign * 500.0]]), jnp.zeros((1, 1)), jnp.array([[1.0]]), ONE, clip=0.2
        )
        assert bool(jnp.isfinite(loss)) and bool(jnp.isfinite(gradient[0, 0]))
    stats = ppo_policy_stats(jnp.array([[500.0]]), jnp.zeros((1, 1)), jnp.ones((1, 1)), ONE, clip=0.2)
    assert stats["approxkl"] == 0.5 * 60**2  # where the log-ratio is cut


def test_the_unchanged_policy_has_the_policy_gradient():
    logp, advantages = -jnp.ones((1, 3)), jnp.array([[1.0, -2.0, 4.0]])
    mask = jnp.array([[True, True, False]])
    gradient = jax.grad(ppo_policy_loss)(logp, logp, advantages, mask, clip=0.2)
    np.testing.assert_allclose(gradient, [[-0.5, 1.0, 0.0]])
    stats = ppo_policy_stats(logp, logp, advantages, mask, clip=0.2)
    assert stats["ratio"] == 1 and stats["approxkl"] == 0 and stats["clipfrac"] == 0


def loop_value(values, old, returns, mask, clip):
    losses, clipped = [], []
    for v, o, r, m in zip(values.ravel(), old.ravel(), returns.ravel(), mask.ravel(), strict=True):
        if m:
            plain, bounded = (v - r) ** 2, (min(max(v, o - clip), o + clip) - r) ** 2
            losses.append(0.5 * max(plain, bounded))
            clipped.append(bounded > plain)
    return np.mean(losses), np.mean(clipped)


def test_value_loss_by_hand():
    def value(v, old, ret, clip):
        return float(ppo_value_loss(jnp.array([[v]]), jnp.array([[old]]), jnp.array([[ret]]), ONE, clip=clip))

    assert value(1.0, 1.0, 3.0, 0.2) == pytest.approx(2.0)
    assert value(2.0, 1.0, 3.0, 0.2) == pytest.approx(0.5 * 1.8**2)  # moved too far: the clipped error counts
    assert value(0.0, 1.0, 3.0, 0.2) == pytest.approx(4.5)  # moved the wrong way: the plain one
    assert value(2.0, 1.0, 3.0, None) == pytest.approx(0.5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_value_loss_against_a_loop_with_rubbish_outside_the_mask(seed):
    rng = np.random.default_rng(seed)
    values, old, returns = rng.normal(size=(3, 3, 4))
    mask = np.arange(4) < rng.integers(1, 5, 3)[:, None]
    expected, clipfrac = loop_value(values, old, returns, mask, 0.3)
    dirty = [jnp.asarray(np.where(mask, x, rng.choice([np.nan, np.inf])), jnp.float32) for x in (values, old, returns)]
    loss, gradient = jax.value_and_grad(ppo_value_loss)(*dirty, mask, clip=0.3)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert bool(jnp.all(jnp.isfinite(gradient))) and bool(jnp.all(gradient[~mask] == 0))
    stats = ppo_value_stats(*dirty, mask, clip=0.3)
    assert float(stats["value_clipfrac"]) == pytest.approx(clipfrac)
    assert float(stats["value_error"]) == pytest.approx(np.mean((values - returns)[mask] ** 2), rel=1e-5)
    assert float(stats["value"]) == pytest.approx(np.mean(values[mask]), rel=1e-5, abs=1e-6)
    assert float(stats["return"]) == pytest.approx(np.mean(returns[mask]), rel=1e-5, abs=1e-6)


def test_microbatches_with_the_global_total_add_up():
    arrays = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4)), jnp.float32)
    mask = jnp.arange(4) < jnp.array([[1], [4], [2]])
    for function in (ppo_policy_loss, ppo_policy_stats, ppo_value_loss, ppo_value_stats):
        whole = function(*arrays, mask, clip=0.2)
        parts = [function(*arrays[:, s], mask[s], clip=0.2, total=7) for s in (slice(0, 1), slice(1, 3))]
        summed = jax.tree.map(lambda a, b: float(a + b), *parts)
        assert summed == pytest.approx(jax.tree.map(float, whole), rel=1e-5)


def test_nothing_to_learn_from_is_zero():
    rubbish, nothing = jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool)
    for loss in (ppo_policy_loss, ppo_value_loss):
        value, gradient = jax.value_and_grad(loss)(rubbish, rubbish, rubbish, nothing, clip=0.2)
        assert value == 0 and bool(jnp.all(gradient == 0))


def test_against_torch(golden):
    data = golden("ppo_losses")
    inputs, expected = ({k: jnp.array(v) for k, v in data[part].items()} for part in ("inputs", "expected"))
    arrays = (inputs["new_logp"], inputs["old_logp"], expected["whitened_advantages"], inputs["mask"])
    loss, gradient = jax.value_and_grad(ppo_policy_loss)(*arrays, clip=data["settings"]["clip"])
    assert float(loss) == pytest.approx(float(expected["policy_loss"]), rel=1e-5)
    np.testing.assert_allclose(gradient, expected["policy_gradient"], rtol=1e-5, atol=1e-7)
    stats = ppo_policy_stats(*arrays, clip=data["settings"]["clip"])
    for name in ("approxkl", "clipfrac"):
        assert float(stats[name]) == pytest.approx(float(expected[name]), rel=1e-4)

    arrays = (inputs["new_values"], inputs["old_values"], expected["returns"], expected["value_mask"])
    loss, gradient = jax.value_and_grad(ppo_value_loss)(*arrays, clip=data["settings"]["clip_value"])
    assert float(loss) == pytest.approx(float(expected["value_loss"]), rel=1e-5)
    np.testing.assert_allclose(gradient, expected["value_gradient"], rtol=1e-5, atol=1e-7)
    stats = ppo_value_stats(*arrays, clip=data["settings"]["clip_value"])
    assert float(stats["value_clipfrac"]) == pytest.approx(float(expected["value_clipfrac"]))


def test_rollout_loss_leaves_fillers_out_and_takes_the_entropy_off(rollout):
    stats, batch = rollout
    mask = batch.mask_BT & batch.row_mask_B[:, None]
    plain = ppo_policy_loss(stats.logp_BT[:4], batch.logp_BT[:4], batch.advantages_BT[:4], batch.mask_BT[:4], clip=0.1, dual_clip=2)
    entropy = float(jnp.sum(jnp.where(mask, stats.entropy_BT, 0)) / jnp.sum(mask))
    loss, metrics = ppo_rollout_loss(stats, batch, clip=0.1, dual_clip=2)
    assert float(loss) == pytest.approx(float(plain), rel=1e-6)
    assert float(metrics["entropy"]) == pytest.approx(entropy, rel=1e-6)
    assert sorted(metrics) == ["approxkl", "clipfrac", "entropy", "ratio"]
    bonus, _ = ppo_rollout_loss(stats, batch, clip=0.1, dual_clip=2, entropy_coef=0.5)
    assert float(bonus) == pytest.approx(float(plain) - 0.5 * entropy, rel=1e-5)
    _, wider = ppo_rollout_loss(stats, batch, clip=0.1, clip_high=0.3)
    arrays = (stats.logp_BT, batch.logp_BT, batch.advantages_BT, mask)
    assert wider["clipfrac"] == ppo_policy_stats(*arrays, clip=0.1, clip_high=0.3)["clipfrac"] < metrics["clipfrac"]
