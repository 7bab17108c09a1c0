"""accumulate(k) is the big batch: for SFT, reward, DPO and PPO, with ragged responses and rows that only fill the batch.

In float64, where rounding cannot hide an average of averages: microbatches that hold 3, 9 and 0 tokens agree with the whole to 1e-12.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.losses import PAIR_LOSSES, POLICY_LOSSES, bind
from jaxrlhf.steps.accumulate import accumulate_gradients, shards
from jaxrlhf.steps.pair import make_pair_step
from jaxrlhf.steps.ppo import make_ppo_step, policy_part, value_part
from jaxrlhf.steps.sft import make_sft_step
from jaxrlhf.steps.state import init_state
from jaxrlhf.types import Rollout

KINDS = ("sft", "reward", "dpo", "ppo")


def sgd():
    return optax.sgd(1.0)  # the step's parameters show its gradient


def rollout_of(sampled) -> Rollout:
    """Any rollout will do: random advantages, values and old log-probs under ragged masks."""
    prompts, text = sampled()
    random = [jax.random.normal(key, text.mask_BT.shape) for key in jax.random.split(jax.random.key(5), 5)]
    noise = [jnp.where(text.mask_BT, x, 0.0) for x in random]
    return Rollout(
        prompt_BL=prompts.prompt_BL, prompt_mask_BL=prompts.prompt_mask_BL, tokens_BT=text.tokens_BT, mask_BT=text.mask_BT,
        value_mask_BT=text.mask_BT, logp_BT=noise[0] - 2.5, reference_logp_BT=noise[1] - 2.5, values_BT=noise[2],
        advantages_BT=noise[3], returns_BT=noise[4], scores_B=noise[0][:, 0], row_mask_B=prompts.row_mask_B,
    )  # fmt: skip


def taken(kind, tiny, texts, pairs, sampled, accumulate):
    """(state after one step, metrics) of a training with so many microbatches to a step."""
    how = {"accumulate": accumulate}
    if kind == "sft":
        step = make_sft_step(tiny.lm, sgd(), **how)
        return jax.jit(step)(init_state(tiny.policy, sgd()), texts())
    if kind == "ppo":
        parts = (
            policy_part(tiny.lm, bind(POLICY_LOSSES["ppo"], clip=0.2, entropy_coef=0.01), temperature=0.7),
            value_part(tiny.scalar, cliprange_value=0.2, vf_coef=0.1),
        )
        step = make_ppo_step(parts, optax.sgd(0.1), num_ppo_epochs=2, num_mini_batches=1, **how)
        state = init_state({"policy": tiny.policy, "critic": tiny.critic}, optax.sgd(0.1))
        return jax.jit(step)(state, rollout_of(sampled), jax.random.key(1))
    batch, model, params, loss = pairs(), tiny.scalar, tiny.reward, bind(PAIR_LOSSES["bradley_terry"], center=0.05)
    if kind == "dpo":
        model, params, loss = tiny.lm, tiny.policy, bind(PAIR_LOSSES["dpo"], beta=0.3)
        batch = replace(batch, columns={name: batch.weights_B * -4 for name in loss.columns})
    return jax.jit(make_pair_step(model, loss, sgd(), **how))(init_state(params, sgd()), batch)


@pytest.fixture(scope="module")
def doubles(tiny):
    """The tiny models in float64."""
    with jax.enable_x64(True):
        double = {name: jax.tree.map(lambda x: x.astype(jnp.float64), getattr(tiny, name)) for name in ("policy", "reward", "critic")}
    return tiny._replace(**double)


@pytest.mark.parametrize("kind", KINDS)
def test_microbatches_add_up_to_the_big_batch(kind, doubles, texts, pairs, sampled):
    with jax.enable_x64(True):
        whole, metrics = taken(kind, doubles, texts, pairs, sampled, 1)
        for k in (2, 4):
            state, figures = taken(kind, doubles, texts, pairs, sampled, k)
            for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole.params), strict=True):
                assert a.dtype == jnp.float64
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
            assert set(figures) == set(metrics)
            for name, value in metrics.items():
                np.testing.assert_allclose(figures[name], value, rtol=2e-6, atol=1e-7, err_msg=name)  # some are counts in float32


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_in_float32_microbatches_differ_by_the_order_of_a_sum(kind, tiny, texts, pairs, sampled):
    whole, _ = taken(kind, tiny, texts, pairs, sampled, 1)
    state, _ = taken(kind, tiny, texts, pairs, sampled, 4)
    norm = float(optax.tree.norm(whole.params))
    moved = float(optax.tree.norm(jax.tree.map(jnp.subtract, state.params, whole.params)))
    assert moved <= 4 * np.finfo(np.float32).eps * norm  # a parameter is rounded once, and its gradient is a sum of eight rows


def test_the_rows_of_a_microbatch_are_strided():
    """Microbatch i holds rows i, i + k, …: rows that are cut over devices in blocks stay where they are."""
    rows = jnp.arange(8.0)

    def loss(params, one):
        return params * one.sum(), {"first": one[0], "rows": jnp.float32(one.shape[0])}

    grads, total, metrics = accumulate_gradients(loss, jnp.float32(1.0), rows, steps=4)
    assert float(grads) == float(total) == 28 and float(metrics["first"]) == 0 + 1 + 2 + 3 and float(metrics["rows"]) == 8


def test_under_plain_jit_no_rows_are_split_by_hand():
    assert shards(None) == 1
