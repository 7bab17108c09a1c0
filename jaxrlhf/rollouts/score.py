"""Sampled text → `Rollout`: the forward passes of all models, then scores, KL and what a credit rule makes of them."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.losses import kl_estimate
from jaxrlhf.losses.ensemble import ensemble_score
from jaxrlhf.losses.masked import masked_fill
from jaxrlhf.rollouts.credit import CreditRule, global_mean
from jaxrlhf.rollouts.passes import in_passes
from jaxrlhf.steps.accumulate import shards
from jaxrlhf.steps.pair import response_scores
from jaxrlhf.steps.ppo import critic_values
from jaxrlhf.types import Array, Completion, Metrics, Model, Params, PromptBatch, Rollout

READING = ("temperature", "scores_B", "reward_bias", "spread_coef", "value_bias", "old_logp", "microbatch")  # options of `read_rollout`


class RolloutModels(NamedTuple):
    """The models that read a rollout. Without a critic values are 0; without a reward model scores are given from outside;
    `sft` is π_SFT where the KL to it is to be measured and it is not the reference."""

    policy: Model | None  # None, as the reference: not read in this pass (algorithms/offloaded.py)
    reference: Model | None
    critic: Model | None = None
    reward: Model | None = None
    sft: Model | None = None


class Readings(NamedTuple):
    """What the models say about a rollout. Entries outside the response mask mean nothing."""

    logp_BT: Array
    entropy_BT: Array | None  # None where the sampler's own log-probs are used: the policy has not been run again
    reference_logp_BT: Array
    values_BT: Array
    scores_B: Array
    sft_logp_BT: Array | None = None
    spread_B: Array | None = None  # population deviation of an ensemble's scores; None where there is no ensemble


def score_rollout(
    models: RolloutModels,
    params: dict[str, Params],
    prompts: PromptBatch,
    completion: Completion,
    *,
    axis_name: str | None = None,
    **options: Any,
) -> tuple[Rollout, Metrics]:
    """Everything an update of PPO or RLOO needs about sampled responses, and the metrics of the rollout. `options` are those of
    `read_rollout` and of `assemble_rollout`.

    `params` has the keys of `models` that are not None. Scores are `scores_B` where given (a gold scorer), else the reward
    model's minus `reward_bias`. With a `spread_coef` the reward is an ensemble: `params["reward"]` and `reward_bias` are
    sequences over its members, and the score is their mean less so many of their deviations (`losses/ensemble.py`). Values
    are the critic's minus `value_bias` (a critic that starts as a copy of the reward model starts from its bias too).
    `credit` makes advantages of it all: `partial(gae_credit, …)` for PPO, `partial(rloo_credit, …)` for RLOO. Old and
    reference log-probs are both taken at `temperature`; "sampler" keeps the sampler's old ones and saves a forward pass
    (then no entropy and no decode_mismatch are reported; under top-k or top-p decode_mismatch also holds the truncation).
    `microbatch` is the number of rows a forward pass takes at once: it changes memory, not results.

    Pure: jit it whole with `models` and the options closed over; `temperature`, the biases and the `kl_coef` of `credit` may be traced.
    Under pmap give `axis_name`: whitening and metrics are over the global batch.
    """
    reading = {name: options.pop(name) for name in READING if name in options}
    readings = read_rollout(models, params, prompts, completion, axis_name=axis_name, **reading)
    return assemble_rollout(prompts, completion, readings, axis_name=axis_name, **options)


def read_rollout(
    models: RolloutModels,
    params: dict[str, Params],
    prompts: PromptBatch,
    completion: Completion,
    *,
    temperature: float | Array,
    scores_B: Array | None = None,
    reward_bias: float | Array | Sequence[Any] = 0.0,
    spread_coef: float | Array | None = None,
    value_bias: float | Array = 0.0,
    old_logp: Literal["score", "sampler"] = "score",
    microbatch: int | None = None,
    axis_name: str | None = None,
) -> Readings:
    """The forward passes. Masks are the caller's: rows that fill the batch are read like any other."""
    if old_logp not in ("score", "sampler"):
        raise ValueError(f'old_logp {old_logp!r} is not one of "score", "sampler".')
    if (scores_B is None) == (models.reward is None):
        raise ValueError("scores must come from exactly one place: give scores_B, or a reward model in `models`.")
    start = prompts.prompt_BL.shape[1]

    def read(rows: tuple[PromptBatch, Completion]) -> Readings:
        prompt, text = rows
        pieces = (prompt.prompt_BL, prompt.prompt_mask_BL, text.tokens_BT, text.mask_BT)
        tokens, mask = jnp.concatenate(pieces[::2], axis=1), jnp.concatenate(pieces[1::2], axis=1)
        options = {"start": start, "temperature": temperature}
        logp_BT, entropy_BT = text.logp_BT, None
        if old_logp == "score" and models.policy is not None:
            stats = models.policy.score_tokens(params["policy"], tokens, mask, **options)
            logp_BT, entropy_BT = stats.logp_BT, stats.entropy_BT
        reference_BT = jnp.zeros_like(logp_BT)
        if models.reference is not None:
            reference_BT = models.reference.score_tokens(params["reference"], tokens, mask, **options).logp_BT
        values_BT, scores, spread = jnp.zeros(text.tokens_BT.shape), jnp.zeros(tokens.shape[0]), None
        if models.critic is not None:
            values_BT = critic_values(models.critic, params["critic"], *pieces, value_bias)
        if models.reward is not None:
            scores, spread = reward_scores(models.reward, params["reward"], pieces, reward_bias, spread_coef)
        sft_BT = None
        if models.sft is not None:
            sft_BT = models.sft.score_tokens(params["sft"], tokens, mask, **options).logp_BT
        return Readings(logp_BT, entropy_BT, reference_BT, values_BT, scores, sft_BT, spread)

    readings = _by_microbatch(read, (prompts, completion), microbatch, shards(axis_name))
    return readings if scores_B is None else readings._replace(scores_B=scores_B)


