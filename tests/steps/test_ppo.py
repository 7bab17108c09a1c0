"""The PPO step: one update against plain loops, its shuffles, its masks, and the same step under accumulation, a mesh and pmap."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import rng, sharding
from jaxrlhf.losses import POLICY_LOSSES, bind
from jaxrlhf.models.model import token_stats
from jaxrlhf.rollouts.credit import gae_credit
from jaxrlhf.rollouts.score import RolloutModels, score_rollout
from jaxrlhf.scorers.reward_model import score_responses
from jaxrlhf.steps.pair import response_scores
from jaxrlhf.steps.ppo import critic_values, make_ppo_step, minibatch_indices, policy_part, value_part
from jaxrlhf.steps.state import actor_critic, adamw, init_state
from jaxrlhf.types import Completion, Model, Outputs, PromptBatch, TextBatch

EOS = 1
OPTIONS = {"cliprange_value": 0.2, "vf_coef": 0.1}
SCORING = {"eos_ids": (EOS,), "credit": partial(gae_credit, kl_coef=0.1, gamma=1.0, lam=0.95)}


def sgd():
    return optax.sgd(1.0)


def state_of(tiny, optimizer=None, **controller):
    return init_state({"policy": tiny.policy, "critic": tiny.critic}, optimizer or sgd(), controller)


@pytest.fixture(scope="module")
def scored(tiny, sampled):
    """(temperature) → a rollout of the tiny policy under itself as reference, part of its rows filler. Compiled once."""
    models = RolloutModels(tiny.lm, tiny.lm, tiny.scalar, tiny.scalar)
    params = {"policy": tiny.policy, "reference": tiny.policy, "critic": tiny.critic, "reward": tiny.reward}
    score = jax.jit(lambda batch, temperature: score_rollout(models, params, *batch, temperature=temperature, **SCORING))
    return lambda temperature, **how: score(sampled(**how), jnp.float32(temperature))


@pytest.fixture(scope="module")
def noisy(scored):
    """A rollout whose old log-probs and values are a little off, so that ratios, clips and value clips all bite."""
    rollout, _ = scored(0.7)
    keys = jax.random.split(jax.random.key(3), 2)
    shift = 0.4 * jax.random.normal(keys[0], rollout.logp_BT.shape)
    return replace(
        rollout,
        logp_BT=jnp.where(rollout.mask_BT, rollout.logp_BT + shift, 0.0),
        values_BT=rollout.values_BT + jnp.where(rollout.value_mask_BT, 0.4 * jax.random.normal(keys[1], shift.shape), 0.0),
    )


def step_of(tiny, *, optimizer=None, temperature: float | jax.Array = 0.7, entropy_coef=0.0, **how):
    loss = bind(POLICY_LOSSES["ppo"], clip=0.2, entropy_coef=entropy_coef)
    parts = (policy_part(tiny.lm, loss, temperature=temperature), value_part(tiny.scalar, **OPTIONS))
    return make_ppo_step(parts, optimizer or sgd(), **{"num_ppo_epochs": 1, "num_mini_batches": 1, **how})


def plain_loss(tiny, params, rollout, rows, *, temperature=0.7, clip=0.2, clip_value=0.2, vf_coef=0.1, entropy_coef=0.0):
    """The PPO loss of some rows, one token at a time, from the models' raw outputs."""
    L, T = rollout.prompt_BL.shape[1], rollout.tokens_BT.shape[1]
    tokens = jnp.concatenate([rollout.prompt_BL, rollout.tokens_BT], axis=1)
    mask = jnp.concatenate([rollout.prompt_mask_BL, rollout.mask_BT], axis=1)
    logits = tiny.lm.apply(params["policy"], tokens, mask).logits
    values = tiny.scalar.apply(params["critic"], tokens, mask).scalars
    policy, value, entropy = [], [], []
    for b in rows:
        for t in range(T):
            if rollout.mask_BT[b, t]:
                z = logits[b, L - 1 + t] / temperature
                logp = z - jnp.log(jnp.sum(jnp.exp(z)))
                ratio = jnp.exp(logp[rollout.tokens_BT[b, t]] - rollout.logp_BT[b, t])
                advantage = rollout.advantages_BT[b, t]
                policy.append(-jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage))
                entropy.append(-jnp.sum(jnp.exp(logp) * logp))
            if rollout.value_mask_BT[b, t]:
                v, old, target = values[b, L - 1 + t], rollout.values_BT[b, t], rollout.returns_BT[b, t]
                clipped = jnp.clip(v, old - clip_value, old + clip_value)
                value.append(0.5 * jnp.maximum((v - target) ** 2, (clipped - target) ** 2))
    parts = [sum(p) / len(p) for p in (policy, value, entropy)]
    return parts[0] + vf_coef * parts[1] - entropy_coef * parts[2], parts


