"""RLOO from sampled text to the updated policy: against plain loops, and the same under padding, accumulation, a mesh and pmap."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import sharding
from jaxrlhf.losses import POLICY_LOSSES, bind
from jaxrlhf.rollouts.credit import rloo_credit
from jaxrlhf.rollouts.score import RolloutModels, score_rollout
from jaxrlhf.steps.ppo import make_ppo_step, policy_part
from jaxrlhf.steps.state import init_state

EOS, K, BETA, TEMPERATURE, BIAS, PENALTY = 1, 2, 0.3, 0.7, 0.25, 0.5


def score_of(tiny, **options):
    """(batch) → the rollout, the old log-probs those of the policy itself, the reference another model. No critic anywhere."""
    params = {"policy": tiny.policy, "reference": tiny.lm.init(jax.random.key(9)), "reward": tiny.reward}
    options = {"credit": partial(rloo_credit, samples=K, kl_coef=BETA), "missing_eos_penalty": PENALTY, **options}
    models = RolloutModels(tiny.lm, tiny.lm, reward=tiny.scalar)
    return lambda batch: score_rollout(models, params, *batch, temperature=TEMPERATURE, eos_ids=(EOS,), reward_bias=BIAS, **options)


def step_of(tiny, *, rate=0.1, clip=0.2, **how):
    part = policy_part(tiny.lm, bind(POLICY_LOSSES["ppo"], clip=clip), temperature=TEMPERATURE)
    return make_ppo_step((part,), optax.sgd(rate), **{"num_ppo_epochs": 1, "num_mini_batches": 1, **how})


def state_of(tiny, rate=0.1):
    return init_state({"policy": tiny.policy}, optax.sgd(rate))


@pytest.fixture(scope="module")
def batch(sampled):
    """Four prompts, two responses each; the last prompt only fills the batch."""
    prompts, completion = sampled(filled=2)
    first = np.arange(8) // K * K
    return replace(prompts, prompt_BL=prompts.prompt_BL[first], prompt_mask_BL=prompts.prompt_mask_BL[first]), completion


@pytest.fixture(scope="module")
def scored(tiny, batch):
    return jax.jit(score_of(tiny))(batch)


def logps(lm, params, batch, b):
    """log π of every response token of row b, from the raw logits."""
    prompts, completion = batch
    tokens = jnp.concatenate([prompts.prompt_BL, completion.tokens_BT], axis=1)
    mask = jnp.concatenate([prompts.prompt_mask_BL, completion.mask_BT], axis=1)
    L, n = prompts.prompt_BL.shape[1], int(completion.mask_BT[b].sum())
    z = lm.apply(params, tokens[b : b + 1], mask[b : b + 1]).logits[0, L - 1 : L - 1 + n] / TEMPERATURE
    return (z - jnp.log(jnp.sum(jnp.exp(z), axis=1, keepdims=True)))[jnp.arange(n), completion.tokens_BT[b, :n]]


def test_from_text_to_gradient_against_plain_loops(tiny, batch, scored):
    """R = score − β Σ KL with the rules for missing EOS, less the mean R of the prompt's other responses, on every token; the gradient
    of the mean over tokens of −A log π, which at the first minibatch the clipped ratio has too."""
    prompts, completion = batch
    rollout, metrics = scored
    reference, returns = tiny.lm.init(jax.random.key(9)), []
    for b in range(6):
        n = int(completion.mask_BT[b].sum())
        kl = sum(float(x) for x in logps(tiny.lm, tiny.policy, batch, b) - logps(tiny.lm, reference, batch, b))
        text = jnp.concatenate([prompts.prompt_BL[b][prompts.prompt_mask_BL[b]], completion.tokens_BT[b, :n]])[None]
        score = float(tiny.scalar.apply(tiny.reward, text, jnp.ones(text.shape, bool)).scalars[0, -1]) - BIAS
        score -= PENALTY * (int(completion.tokens_BT[b, n - 1]) != EOS)
        returns.append(score - BETA * kl)
    advantages = []
    for b in range(6):
        others = [returns[i] for i in range(b // K * K, b // K * K + K) if i != b]
        advantages.append(returns[b] - sum(others) / len(others))
    for b in range(6):
        n = int(completion.mask_BT[b].sum())
        np.testing.assert_allclose(rollout.advantages_BT[b], [advantages[b]] * n + [0] * (5 - n), rtol=1e-4, atol=1e-5)
    assert not rollout.advantages_BT[6:].any() and not rollout.values_BT.any() and "rollout/value" not in metrics
    np.testing.assert_allclose(metrics["rollout/reward"], np.mean(returns), rtol=1e-5)
    tokens = sum(int(completion.mask_BT[b].sum()) for b in range(6))

    def surrogate(params):
        return -sum(advantages[b] * logps(tiny.lm, params, batch, b).sum() for b in range(6)) / tokens

    state, learned = jax.jit(step_of(tiny, rate=1.0))(state_of(tiny, 1.0), rollout, jax.random.key(0))
    expected = jax.grad(surrogate)(tiny.policy)
    moved = jax.tree.map(jnp.subtract, tiny.policy, state.params["policy"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), moved, expected)
    assert float(learned["ppo/ratio_first"]) == pytest.approx(1, abs=1e-6) and float(learned["ppo/approxkl_first"]) < 1e-10
    assert set(state.params) == {"policy"} and not any("value" in name for name in learned)


def test_advantages_of_a_prompt_cancel_and_are_not_whitened(scored):
    """Over the responses of a prompt they sum to 0; their scale is the reward's."""
    first = np.asarray(scored[0].advantages_BT[:, 0])
    np.testing.assert_allclose(first.reshape(-1, K).sum(axis=1), 0, atol=1e-5)
    assert abs(first[:6].std() - 1) > 0.05


