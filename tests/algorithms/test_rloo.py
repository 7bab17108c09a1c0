"""RLOO as the trainer puts it together: whose prompts, whose samples, no critic, and that it learns; and ensembles as its reward."""

from dataclasses import replace
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.algorithms.policy_updates import POLICY_UPDATES, check_rloo, ppo_trainer, rloo_trainer
from jaxrlhf.algorithms.ppo import RoundModels, rollout_prompts, train_ppo
from jaxrlhf.algorithms.training import own_copy
from jaxrlhf.config import PPOConfig
from jaxrlhf.models.model import token_stats
from jaxrlhf.plugins import plugin
from jaxrlhf.rollouts.dataset import repeated
from jaxrlhf.steps.state import init_state
from jaxrlhf.types import Model, Outputs, PromptBatch

V, T, GOOD = 6, 4, 5
CONFIG = PPOConfig(
    total_episodes=512, batch_size=32, rloo_k=4, num_ppo_epochs=2, num_mini_batches=2, response_length=T, temperature=1.0,
    learning_rate=0.2, lr_scheduler_type="constant", weight_decay=0.0, kl_coef=0.0,
)  # fmt: skip
HOW = {"eos_ids": (1,), "pad_id": 0, "vocab_size": None}


def models(passes: list[str]) -> tuple[Model, Model]:
    """A policy that draws every token from the same logits, and a reward that is the weight of a response's last token."""

    def prefill(params, tokens, mask, *, length):
        return jnp.broadcast_to(params["logits"], (len(tokens), V)), ()

    def decode(params, tokens, cache):
        return jnp.broadcast_to(params["logits"], (len(tokens), V)), ()

    def score_tokens(params, tokens, mask, *, start, temperature=1.0, chunk=None):
        passes.append("lm")
        rows = tokens[:, start:]
        return token_stats(jnp.broadcast_to(params["logits"], (*rows.shape, V)), rows, temperature)

    def apply(params, tokens, mask, *, start=0):
        passes.append("scalar")
        return Outputs(scalars=params["weight"][tokens][:, start:])

    return Model(None, None, prefill, decode, score_tokens), Model(None, apply, None, None, None)  # type: ignore[arg-type]


POLICY = {"logits": jnp.zeros(V)}
REWARD = {"weight": jnp.zeros(V).at[GOOD].set(1.0)}


def table(rows=24) -> PromptBatch:
    tokens = np.arange(2 * rows, dtype=np.int32).reshape(rows, 2)
    return PromptBatch(tokens, np.ones((rows, 2), bool), np.ones(rows, bool), np.arange(rows, dtype=np.int32))  # type: ignore[arg-type]


def trained(config=CONFIG, reward: Any = REWARD, bias: Any = 0.0, mesh=None, updates=None, **how):
    """(state, metrics of every update, forward passes that were traced)."""
    passes: list[str] = []
    trainer = rloo_trainer(*models(passes), config, plugin, **HOW, mesh=mesh, **how)
    state = sharding.place(init_state(own_copy({"policy": POLICY}), trainer.optimizer, {"kl_coef": jnp.float32(config.kl_coef)}), mesh)
    stream = islice(rollout_prompts(table(), config, samples=config.rloo_k, seed=0), updates)
    out = list(train_ppo(trainer, state, RoundModels(POLICY, reward, bias), stream, key=jax.random.key(0), mesh=mesh))
    return out[-1][0], [metrics for _, metrics in out], passes


def test_copies_of_a_prompt_are_neighbours_with_numbers_of_their_own():
    """Over the whole table too: no two rows of an epoch share their random numbers, whatever batch they stand in."""
    batch = repeated(table(3), 2)
    assert batch.prompt_BL.tolist() == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    assert batch.index_B.tolist() == [0, 1, 2, 3, 4, 5] and batch.index_B.dtype == np.int32
    late = repeated(jax.tree.map(lambda x: x[2:], table(3)), 2)
    assert late.index_B.tolist() == [4, 5]
    epoch = islice(rollout_prompts(table(), CONFIG, samples=4, seed=0), 3)
    assert sorted(np.concatenate([b.index_B for b in epoch])) == list(range(24 * 4))


def test_equal_episodes_take_their_prompts_from_one_stream():
    """PPO's batch of 8 prompts is what four of RLOO's with 2 responses to each see; `start` goes on with it."""
    config = replace(CONFIG, batch_size=8)
    ppo = next(rollout_prompts(table(), config, samples=1, seed=3))
    rloo = list(islice(rollout_prompts(table(), config, samples=4, seed=3), 6))
    assert ppo.prompt_BL.tolist() == np.concatenate([b.prompt_BL[::4] for b in rloo[:4]]).tolist()
    again = next(rollout_prompts(table(), config, samples=4, seed=3, start=5))
    jax.tree.map(np.testing.assert_array_equal, again, rloo[5])