def test_one_minibatch_against_plain_loops(tiny, noisy, entropy_coef=0.3):
    """Loss and gradient; the parameters of an SGD step at rate 1 moved by exactly the gradient."""
    live = [int(b) for b in np.flatnonzero(noisy.row_mask_B)]
    host = jax.tree.map(np.asarray, noisy)
    reference = jax.jit(jax.value_and_grad(lambda p: plain_loss(tiny, p, host, live, entropy_coef=entropy_coef), has_aux=True))
    (loss, (policy, value, entropy)), grads = reference({"policy": tiny.policy, "critic": tiny.critic})
    start = state_of(tiny)
    state, metrics = jax.jit(step_of(tiny, entropy_coef=entropy_coef))(start, noisy, jax.random.key(0))
    for name, expected in {
        "loss/ppo": loss,
        "loss/value": value,
        "ppo/entropy": entropy,
        "loss/policy": policy - entropy_coef * entropy,
    }.items():
        np.testing.assert_allclose(metrics[name], expected, rtol=2e-5, err_msg=name)
    moved = jax.tree.map(jnp.subtract, start.params, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), moved, grads)
    assert int(state.step) == 1 and float(metrics["ppo/clipfrac"]) > 0 and float(metrics["ppo/value_clipfrac"]) > 0


def test_temperature_agrees_between_scoring_and_training(tiny, scored):
    """Policy = reference → KL exactly 0; first minibatch → ratio 1 and approxkl 0, at every temperature."""
    first = jax.jit(lambda temperature, rollout: step_of(tiny, temperature=temperature)(state_of(tiny), rollout, jax.random.key(0))[1])
    for temperature in (0.5, 0.7, 1.0, 1.3):
        rollout, measured = scored(temperature)
        assert float(measured["rollout/kl"]) == float(measured["kl/penalty"]) == 0.0
        metrics = first(jnp.float32(temperature), rollout)
        np.testing.assert_allclose(metrics["ppo/ratio_first"], 1.0, atol=1e-6)
        assert float(metrics["ppo/approxkl_first"]) < 1e-6
        assert float(metrics["grad_norm"]) > 1e-3
    wrong = first(jnp.float32(1.0), scored(0.5)[0])
    assert float(wrong["ppo/approxkl_first"]) > 1e-3


@pytest.fixture(scope="module")
def ways(tiny, noisy):
    """One update of two epochs × two minibatches, by way of taking it."""
    key, state = jax.random.key(5), state_of(tiny, optax.sgd(0.1))

    def make(**how):
        return step_of(tiny, optimizer=optax.sgd(0.1), num_ppo_epochs=2, num_mini_batches=2, **how)

    mesh = sharding.make_mesh(4)
    on_mesh, mapped = (
        sharding.step(make, devices, donate=False)(sharding.place(state, devices), sharding.place_batch(noisy, devices), key)
        for devices in (mesh, sharding.Replicas(mesh))
    )
    return {
        "whole": jax.jit(make())(state, noisy, key), "accumulated": jax.jit(make(accumulate=4))(state, noisy, key),
        "mesh": on_mesh, "pmap": mapped,
    }  # fmt: skip


