"""One round of PPO against a fixed reward model: sample, score, update, again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import jax
import optax

from jaxrlhf import rng, sharding
from jaxrlhf.algorithms.supervised import optimizer_of
from jaxrlhf.config import PPOConfig
from jaxrlhf.losses import POLICY_LOSSES, bind, hyperparameter_names
from jaxrlhf.rollouts.generate import check_left_padded, generate
from jaxrlhf.rollouts.score import RolloutModels, score_rollout
from jaxrlhf.steps.ppo import make_ppo_step
from jaxrlhf.steps.state import actor_critic
from jaxrlhf.types import Completion, Metrics, Model, Params, PolicyLoss, PromptBatch, Rollout, TrainState

_log = logging.getLogger(__name__)


class PPOTrainer(NamedTuple):
    """What is compiled once and used in every round."""

    optimizer: optax.GradientTransformation
    sample: Callable[..., Completion]  # (params, prompts, key)
    score: Callable[..., tuple[Rollout, Metrics]]  # (params, prompts, completion, controller, reward_bias)
    update: Callable[..., tuple[TrainState, Metrics]]  # (state, rollout, key)


class RoundModels(NamedTuple):
    """Parameters that stay fixed while a round lasts. `sft` is None where the KL reference is π_SFT itself."""

    reference: Params
    reward: Params
    reward_bias: float
    sft: Params | None = None


def num_updates(config: PPOConfig) -> int:
    """Rollout batches of a round."""
    return config.total_episodes // config.batch_size


def policy_loss_of(config: PPOConfig, plugin: Callable[[str], PolicyLoss]) -> PolicyLoss:
    """The section's policy loss with those of the section's hyperparameters bound that it has."""
    if ":" not in config.loss and config.loss not in POLICY_LOSSES:
        raise ValueError(f"ppo.loss {config.loss!r} is unknown; use one of {', '.join(POLICY_LOSSES)} or module:attribute.")
    loss = plugin(config.loss) if ":" in config.loss else POLICY_LOSSES[config.loss]
    if not isinstance(loss, PolicyLoss):
        raise ValueError(f"ppo.loss {config.loss!r} is a {type(loss).__name__}; name a jaxrlhf.types.PolicyLoss(columns, loss).")
    section = {
        "clip": config.cliprange,
        "clip_high": config.cliprange_high,
        "dual_clip": config.dual_clip,
        "entropy_coef": config.entropy_coef,
    }
    known = hyperparameter_names(loss)
    return bind(loss, **{name: value for name, value in section.items() if name in known})


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


@cache
def _say_truncated(top_k: int, top_p: float) -> None:
    _log.warning(
        f"ppo.top_k {top_k} and ppo.top_p {top_p} cut the distribution that responses are drawn from, but log-probs are trained "
        "under the whole one: the updates are off-policy. top_k 0 and top_p 1 draw from all of it."
    )


@lru_cache(maxsize=8)
def ppo_trainer(
    policy: Model,
    scalar: Model,
    config: PPOConfig,
    plugin: Callable[[str], PolicyLoss],
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    vocab_size: int | None,
    mesh: Any = None,
) -> PPOTrainer:
    """The compiled parts of a round; `scalar` is the model of both critic and reward. Equal arguments share compilations."""
    if config.top_k or config.top_p < 1:
        _say_truncated(config.top_k, config.top_p)
    optimizer = ppo_optimizer(config)
    models = RolloutModels(policy=policy, reference=policy, critic=scalar, reward=scalar)
    adaptive = {"target": config.kl_target, "horizon": config.kl_horizon} if config.adaptive_kl else None

    def sample(params: Params, prompts: PromptBatch, key: jax.Array) -> Completion:
        return generate(
            policy,
            params,
            prompts.prompt_BL,
            prompts.prompt_mask_BL,
            key,
            max_new_tokens=config.response_length,
            eos_ids=eos_ids,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            index_B=prompts.index_B,
            vocab_size=vocab_size,
            pad_id=pad_id,
            check_padding=False,  # train_ppo has looked at the host's copy
        )

    def score(params: dict[str, Params], prompts: PromptBatch, completion: Completion, controller: dict, reward_bias) -> tuple:
        rollout, metrics = score_rollout(
            models._replace(sft=policy if "sft" in params else None),
            params,
            prompts,
            completion,
            temperature=config.temperature,
            eos_ids=eos_ids,
            kl_coef=controller["kl_coef"],
            gamma=config.gamma,
            lam=config.lam,
            reward_bias=reward_bias,
            value_bias=controller["value_bias"],
            old_logp=config.old_logp,
            kl_estimator=config.kl_estimator,
            score_placement=config.score_placement,
            missing_eos_penalty=config.missing_eos_penalty,
            missing_eos_score=config.missing_eos_score,
            whiten_rewards=config.whiten_rewards,
            microbatch=config.forward_batch_size,
        )
        # Where the reference is π_SFT the two are one number; the k1 form is what both mean.
        metrics.setdefault("kl/sft", metrics["rollout/kl"])
        return rollout, {**metrics, "kl/coef": controller["kl_coef"]}

    step = make_ppo_step(
        policy,
        scalar,
        policy_loss_of(config, plugin),
        optimizer,
        num_ppo_epochs=config.num_ppo_epochs,
        num_mini_batches=config.num_mini_batches,
        temperature=config.temperature,
        cliprange_value=config.cliprange_value,
        vf_coef=config.vf_coef,
        adaptive=adaptive,
        accumulate=config.gradient_accumulation_steps,
        keep_rows=sharding.keep_rows(mesh),
    )
    return PPOTrainer(optimizer, sample, jax.jit(score), sharding.jit(step, mesh))


def train_ppo(
    trainer: PPOTrainer,
    state: TrainState,
    fixed: RoundModels,
    prompts: Iterator[PromptBatch],
    *,
    key: jax.Array,
    start: int = 0,
    mesh: Any = None,
) -> Iterator[tuple[TrainState, dict[str, Any]]]:
    """Updates `start`, `start + 1`, … for as long as there are prompts; every random number derives from (key, update).

    Yields the state and its metrics, with the seconds each phase took.
    """
    frozen = {"reference": fixed.reference, "reward": fixed.reward} | ({} if fixed.sft is None else {"sft": fixed.sft})
    for update, batch in enumerate(prompts, start=start):
        clock = _Clock()
        check_left_padded(batch.prompt_mask_BL)
        batch = sharding.place_batch(batch, mesh)
        completion = clock.timed("generate", trainer.sample(state.params["policy"], batch, rng.stream(key, "rollout", update)))
        rollout, measured = clock.timed(
            "score", trainer.score({**state.params, **frozen}, batch, completion, state.controller, fixed.reward_bias)
        )
        state, learned = clock.timed("update", trainer.update(state, rollout, rng.stream(key, "minibatches", update)))
        yield state, {**measured, **learned, **clock.seconds}


class _Clock:
    """Seconds of each phase, by waiting for its result.

    That is three waits an update: phases cannot overlap anyway (each needs the one before), but the device stands idle
    while the host launches the next one. It is the price of knowing the times.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def timed(self, phase: str, result):
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.seconds[f"time/{phase}"] = now - self._last
        self._last = now
        return result
