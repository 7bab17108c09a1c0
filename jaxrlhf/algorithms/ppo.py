"""One round of PPO or RLOO against a fixed reward model or ensemble: sample, score, update, again."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import optax

from jaxrlhf import rng, sharding
from jaxrlhf.algorithms.offloaded import all_metrics, score_offloaded
from jaxrlhf.config import PPOConfig
from jaxrlhf.data.batches import endless_batches
from jaxrlhf.losses import POLICY_LOSSES, bind, hyperparameter_names
from jaxrlhf.rollouts.credit import CreditRule
from jaxrlhf.rollouts.dataset import repeated
from jaxrlhf.rollouts.generate import check_left_padded, generate
from jaxrlhf.rollouts.score import RolloutModels, score_rollout
from jaxrlhf.steps.ppo import LossPart, make_ppo_step
from jaxrlhf.steps.state import joined
from jaxrlhf.types import Completion, Metrics, Model, Params, PolicyLoss, PromptBatch, Rollout, TrainState

_log = logging.getLogger(__name__)


class PPOTrainer(NamedTuple):
    """What is compiled once and used in every round."""

    optimizer: optax.GradientTransformation
    sample: Callable[..., Completion]  # (params, prompts, key)
    score: sharding.Compiled  # (params, (prompts, completion), controller, reward_bias) → (Rollout, metrics)
    score_offloaded: Callable[..., tuple[Rollout, Metrics]]  # the same of frozen models that wait on the host, one at a time on the device
    update: sharding.Compiled  # (state, rollout, key) → (state, metrics)


class RoundModels(NamedTuple):
    """Parameters that stay fixed while a round lasts. `reward` and `reward_bias` are tuples over the members where the reward is an
    ensemble. `sft` is None where the KL reference is π_SFT itself. `base` is what does not learn of the models that do: {"policy": …} under
    adapters. `offloaded`: they wait in the host's memory, each on the device in its turn."""

    reference: Params
    reward: Params
    reward_bias: float | tuple[float, ...]
    sft: Params | None = None
    base: dict[str, Params] | None = None
    offloaded: bool = False


def num_updates(config: PPOConfig) -> int:
    """Rollout batches of a round."""
    return config.total_episodes // config.batch_size


def as_compiled(config: PPOConfig) -> PPOConfig:
    """The section less what is data of the compiled programs and not part of them: arms that differ in it share their compilations."""
    return replace(config, kl_coef=0.0, kl_coef_previous=None, round_prompts="fresh")


