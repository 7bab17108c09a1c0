import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import token_stats

from jaxrlhf.losses import dpo_loss, wpo_weights
from jaxrlhf.losses.dpo import log_ratios
from jaxrlhf.losses.wpo import wpo_pair_loss
from jaxrlhf.types import TokenStats


def stats(logp, log_sum_sq):
    logp = jnp.asarray(logp, jnp.float32)
    return TokenStats(logp, jnp.zeros_like(logp), jnp.asarray(log_sum_sq, jnp.float32))


def test_by_hand_the_mean_is_over_tokens():
    mask = jnp.array([[True, True, False]])
    # alignments −0.5 and −1.5, mean −1 ; the other side −0.25 over a single token
    chosen = stats([[-1.5, -2.5, jnp.nan]], [[-1.0, -1.0, jnp.inf]])
    rejected = stats([[-1.0, 9.0, 9.0]], [[-0.75, 0.0, 0.0]])
    weight = wpo_weights(chosen, mask, rejected, jnp.array([[True, False, False]]))
    assert float(weight[0]) == pytest.approx(math.exp(-1.25), rel=1e-6)


def test_clip():
    mask, likely = jnp.ones((1, 1), bool), stats([[-0.1]], [[-1.1]])
    assert wpo_weights(likely, mask, likely, mask)[0] == 1
    assert float(wpo_weights(likely, mask, likely, mask, clip=None)[0]) == pytest.approx(math.exp(2), rel=1e-6)
    assert float(wpo_weights(likely, mask, likely, mask, clip=1.5)[0]) == pytest.approx(1.5)


def test_the_weights_themselves_carry_no_gradient():
    mask = jnp.ones((1, 2), bool)

    def weight(logp):
        side = TokenStats(logp, logp, -jnp.ones_like(logp))
        return jnp.sum(wpo_weights(side, mask, side, mask, clip=None))

    value, gradient = jax.value_and_grad(weight)(jnp.array([[-2.0, -3.0]]))
    assert value > 0 and bool(jnp.all(gradient == 0))


def test_a_uniform_policy_weighs_one():
    uniform = token_stats(jnp.zeros((2, 3, 7)), jnp.zeros((2, 3), jnp.int32))
    mask = jnp.ones((2, 3), bool)
    np.testing.assert_allclose(wpo_weights(uniform, mask, uniform, mask, clip=None), [1, 1], rtol=1e-5)


def test_an_empty_response_is_neutral():
    nothing, rubbish = jnp.zeros((1, 2), bool), stats([[jnp.nan, jnp.nan]], [[jnp.nan, jnp.inf]])
    assert wpo_weights(rubbish, nothing, rubbish, nothing)[0] == 1


def test_weights_against_torch(golden):
    """Pairs on both sides of the clamp. The losses under these weights are compared in test_dpo.py."""
    data = golden("preference_losses")
    inputs = {key: [jnp.array(side) for side in data["inputs"][key]] for key in ("logits", "tokens", "masks")}
    sides = [token_stats(inputs["logits"][i], inputs["tokens"][i]) for i in range(2)]
    for clip, name in ((1.0, "wpo_clipped"), (None, "wpo_free")):
        weights = wpo_weights(sides[0], inputs["masks"][0], sides[1], inputs["masks"][1], clip=clip)
        np.testing.assert_allclose(weights, data["stats"][name], rtol=1e-5)
    assert max(data["stats"]["wpo_free"]) > 1 == max(data["stats"]["wpo_clipped"]) and min(data["stats"]["wpo_clipped"]) < 1


def test_a_sum_and_an_unaligned_weight_are_other_weights():
    """What the three public implementations agree on, and what a fourth leaves out: the mean over tokens, and log Σ_v π(v)²."""
    logits = jnp.array([[[2.0, 0.0, -1.0], [0.5, 0.2, 0.0], [1.0, 1.0, -2.0]]])
    side, mask = token_stats(logits, jnp.array([[0, 1, 2]])), jnp.ones((1, 3), bool)
    logp, adjust = side.logp_BT[0], side.log_sum_sq_BT[0]
    np.testing.assert_allclose(adjust, jnp.log(jnp.sum(jax.nn.softmax(logits[0]) ** 2, -1)), rtol=1e-5)
    weight = float(wpo_weights(side, mask, side, mask, clip=None)[0])
    assert weight == pytest.approx(float(jnp.exp(2 * jnp.mean(logp - adjust))), rel=1e-5)
    for other in (jnp.exp(2 * jnp.sum(logp - adjust)), jnp.exp(2 * jnp.mean(logp)), jnp.exp(2 * jnp.sum(logp))):
        assert abs(float(other) - weight) > 0.05


def test_pair_loss_multiplies_both_kinds_of_weights(pairs):
    outputs, batch = pairs
    weights = wpo_weights(outputs.chosen_stats, batch.chosen_mask_BT, outputs.rejected_stats, batch.rejected_mask_BT)
    chosen, rejected = log_ratios(outputs, batch)
    expected = dpo_loss(chosen[:4], rejected[:4], (weights * batch.weights_B)[:4], beta=0.2)
    value, metrics = wpo_pair_loss(outputs, batch, beta=0.2)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for name, ratio in (("chosen", chosen), ("rejected", rejected)):
        assert float(metrics[name]) == pytest.approx(0.2 * float(jnp.mean(ratio[:4])), rel=1e-5)
    assert float(metrics["wpo_weight"]) == pytest.approx(float(jnp.mean(weights[:4])), rel=1e-6)


def test_token_statistics_are_required(pairs):
    outputs, batch = pairs
    with pytest.raises(ValueError, match="token statistics"):
        wpo_pair_loss(dataclasses.replace(outputs, rejected_stats=None), batch)