def reward_scores(
    model: Model, params: Any, pieces: tuple[Array, Array, Array, Array], bias: Any, spread_coef: float | Array | None
) -> tuple[Array, Array | None]:
    """(scores, spread) of one reward model, which has no spread, or of an ensemble: `params` and `bias` are then over its members.

    Members are read one by one and not stacked: they stay where the sharding table put them, and no second copy of them is ever made.
    """
    if spread_coef is None:
        return response_scores(model, params, *pieces, bias), None
    if len(params) != len(bias):
        raise ValueError(f"an ensemble of {len(params)} reward models has {len(bias)} biases; give each its own.")
    members = [response_scores(model, one, *pieces, its_bias) for one, its_bias in zip(params, bias, strict=True)]
    return ensemble_score(jnp.stack(members, axis=1), spread_coef=spread_coef)


def assemble_rollout(
    prompts: PromptBatch,
    completion: Completion,
    readings: Readings,
    *,
    eos_ids: tuple[int, ...],
    credit: CreditRule,
    kl_estimator: Literal["k1", "k2", "k3"] = "k1",
    missing_eos_penalty: float | None = None,
    missing_eos_score: float | None = None,
    axis_name: str | None = None,
) -> tuple[Rollout, Metrics]:
    """Readings → scores and KL → what `credit` makes of them. Everything outside its mask is 0."""
    rows_B = prompts.row_mask_B
    mask_BT = completion.mask_BT & rows_B[:, None]
    logp_BT, reference_BT = masked_fill(readings.logp_BT, mask_BT), masked_fill(readings.reference_logp_BT, mask_BT)
    ended_B = has_ended(completion.tokens_BT, mask_BT, eos_ids)
    scores_B = _penalise(readings.scores_B, ended_B, eos_ids, missing_eos_penalty, missing_eos_score)
    scores_B = masked_fill(scores_B, rows_B)
    kl_BT = kl_estimate(logp_BT, reference_BT, estimator=kl_estimator)
    shared = credit(scores_B, kl_BT, readings.values_BT, mask_BT, rows_B, axis_name=axis_name)
    rollout = Rollout(
        prompt_BL=prompts.prompt_BL, prompt_mask_BL=prompts.prompt_mask_BL, tokens_BT=completion.tokens_BT, mask_BT=mask_BT,
        value_mask_BT=shared.value_mask_BT, logp_BT=logp_BT, reference_logp_BT=reference_BT, values_BT=shared.values_BT,
        advantages_BT=shared.advantages_BT, returns_BT=shared.returns_BT, scores_B=scores_B, row_mask_B=rows_B,
    )  # fmt: skip
    mean = partial(global_mean, axis_name=axis_name)

    def of_response(values_BT: Array) -> Array:
        """Summed over tokens, mean over responses."""
        return mean(jnp.sum(masked_fill(values_BT, mask_BT), axis=1), rows_B)

    metrics = {
        "rollout/score": mean(scores_B, rows_B),
        "rollout/score_raw": mean(readings.scores_B, rows_B),
        "rollout/reward": mean(shared.rewards_B, rows_B),
        "rollout/kl": of_response(logp_BT - reference_BT),
        "rollout/kl_k3": of_response(kl_estimate(logp_BT, reference_BT, estimator="k3")),
        "kl/penalty": of_response(kl_BT),
        "rollout/length": of_response(jnp.ones_like(logp_BT)),
        "rollout/eos_rate": mean(ended_B.astype(jnp.float32), rows_B),
        **shared.metrics,
    }
    if readings.entropy_BT is not None:
        metrics["rollout/entropy"] = mean(readings.entropy_BT, mask_BT)
        metrics["rollout/decode_mismatch"] = mean(jnp.abs(logp_BT - masked_fill(completion.logp_BT, mask_BT)), mask_BT)
    if readings.sft_logp_BT is not None:
        metrics["kl/sft"] = of_response(logp_BT - masked_fill(readings.sft_logp_BT, mask_BT))
    if readings.spread_B is not None:
        metrics["reward/ensemble_spread"] = mean(readings.spread_B, rows_B)
    return rollout, metrics