@pytest.mark.parametrize("way", ["accumulated", "mesh", "pmap"])
def test_every_way_of_taking_the_update_is_the_same_update(ways, way):
    """The shuffle is global: a mesh and pmap take the minibatches that one device takes."""
    (state, metrics), (other, other_metrics) = ways["whole"], sharding.gather(ways[way])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-6), state.params, other.params)
    assert set(metrics) == set(other_metrics)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=2e-4, atol=1e-5, err_msg=name)


def rows_of_products(compiled):
    """The longest leading axis of a matrix product in a compiled program: rows × positions of one device."""
    return max(int(size) for size in re.findall(r"= f32\[(\d+),[\d,]*\]\S* dot\(", compiled.as_text()))


@pytest.mark.parametrize(("axes", "accumulate"), [((4, 1, 1), 2), ((2, 2, 1), 1)])
def test_every_device_computes_its_share_of_the_update(tiny, scored, axes, accumulate):
    """The shuffle picks rows at run time, which alone would leave every minibatch whole on every device. Numbers: see `ways`."""
    mesh, optimizer = sharding.make_mesh(*axes), optax.sgd(0.1)
    how = {"optimizer": optimizer, "num_mini_batches": 2, "accumulate": accumulate, "constrain_rows": sharding.constrain_rows(mesh)}
    step = sharding.step(lambda axis_name: step_of(tiny, axis_name=axis_name, **how), mesh)
    compiled = step.lower(state_of(tiny, optimizer), scored(0.7, rows=32)[0], jax.random.key(5)).compile()
    assert rows_of_products(compiled) == 32 // 2 // accumulate // 4 * 9  # times L + T


def test_rows_that_would_be_lost_are_refused(tiny, noisy):
    with pytest.raises(ValueError, match="8 rows do not divide into 3 minibatches"):
        step_of(tiny, num_mini_batches=3)(state_of(tiny), noisy, jax.random.key(0))
    make = partial(step_of, tiny, num_mini_batches=2, accumulate=2)
    with pytest.raises(ValueError, match="8 rows do not divide into 2 minibatches × 2 microbatches × 4 devices"):
        sharding.step(make, sharding.make_mesh(4))(state_of(tiny), noisy, jax.random.key(0))


def test_every_epoch_is_a_partition_and_no_two_are_alike():
    key = jax.random.key(0)
    updates = [np.asarray(minibatch_indices(rng.stream(key, "minibatches", n), 12, epochs=3, minibatches=4)) for n in (0, 1)]
    for index in updates:
        assert index.shape == (12, 3)
        epochs = index.reshape(3, 12)
        assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3
    assert not np.array_equal(*updates)


def test_filler_rows_and_padding_teach_nothing(tiny, noisy):
    """PAD may be EOS or anything else."""
    step = jax.jit(step_of(tiny))
    ends = []
    for pad in (0, EOS, 9):
        mask = noisy.mask_BT & noisy.row_mask_B[:, None]
        prompt = jnp.where(noisy.prompt_mask_BL & noisy.row_mask_B[:, None], noisy.prompt_BL, pad)
        rollout = replace(noisy, tokens_BT=jnp.where(mask, noisy.tokens_BT, pad), prompt_BL=prompt)
        ends.append(step(state_of(tiny), rollout, jax.random.key(0))[0].params)
    for other in ends[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ends[0], other)


def tables() -> tuple[Model, Model]:
    """A policy whose logits and a critic whose scalars are the parameters themselves: gradients per position can be read off."""

    def score_tokens(params, tokens, mask, *, start, temperature=1.0, chunk=None):
        return token_stats(params["logits_BTV"], tokens[:, start:], temperature)

    def apply(params, tokens, mask, *, start=0):
        return Outputs(scalars=params["scalars"][:, start:])

    return Model(None, None, None, None, score_tokens), Model(None, apply, None, None, None)  # type: ignore[arg-type]


