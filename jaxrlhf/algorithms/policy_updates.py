"""PPO and RLOO as a table: how each makes its compiled parts."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import optax

from jaxrlhf.algorithms.ppo import PPOTrainer, make_trainer, num_updates, policy_loss_of
from jaxrlhf.algorithms.training import optimizer_of
from jaxrlhf.config import PPOConfig
from jaxrlhf.rollouts.credit import gae_credit, rloo_credit
from jaxrlhf.rollouts.score import RolloutModels
from jaxrlhf.steps.ppo import LossPart, policy_part, value_part
from jaxrlhf.steps.state import actor_critic
from jaxrlhf.types import Model, PolicyLoss


def check_rloo(config: PPOConfig) -> None:
    """Raise ValueError unless a rollout batch is made of whole groups of `rloo_k` ≥ 2 responses."""
    k, rows = config.rloo_k, config.batch_size
    if k < 2:
        raise ValueError(f"ppo.rloo_k is {k}; a response is judged by the others to its prompt, so give 2 or more.")
    if rows % k:
        raise ValueError(f"ppo.batch_size {rows} counts responses and does not divide by ppo.rloo_k {k}; try {max(rows // k, 1) * k}.")


def ppo_optimizer(config: PPOConfig) -> optax.GradientTransformation:
    """One optimizer over {"policy", "critic"}; each has its own moments, schedule and gradient clipping.

    Through the critic's warm-up the policy's schedule waits too, so that it still ends at the round's last step.
    """
    per_rollout = config.num_ppo_epochs * config.num_mini_batches
    steps, warmup = num_updates(config) * per_rollout, config.critic_warmup_updates * per_rollout
    return actor_critic(
        optimizer_of(config, steps=max(steps - warmup, 1)),
        optimizer_of(config, steps=steps, learning_rate=config.critic_learning_rate),
        critic_warmup=warmup,
    )


def ppo_trainer(policy: Model, scalar: Model, config: PPOConfig, plugin: Callable[[str], PolicyLoss], **how: Any) -> PPOTrainer:
    """The compiled parts of a round of PPO; `scalar` is the model of both critic and reward. Equal arguments share compilations.

    `how`: eos_ids, pad_id, vocab_size, and where they apply mesh and the `spread_coef` of an ensemble, as `make_trainer` takes them.
    """
    return _ppo_trainer(policy, scalar, config, policy_loss_of(config, plugin), **how)


def loss_parts(policy: Model, scalar: Model | None, config: PPOConfig, loss: PolicyLoss) -> tuple[LossPart, ...]:
    """The terms of the section's loss: the policy's, and that of the critic `scalar` where there is one."""
    part = policy_part(policy, loss, temperature=config.temperature)
    if scalar is None:
        return (part,)
    return (part, value_part(scalar, cliprange_value=config.cliprange_value, vf_coef=config.vf_coef))


@lru_cache(maxsize=8)
def _ppo_trainer(policy: Model, scalar: Model, config: PPOConfig, loss: PolicyLoss, **how: Any) -> PPOTrainer:
    parts = loss_parts(policy, scalar, config, loss)
    credit = partial(
        gae_credit, gamma=config.gamma, lam=config.lam, score_placement=config.score_placement, whiten_rewards=config.whiten_rewards
    )
    return make_trainer(RolloutModels(policy, policy, critic=scalar, reward=scalar), parts, credit, ppo_optimizer(config), config, **how)


def rloo_trainer(policy: Model, scalar: Model, config: PPOConfig, plugin: Callable[[str], PolicyLoss], **how: Any) -> PPOTrainer:
    """The compiled parts of a round of RLOO, as `ppo_trainer`: the same update without its value part, and no critic anywhere."""
    check_rloo(config)
    return _rloo_trainer(policy, scalar, config, policy_loss_of(config, plugin), **how)


@lru_cache(maxsize=8)
def _rloo_trainer(policy: Model, scalar: Model, config: PPOConfig, loss: PolicyLoss, **how: Any) -> PPOTrainer:
    parts = loss_parts(policy, None, config, loss)
    credit = partial(rloo_credit, samples=config.rloo_k, whiten_rewards=config.whiten_rewards)
    optimizer = optimizer_of(config, steps=num_updates(config) * config.num_ppo_epochs * config.num_mini_batches)
    return make_trainer(RolloutModels(policy, policy, reward=scalar), parts, credit, optimizer, config, **how)


class PolicyUpdate(NamedTuple):
    """What a round has to know of the way its policy learns."""

    trainer: Callable[..., PPOTrainer]
    critic: bool  # whether `params` has a critic beside the policy
    samples: Callable[[PPOConfig], int]  # responses to each prompt of a rollout batch
    unread: tuple[str, ...]  # fields of the section that it does not read


POLICY_UPDATES: dict[str, PolicyUpdate] = {
    "ppo": PolicyUpdate(ppo_trainer, True, lambda config: 1, ("rloo_k",)),
    "rloo": PolicyUpdate(
        rloo_trainer,
        False,
        lambda config: config.rloo_k,
        ("gamma", "lam", "cliprange_value", "vf_coef", "score_placement", "critic_warmup_updates", "critic_learning_rate"),
    ),
}