def passes_of(config: PPOConfig) -> int:
    """In how many parts a rollout batch is sampled."""
    return 1 if config.generation_batch_size is None else -(-config.batch_size // config.generation_batch_size)


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


@cache
def _say_truncated(top_k: int, top_p: float) -> None:
    _log.warning(
        f"ppo.top_k {top_k} and ppo.top_p {top_p} cut the distribution that responses are drawn from, but log-probs are trained "
        "under the whole one: the updates are off-policy. top_k 0 and top_p 1 draw from all of it."
    )


def make_trainer(
    models: RolloutModels,
    parts: tuple[LossPart, ...],
    credit: CreditRule,
    optimizer: optax.GradientTransformation,
    config: PPOConfig,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    vocab_size: int | None,
    spread_coef: float | None = None,
    mesh: Any = None,
) -> PPOTrainer:
    """What PPO and RLOO share: the sampler, the forward passes and the update."""
    if config.top_k or config.top_p < 1:
        _say_truncated(config.top_k, config.top_p)
    assert models.policy is not None
    sample = _sampler_of(models.policy, config, mesh, eos_ids=eos_ids, pad_id=pad_id, vocab_size=vocab_size)
    scorers = _scorers_of(models, credit, config, mesh, eos_ids=eos_ids, spread_coef=spread_coef)
    return PPOTrainer(optimizer, sample, *scorers, _step_of(parts, optimizer, config, mesh))


def _sampler_of(policy: Model, config: PPOConfig, mesh: Any, **ids: Any) -> Callable[..., Completion]:
    def sample(params: Params, prompts: PromptBatch, key: jax.Array) -> Completion:
        return generate(
            policy,
            params,
            prompts.prompt_BL,
            prompts.prompt_mask_BL,
            key,
            max_new_tokens=config.response_length,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            index_B=prompts.index_B,
            check_padding=False,  # train_ppo has looked at the host's copy
            mesh=mesh,
            passes=passes_of(config),
            **ids,
        )

    return sample


def _scorers_of(
    models: RolloutModels, credit: CreditRule, config: PPOConfig, mesh: Any, *, eos_ids: tuple[int, ...], spread_coef: float | None
) -> tuple[sharding.Compiled, Callable[..., tuple[Rollout, Metrics]]]:
    """(all models in one pass, one at a time)."""
    reading = {"temperature": config.temperature, "old_logp": config.old_logp, "microbatch": config.forward_batch_size}
    penalties = {"missing_eos_penalty": config.missing_eos_penalty, "missing_eos_score": config.missing_eos_score}
    assembling = {"eos_ids": eos_ids, "kl_estimator": config.kl_estimator, **penalties}

    def score(params: dict[str, Params], texts: tuple, controller: dict, reward_bias, *, axis_name: str | None) -> tuple:
        prompts, completion = texts
        rollout, metrics = score_rollout(
            models._replace(sft=models.policy if "sft" in params else None),
            params,
            prompts,
            completion,
            credit=partial(credit, kl_coef=controller["kl_coef"]),
            reward_bias=reward_bias,
            spread_coef=spread_coef,
            value_bias=0.0 if models.critic is None else controller["value_bias"],
            axis_name=axis_name,
            **reading,
            **assembling,
        )
        return rollout, all_metrics(metrics, controller)

    scored = sharding.rows_and_metrics(lambda axis_name: partial(score, axis_name=axis_name), mesh)
    return scored, score_offloaded(models, credit, mesh, reading=reading, assembling=assembling, spread_coef=spread_coef)


def _step_of(parts: tuple[LossPart, ...], optimizer: optax.GradientTransformation, config: PPOConfig, mesh: Any) -> sharding.Compiled:
    make_step = partial(
        make_ppo_step,
        parts,
        optimizer,
        num_ppo_epochs=config.num_ppo_epochs,
        num_mini_batches=config.num_mini_batches,
        adaptive={"target": config.kl_target, "horizon": config.kl_horizon} if config.adaptive_kl else None,
        accumulate=config.gradient_accumulation_steps,
        constrain_rows=sharding.constrain_rows(mesh),
    )
    return sharding.step(make_step, mesh)


def rollout_prompts(
    table: PromptBatch, config: PPOConfig, *, samples: int, seed: int, bucket: int = 0, start: int = 0
) -> Iterator[PromptBatch]:
    """The prompts of rollout batches `start`, `start + 1`, … without end: `batch_size / samples` prompts, `samples` neighbouring rows each.

    The order of the prompts depends on the seed alone, and every row is an episode: where the prompts end they begin again in another
    order. In equally many episodes, more samples to a prompt are fewer prompts. A row's number becomes `samples` · the prompt's + its
    place in the group, from which its random numbers derive: the copies of a prompt differ, and do not depend on the batch or the mesh.
    """
    for batch in endless_batches(table, config.batch_size // samples, seed=seed, name="ppo", bucket=bucket, start=start):
        yield batch if samples == 1 else repeated(batch, samples)


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
    """Updates `start`, `start + 1`, … of PPO or RLOO for as long as there are prompts; every random number derives from (key, update).

    Yields the state and its metrics, with the seconds each phase took.
    """
    frozen = {"reference": fixed.reference, "reward": fixed.reward} | ({} if fixed.sft is None else {"sft": fixed.sft})
    rest = () if fixed.base is None else (fixed.base,)
    score = trainer.score_offloaded if fixed.offloaded else trainer.score
    for update, batch in enumerate(prompts, start=start):
        clock = PhaseTimer()
        check_left_padded(batch.prompt_mask_BL)
        batch = sharding.place_batch(batch, mesh)
        models = joined(state.params, fixed.base)
        completion = clock.timed("generate", trainer.sample(models["policy"], batch, rng.stream(key, "rollout", update)))
        rollout, measured = clock.timed("score", score({**models, **frozen}, (batch, completion), state.controller, fixed.reward_bias))
        state, learned = clock.timed("update", trainer.update(state, rollout, rng.stream(key, "minibatches", update), *rest))
        yield state, {**measured, **learned, **clock.seconds}


class PhaseTimer:
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