def by_hand():
    """Row 0 ends at t = 1 with room behind, row 1 fills all four without EOS; L = 2, V = 3, PAD is EOS."""
    prompts = PromptBatch(jnp.full((2, 2), 2), jnp.ones((2, 2), bool), jnp.ones(2, bool), jnp.arange(2))
    tokens = jnp.array([[2, EOS, EOS, EOS], [2, 0, 2, 0]])
    mask = jnp.array([[True, True, False, False], [True] * 4])
    return prompts, Completion(tokens, mask, jnp.zeros((2, 4)))


def test_score_lands_after_eos_and_eos_is_learned():
    """Scores .75 and −.5 with γ = λ = 1, no KL, values 0: R_t is the score up to p = min(len + 1, T − 1), fractions kept; the stop
    token's logit gets a gradient, what follows it none; the critic learns up to p."""
    lm, scalar = tables()
    logits = jax.random.normal(jax.random.key(0), (2, 4, 3))
    params = {"policy": {"logits_BTV": logits}, "critic": {"scalars": jnp.zeros((2, 6))}}
    rollout, metrics = score_rollout(
        RolloutModels(lm, lm, scalar), {**params, "reference": params["policy"]}, *by_hand(),
        temperature=1.0, eos_ids=(EOS,), credit=partial(gae_credit, kl_coef=0.1, gamma=1.0, lam=1.0), scores_B=jnp.array([0.75, -0.5]),
    )  # fmt: skip
    np.testing.assert_allclose(rollout.returns_BT, [[0.75, 0.75, 0.75, 0.0], [-0.5] * 4])
    assert rollout.value_mask_BT.tolist() == [[True, True, True, False], [True] * 4]
    assert float(metrics["rollout/score"]) == 0.125
    parts = (policy_part(lm, POLICY_LOSSES["ppo"], temperature=1.0), value_part(scalar, cliprange_value=0.2, vf_coef=1.0))
    step = make_ppo_step(parts, optax.sgd(1.0), num_ppo_epochs=1, num_mini_batches=1)
    state, _ = jax.jit(step)(init_state(params, optax.sgd(1.0)), rollout, jax.random.key(0))
    moved = np.asarray(state.params["policy"]["logits_BTV"] - logits)
    assert moved[0, 1, EOS] > 1e-3  # row 0 scored above the mean, so stopping there becomes likelier
    assert (np.abs(moved[0, :2]).sum(-1) > 1e-3).all() and (moved[0, 2:] == 0).all() and (np.abs(moved[1]).sum(-1) > 1e-3).all()
    # V_t stands at position L − 1 + t = 1 + t; the seven positions under the value mask move towards their returns, others do not.
    values = np.asarray(state.params["critic"]["scalars"])
    np.testing.assert_allclose(values, [[0, 0.75 / 7, 0.75 / 7, 0.75 / 7, 0, 0], [0, *[-0.5 / 7] * 4, 0]], rtol=1e-5)


def test_one_reading_of_the_reward(tiny, sampled):
    """Training, the bias pass and PPO read the same text at the same place."""
    prompts, completion = sampled(filled=0)
    sides = (prompts.prompt_BL, prompts.prompt_mask_BL, completion.tokens_BT, completion.mask_BT)
    trained = jax.jit(lambda *sides: response_scores(tiny.scalar, tiny.reward, *sides))(*sides)
    texts = jax.tree.map(np.asarray, TextBatch(*sides, prompts.row_mask_B, prompts.index_B))
    np.testing.assert_allclose(score_responses(tiny.scalar, tiny.reward, texts, batch_size=8), trained, rtol=1e-6)
    models = RolloutModels(tiny.lm, tiny.lm, None, tiny.scalar)
    params = {"policy": tiny.policy, "reference": tiny.policy, "reward": tiny.reward}
    rollout, _ = jax.jit(lambda *batch: score_rollout(models, params, *batch, temperature=1.0, **SCORING))(prompts, completion)
    np.testing.assert_allclose(rollout.scores_B, trained, rtol=1e-6)


