"""What the loops are built of: counts of steps, losses by name, weights that are checked, optimizers that share nothing they should not."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.algorithms import training
from jaxrlhf.algorithms.policy_updates import ppo_optimizer
from jaxrlhf.algorithms.ppo import num_updates, policy_loss_of
from jaxrlhf.algorithms.reward import reward_loss, sides, with_weights
from jaxrlhf.algorithms.reward_update import Pairs, unweighted
from jaxrlhf.algorithms.training import num_steps, optimizer_of, own_copy, train
from jaxrlhf.config import PPOConfig, RewardConfig, SFTConfig
from jaxrlhf.data.pairs import Pair
from jaxrlhf.losses import PAIR_LOSSES, POLICY_LOSSES
from jaxrlhf.plugins import plugin
from jaxrlhf.types import PairBatch, PairLoss, TrainState


def pairs(n=4) -> Pairs:
    grid, ones = np.arange(n * 3, dtype=np.int32).reshape(n, 3), np.ones((n, 3), bool)
    tokens = PairBatch(grid, ones, grid + 100, ones, grid + 200, ones, np.ones(n, np.float32), np.ones(n, bool), np.arange(n))  # type: ignore[arg-type]
    return Pairs([Pair(f"id{i}", "p", "c", "r", "f:1") for i in range(n)], tokens)


@pytest.mark.parametrize(
    ("rows", "size", "epochs", "limit", "expected"), [(10, 4, 1, None, 3), (8, 4, 2, None, 4), (10, 4, 5, 7, 7), (3, 4, 1, 0, 0)]
)
def test_steps_of_a_training(rows, size, epochs, limit, expected):
    assert num_steps(rows, SFTConfig(batch_size=size, num_train_epochs=epochs, max_steps=limit)) == expected


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match=r"nothing to train on: 0 rows"):
        num_steps(0, SFTConfig(batch_size=4))


def test_train_hands_on_every_state():
    history = list(train(lambda state, batch: (state + batch, {"sum": state}), 0, iter([1, 2, 3])))
    assert history == [(1, {"sum": 0}), (3, {"sum": 1}), (6, {"sum": 3})]


def test_own_copy_shares_no_buffer():
    params = {"w": jnp.ones(3)}
    copy = own_copy(params)
    copy["w"].delete()
    assert float(params["w"].sum()) == 3


def test_weights_are_checked():
    tokens = pairs().tokens
    assert with_weights(tokens, np.array([0, 1, 2.5, 3])).weights_B.dtype == np.float32
    with pytest.raises(ValueError, match=r"weights of shape \(3,\) for 4 pairs; give one a pair"):
        with_weights(tokens, np.ones(3))
    for bad in (np.nan, np.inf, -1.0):
        with pytest.raises(ValueError, match=r"is not a finite number ≥ 0; look at eta and alpha"):
            with_weights(tokens, np.array([1, 1, bad, 1]))


def test_selection_keeps_text_and_tokens_together():
    chosen = pairs().select(np.array([3, 1]))
    assert chosen.ids == ["id3", "id1"] and chosen.tokens.index_B.tolist() == [0, 1]
    assert chosen.tokens.chosen_BT[:, 0].tolist() == [109, 103]
    given = pairs()
    same, weights = unweighted(None, given)  # type: ignore[arg-type]
    assert same is given and weights.tolist() == [1, 1, 1, 1]


def test_sides_of_pairs():
    chosen, rejected = sides(pairs().tokens)
    assert chosen.response_BT[0, 0] == 100 and rejected.response_BT[0, 0] == 200


def test_reward_loss_by_name():
    assert reward_loss(RewardConfig(), plugin).columns == ()
    assert reward_loss(RewardConfig(use_margin=True), plugin).columns == ("margin",)
    assert reward_loss(RewardConfig(center_rewards_coefficient=0.3), plugin).loss.keywords == {"center": 0.3}
    assert reward_loss(RewardConfig(loss="jaxrlhf.losses:PAIR_LOSSES.nope"), lambda name: PAIR_LOSSES["bradley_terry"]).head == "scalar"
    with pytest.raises(ValueError, match=r"reward.loss 'bt' is unknown; use one of bradley_terry"):
        reward_loss(RewardConfig(loss="bt"), plugin)
    with pytest.raises(ValueError, match=r"reward.loss 'dpo' needs head 'lm'"):
        reward_loss(RewardConfig(loss="dpo"), plugin)
    with pytest.raises(ValueError, match=r"'math:exp' is a builtin_function_or_method; name a jaxrlhf.types.PairLoss"):
        reward_loss(RewardConfig(loss="math:exp"), plugin)


def test_reward_settings_act_in_whichever_loss_knows_them_and_are_refused_elsewhere():
    """Under its own name, as a plug-in, and not at all: nothing that is set is without effect."""
    margin = reward_loss(RewardConfig(loss="bradley_terry_margin", center_rewards_coefficient=0.3), plugin)
    assert margin.columns == ("margin",) and margin.loss.keywords == {"center": 0.3}
    same = reward_loss(RewardConfig(loss="bradley_terry_margin", use_margin=True), plugin)
    assert same.columns == ("margin",) and same.loss.func is margin.loss.func
    centred = PairLoss("scalar", (), lambda outputs, batch, *, total=None, center=1.0: None)
    plain = PairLoss("scalar", (), lambda outputs, batch, *, total=None: None)
    with_margin = PairLoss("scalar", ("margin",), plain.loss)
    assert reward_loss(RewardConfig(loss="my:loss", center_rewards_coefficient=0.2), lambda name: centred).loss.keywords == {"center": 0.2}
    assert reward_loss(RewardConfig(loss="my:loss"), lambda name: plain) is plain
    assert reward_loss(RewardConfig(loss="my:loss", use_margin=True), lambda name: with_margin) is with_margin
    with pytest.raises(ValueError, match=r"center_rewards_coefficient is 0.2, but reward.loss 'my:loss' has no hyperparameter 'center'"):
        reward_loss(RewardConfig(loss="my:loss", center_rewards_coefficient=0.2), lambda name: plain)
    with pytest.raises(ValueError, match=r"use_margin is set, but reward.loss 'my:loss' reads no column 'margin'"):
        reward_loss(RewardConfig(loss="my:loss", use_margin=True), lambda name: plain)


def test_policy_loss_takes_its_own_hyperparameters():
    loss = policy_loss_of(PPOConfig(cliprange=0.1, entropy_coef=0.5, dual_clip=3.0), plugin)
    assert loss.loss.keywords == {"clip": 0.1, "clip_high": None, "dual_clip": 3.0, "entropy_coef": 0.5}
    narrow = POLICY_LOSSES["ppo"]._replace(loss=lambda stats, rollout, *, total=None, clip: None)
    assert policy_loss_of(PPOConfig(loss="mine:loss", cliprange=0.3), lambda name: narrow).loss.keywords == {"clip": 0.3}
    with pytest.raises(ValueError, match=r"ppo.loss 'ppo2' is unknown; use one of ppo"):
        policy_loss_of(PPOConfig(loss="ppo2"), plugin)


def test_ppo_optimizer_ends_both_schedules_with_the_round():
    """48 episodes in batches of 16, two epochs of two minibatches: 12 steps; with one rollout of warm-up the policy's schedule has 8."""
    config = PPOConfig(total_episodes=48, batch_size=16, num_ppo_epochs=2, num_mini_batches=2, learning_rate=0.1, weight_decay=0.0,
                       adam_epsilon=1e-12, critic_learning_rate=0.2, critic_warmup_updates=1)  # fmt: skip
    assert num_updates(config) == 3
    optimizer = ppo_optimizer(config)
    params = {"policy": {"w": jnp.zeros(1)}, "critic": {"w": jnp.zeros(1)}}
    state, moved = optimizer.init(params), []
    for _ in range(12):
        updates, state = optimizer.update({"policy": {"w": jnp.ones(1)}, "critic": {"w": jnp.ones(1)}}, state, params)
        moved.append([-float(updates["policy"]["w"][0]), -float(updates["critic"]["w"][0])])
        params = optax.apply_updates(params, updates)
    expected = [[0.0] * 4 + [0.1 * (1 - t / 8) for t in range(8)], [0.2 * (1 - t / 12) for t in range(12)]]
    np.testing.assert_allclose(np.array(moved).T, expected, rtol=1e-4, atol=1e-7)