@pytest.mark.parametrize(("prompts", "samples"), [(3, 4), (3, 1), (13, 1)])
def test_every_row_of_every_rollout_is_an_episode(prompts, samples):
    """3 prompts and batches of 8: no filler, prompts come equally often, and none with the random numbers of another row of its batch."""
    config = replace(CONFIG, batch_size=8)
    whole = list(islice(rollout_prompts(table(prompts), config, samples=samples, seed=0), prompts * 8))
    assert sum(int(batch.row_mask_B.sum()) for batch in whole) == 8 * len(whole)
    assert all(len(set(batch.index_B.tolist())) == 8 for batch in whole)
    asked = np.concatenate([batch.prompt_BL[::samples, 0] // 2 for batch in whole])
    epochs = asked.reshape(-1, prompts)
    assert (np.sort(epochs, axis=1) == np.arange(prompts)).all() and len({tuple(epoch) for epoch in epochs.tolist()}) > 1
    again = next(rollout_prompts(table(prompts), config, samples=samples, seed=0, start=5))
    jax.tree.map(np.testing.assert_array_equal, again, whole[5])


def test_copies_draw_different_text_and_a_mesh_the_same():
    batch = next(rollout_prompts(table(), CONFIG, samples=4, seed=0))
    trainer = rloo_trainer(*models([]), CONFIG, plugin, **HOW)
    tokens = np.asarray(trainer.sample(POLICY, batch, jax.random.key(1)).tokens_BT)
    assert all(len({tuple(row) for row in group}) > 2 for group in tokens.reshape(8, 4, T).tolist())
    mesh = sharding.make_mesh(4)
    on_mesh = trainer.sample(sharding.place(POLICY, mesh), sharding.place_batch(batch, mesh), jax.random.key(1))
    assert np.array_equal(on_mesh.tokens_BT, tokens)


def test_the_schedule_ends_with_the_round():
    """48 episodes in batches of 16, two epochs of three minibatches: 18 steps."""
    config = replace(
        CONFIG, total_episodes=48, batch_size=16, num_mini_batches=3, lr_scheduler_type="linear", learning_rate=0.1, adam_epsilon=1e-12
    )
    optimizer = rloo_trainer(*models([]), config, plugin, **HOW).optimizer
    state, moved = optimizer.init(jnp.zeros(1)), []
    for _ in range(18):
        updates, state = optimizer.update(jnp.ones(1), state, jnp.zeros(1))
        moved.append(-float(updates[0]))
    np.testing.assert_allclose(moved, [0.1 * (1 - t / 18) for t in range(18)], rtol=1e-4)


def test_it_learns_without_a_critic():
    """Responses should end in GOOD, which one of six tokens is; three forward passes score, and the state holds the policy alone."""
    state, metrics, passes = trained(updates=16)
    scores = [float(m["rollout/score"]) for m in metrics]
    assert scores[0] < 0.4 and np.mean(scores[-3:]) > 0.9
    assert set(state.params) == {"policy"} and set(state.controller) == {"kl_coef"} and int(state.step) == 16
    assert passes.count("scalar") == 1  # the reward model; a critic would be run here and in the update
    assert all(abs(float(m["ppo/ratio_first"]) - 1) < 1e-5 for m in metrics)
    assert not any("value" in name for name in metrics[0])


def test_a_mesh_learns_the_same():
    """Also where a prompt's sixteen responses lie on two devices of eight rows each."""
    config = replace(CONFIG, rloo_k=16)
    one, _, _ = trained(config, updates=2)
    four, _, _ = trained(config, updates=2, mesh=sharding.make_mesh(4))
    np.testing.assert_allclose(one.params["policy"]["logits"], four.params["policy"]["logits"], rtol=1e-4, atol=1e-6)


def test_an_ensemble_of_twins_is_its_member_and_its_spread_costs_reward():
    """Two members with the same weights and other zeros: their biases take the zeros away, and what is learned is the same to the bit."""
    alone, metrics, _ = trained(updates=2)
    shifted = {"weight": REWARD["weight"] + 3.0}
    both, twin_metrics, _ = trained(reward=(REWARD, shifted), bias=(0.0, 3.0), updates=2, spread_coef=1.0)
    jax.tree.map(np.testing.assert_array_equal, alone.params, both.params)
    assert float(twin_metrics[0]["reward/ensemble_spread"]) == 0 and "reward/ensemble_spread" not in metrics[0]
    # Members that say 1 and 0 of GOOD: mean ½, population deviation ½.
    apart = (REWARD, {"weight": jnp.zeros(V)})
    for coef, score in ((0.0, 0.5), (1.0, 0.0), (2.0, -0.5)):
        _, (m,), _ = trained(reward=apart, bias=(0.0, 0.0), updates=1, spread_coef=coef)
        share = float(metrics[0]["rollout/score"])  # of responses that end in GOOD
        np.testing.assert_allclose([m["rollout/score"], m["reward/ensemble_spread"]], [score * share, 0.5 * share], rtol=1e-5, atol=1e-7)


def test_what_cannot_be_grouped_is_refused_in_words():
    with pytest.raises(ValueError, match=r"ppo.rloo_k is 1; .* give 2 or more"):
        check_rloo(replace(CONFIG, rloo_k=1))
    with pytest.raises(ValueError, match=r"ppo.batch_size 32 counts responses and does not divide by ppo.rloo_k 5; try 30"):
        rloo_trainer(*models([]), replace(CONFIG, rloo_k=5), plugin, **HOW)
    check_rloo(CONFIG)


def test_a_field_said_to_be_unread_changes_nothing():
    """The stages of RLOO are shared whatever these are; PPO's whatever rloo_k is."""
    other = {"gamma": 0.5, "lam": 0.1, "cliprange_value": 0.01, "vf_coef": 9.0, "score_placement": "at_eos", "critic_warmup_updates": 1}
    other |= {"critic_learning_rate": 1.0}
    assert set(other) == set(POLICY_UPDATES["rloo"].unread) and POLICY_UPDATES["ppo"].unread == ("rloo_k",)
    one, two = (trained(config, updates=2)[0] for config in (CONFIG, replace(CONFIG, **other)))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def test_ppo_and_rloo_are_called_alike():
    for way in POLICY_UPDATES.values():
        assert way.trainer in (ppo_trainer, rloo_trainer)
        assert way.samples(CONFIG) == (1 if way.critic else 4)