def test_whitened_rewards_keep_the_sign_and_fix_the_scale(tiny, batch, scored):
    rollout, _ = jax.jit(score_of(tiny, credit=partial(rloo_credit, samples=K, kl_coef=BETA, whiten_rewards=True)))(batch)
    plain = np.asarray(scored[0].returns_BT[:6, 0])
    np.testing.assert_allclose(rollout.advantages_BT, scored[0].advantages_BT / plain.std(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def ways(tiny, batch):
    """Score and one update of two epochs × two minibatches, by way of taking them."""
    key, state = jax.random.key(5), state_of(tiny)
    make = partial(step_of, tiny, num_ppo_epochs=2, num_mini_batches=2)

    def whole(batch, state, *, score=None, step=None):
        rollout, metrics = (score or score_of(tiny))(batch)
        state, learned = (step or make())(state, rollout, key)
        return state, {**metrics, **learned}, rollout.advantages_BT

    mesh = sharding.make_mesh(4)
    on_mesh = jax.jit(partial(whole, step=make(constrain_rows=sharding.constrain_rows(mesh))))(
        sharding.place_batch(batch, mesh), sharding.place(state, mesh)
    )
    # Two devices of two prompts each: a group never lies on two devices.
    cut = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
    inner = partial(whole, score=score_of(tiny, axis_name="data"), step=make(axis_name="data"))
    mapped = jax.pmap(inner, "data", in_axes=(0, None), devices=jax.devices()[:2])(cut, state)
    state_p, metrics_p, advantages_p = jax.tree.map(np.asarray, mapped)
    first = jax.tree.map(lambda x: x[0], (state_p, metrics_p))
    return {
        "whole": jax.jit(whole)(batch, state),
        "microbatches": jax.jit(partial(whole, score=score_of(tiny, microbatch=2), step=make(accumulate=4)))(batch, state),
        "mesh": on_mesh,
        "pmap": (*first, advantages_p.reshape(8, -1)),
    }


@pytest.mark.parametrize("way", ["microbatches", "mesh", "pmap"])
def test_every_way_of_taking_the_update_is_the_same_update(ways, way):
    (state, metrics, advantages), (other, other_metrics, other_advantages) = ways["whole"], sharding.gather(ways[way])
    np.testing.assert_allclose(advantages, other_advantages, rtol=1e-4, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=5e-6), state.params, other.params)
    assert set(metrics) == set(other_metrics)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=2e-4, atol=1e-5, err_msg=name)


def test_filler_rows_and_padding_teach_nothing(tiny, batch):
    """PAD may be EOS or anything else, and a prompt that only fills the batch may be any."""
    prompts, completion = batch
    run = jax.jit(lambda *batch: step_of(tiny)(state_of(tiny), score_of(tiny)(batch)[0], jax.random.key(0))[0].params)
    ends = []
    for pad in (0, EOS, 9):
        live = prompts.row_mask_B[:, None]
        other = replace(prompts, prompt_BL=jnp.where(prompts.prompt_mask_BL & live, prompts.prompt_BL, pad))
        ends.append(run(other, replace(completion, tokens_BT=jnp.where(completion.mask_BT & live, completion.tokens_BT, pad))))
    for other in ends[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), ends[0], other)


def test_groups_that_do_not_fill_the_batch_are_refused(tiny, batch):
    with pytest.raises(ValueError, match="8 rows do not form groups of 3"):
        score_of(tiny, credit=partial(rloo_credit, samples=3, kl_coef=BETA))(batch)