def test_configs_can_be_keys():
    """Trainers are cached by their config: equal sections share compilations."""
    assert hash(PPOConfig()) == hash(dataclasses.replace(PPOConfig(kl_coef=3.0), kl_coef=PPOConfig().kl_coef))


def test_the_optimizer_is_the_sections():
    """A gradient is cut to `max_grad_norm`, and the rate climbs through `warmup_steps`: Adam's first step is the rate itself."""
    section = RewardConfig(
        learning_rate=0.1, lr_scheduler_type="constant", warmup_steps=4, weight_decay=0.0, adam_epsilon=1.0, max_grad_norm=0.5
    )
    params = {"w": jnp.zeros(2)}
    optimizer = optimizer_of(section, steps=10)
    updates, _ = optimizer.update({"w": jnp.array([3.0, 4.0])}, optimizer.init(params), params)
    cut = np.array([0.3, 0.4])  # norm 5 cut to 0.5
    np.testing.assert_allclose(updates["w"], -0.1 / 4 * cut / (cut + 1.0), rtol=1e-5)


def test_the_sft_step_is_the_sections(monkeypatch):
    seen = {}
    monkeypatch.setattr(training, "make_sft_step", lambda model, optimizer, **how: seen.update(how) or (lambda state, batch: (state, {})))
    for loss_on in ("all", "response"):
        section = SFTConfig(loss_on=loss_on, gradient_accumulation_steps=2)
        training.sft_trainer.__wrapped__(None, section, 3, None)[1](TrainState(jnp.zeros((), int), {}, {}), {})
        assert (seen["loss_on"], seen["accumulate"]) == (loss_on, 2)