def test_values_are_read_before_their_token(tiny, sampled):
    prompts, completion = sampled(filled=0)
    sides = (prompts.prompt_BL, prompts.prompt_mask_BL, completion.tokens_BT, completion.mask_BT)
    values = critic_values(tiny.scalar, tiny.critic, *sides, 0.5)
    changed = critic_values(tiny.scalar, tiny.critic, *sides[:2], completion.tokens_BT.at[:, 2].set(7), completion.mask_BT, 0.5)
    assert values.shape == completion.tokens_BT.shape
    np.testing.assert_array_equal(values[:, :3], changed[:, :3])  # V_2 has not seen token 2
    assert (values[:, 3] != changed[:, 3])[completion.mask_BT[:, 2]].any()


def test_adaptive_kl_moves_towards_its_target(tiny, noisy):
    step = jax.jit(step_of(tiny, adaptive={"target": 1.0, "horizon": 10.0}))
    masked = noisy.mask_BT & noisy.row_mask_B[:, None]
    for kl, error in ((3.0, 0.2), (0.1, -0.2), (1.1, 0.1), (0.85, -0.15)):  # two beyond the clip, two inside it
        # Every response of the five real rows is kl nats above its reference, however many tokens it has; what pads them is not looked at.
        per_token = jnp.where(masked, kl / jnp.maximum(masked.sum(1, keepdims=True), 1), 9.0)
        rollout = replace(noisy, reference_logp_BT=noisy.logp_BT - per_token)
        state, _ = step(state_of(tiny, kl_coef=jnp.float32(0.05)), rollout, jax.random.key(0))
        np.testing.assert_allclose(state.controller["kl_coef"], 0.05 * (1 + error * 5 / 10), rtol=1e-5)


def test_warm_up_trains_the_critic_alone(tiny, noisy):
    """Through the step itself: one rollout of warm-up is two optimizer steps here, and after it the policy moves."""
    part = adamw(optax.constant_schedule(1e-2), adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-5, weight_decay=0.1)
    optimizer = actor_critic(part, part, critic_warmup=2)
    step = jax.jit(step_of(tiny, optimizer=optimizer, num_ppo_epochs=2))
    first, _ = step(state_of(tiny, optimizer), noisy, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, first.params["policy"], tiny.policy)
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (first.params["critic"], tiny.critic)), strict=True))
    second, _ = step(first, noisy, jax.random.key(1))
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (second.params["policy"], tiny.policy)), strict=True))


def test_two_updates_shuffle_differently(tiny, noisy):
    """With two minibatches the order matters: other keys, other bits; the same key, the same bits."""
    step = jax.jit(step_of(tiny, optimizer=optax.sgd(0.1), num_ppo_epochs=2, num_mini_batches=2))
    ends = [
        jax.tree.leaves(step(state_of(tiny, optax.sgd(0.1)), noisy, rng.stream(jax.random.key(0), "minibatches", n))[0].params)
        for n in (0, 0, 1)
    ]
    assert all((a == b).all() for a, b in zip(ends[0], ends[1], strict=True))
    assert any((a != b).any() for a, b in zip(ends[0], ends[2], strict=True))


def test_a_minibatch_that_is_not_finite_changes_nothing_and_holds_the_controller(tiny, noisy):
    """One of two minibatches has a row whose advantage is NaN: the other one learns, as it would alone."""
    how = {"num_mini_batches": 2, "adaptive": {"target": 6.0, "horizon": 100.0}}
    key, start = jax.random.key(0), state_of(tiny, kl_coef=jnp.float32(0.1))
    live = int(np.flatnonzero(noisy.row_mask_B)[0])
    step = jax.jit(step_of(tiny, **how))
    bad = replace(noisy, advantages_BT=noisy.advantages_BT.at[live].set(jnp.nan))
    state, metrics = step(start, bad, key)
    assert (int(state.step), int(metrics["nonfinite"])) == (1, 1) and state.controller == start.controller
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(start.params), strict=True))
    well, metrics = step(start, noisy, key)
    assert int(metrics["nonfinite"]) == 0 and well.controller != start.controller