def has_ended(tokens_BT: Array, mask_BT: Array, eos_ids: tuple[int, ...]) -> Array:
    """Whether a response closed with an EOS of its own (one inside the mask): bool [B]. Padding never counts, though it may be EOS."""
    return jnp.any(jnp.isin(tokens_BT, jnp.asarray(tuple(eos_ids), jnp.int32)) & mask_BT, axis=1)


def _penalise(scores_B: Array, ended_B: Array, eos_ids: tuple[int, ...], penalty: float | None, score: float | None) -> Array:
    """The score of a response without EOS: less `penalty` (TRL's rule), or `score` in its place (the papers')."""
    if penalty is not None and score is not None:
        raise ValueError(f"missing_eos_penalty {penalty} and missing_eos_score {score} exclude each other; set one.")
    if not eos_ids and (penalty is not None or score is not None):
        raise ValueError("a rule for responses without EOS needs eos_ids; they are empty.")
    if penalty is not None:
        return jnp.where(ended_B, scores_B, scores_B - penalty)
    return scores_B if score is None else jnp.where(ended_B, scores_B, score)


def _by_microbatch(read, rows, size: int | None, devices: int):
    """`read(rows)`, `size` rows at a time over all `devices`. Chunk i takes rows i, i + n, …: a batch sharded over devices stays sharded.

    Where each of several devices reads its own rows it takes its share of `size`, or the next smaller number that divides its rows.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    if size is None or size >= count * devices:
        return read(rows)
    if size < 1 or count * devices % size:
        fits = max(d for d in range(1, max(size, 1) + 1) if count * devices % d == 0)
        raise ValueError(f"microbatch {size} does not divide {count * devices} rows; try {fits}.")
    size = max(d for d in range(1, max(size // devices, 1) + 1) if count % d == 0)
    return in_passes(read, rows, count // size)
