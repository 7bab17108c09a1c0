"""Scores and KL → advantages: the one thing in which a rollout of PPO and one of RLOO differ."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp

from jaxrlhf.losses import gae, masked_count, masked_mean, masked_whiten, rloo_advantages, shaped_rewards, value_mask
from jaxrlhf.losses.masked import masked_fill
from jaxrlhf.steps.accumulate import global_rows, global_sum, own_rows
from jaxrlhf.types import Array, Metrics


class Credit(NamedTuple):
    """How the reward of a rollout is shared out; all of it is 0 outside the masks."""

    rewards_B: Array  # what a response earned in all: its score less the KL penalty
    advantages_BT: Array
    returns_BT: Array
    values_BT: Array
    value_mask_BT: Array
    metrics: Metrics


CreditRule = Callable[..., Credit]  # (scores_B, kl_BT, values_BT, mask_BT, rows_B, *, axis_name): `gae_credit` or `rloo_credit`, bound


def gae_credit(
    scores_B: Array,
    kl_BT: Array,
    values_BT: Array,
    mask_BT: Array,
    rows_B: Array,
    *,
    kl_coef: float | Array,
    gamma: float,
    lam: float,
    score_placement: Literal["after_eos", "at_eos"] = "after_eos",
    whiten_rewards: bool = False,
    axis_name: str | None = None,
) -> Credit:
    """PPO: token rewards against a critic's values by GAE, advantages whitened once over the global batch.

    `whiten_rewards` scales the token rewards to unit variance and keeps their mean.
    """
    value_mask_BT = value_mask(mask_BT, score_placement)
    shaped_BT = shaped_rewards(scores_B, kl_BT, mask_BT, kl_coef=kl_coef, placement=score_placement)
    rewards_BT = shaped_BT
    if whiten_rewards:
        rewards_BT = masked_whiten(shaped_BT, value_mask_BT, shift_mean=False, axis_name=axis_name)
    values_BT = masked_fill(values_BT, value_mask_BT)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, value_mask_BT, gamma=gamma, lam=lam)
    return Credit(
        rewards_B=shaped_BT.sum(axis=1),
        advantages_BT=masked_whiten(advantages_BT, mask_BT, axis_name=axis_name),
        returns_BT=returns_BT,
        values_BT=values_BT,
        value_mask_BT=value_mask_BT,
        metrics={"rollout/value": global_mean(values_BT, value_mask_BT, axis_name)},
    )


def rloo_credit(
    scores_B: Array,
    kl_BT: Array,
    values_BT: Array,
    mask_BT: Array,
    rows_B: Array,
    *,
    kl_coef: float | Array,
    samples: int,
    whiten_rewards: bool = False,
    axis_name: str | None = None,
) -> Credit:
    """RLOO: a response is one action, R_i = score_i − β Σ_t kl_it, judged against the other `samples` − 1 responses to its prompt.

    Every token of a response gets its advantage, as it is: neither the paper nor TRL (`normalize_advantages`, off) whitens, which
    would blow the noise of a batch of near-ties up to the size of a difference. `whiten_rewards` divides R by its deviation over the
    global batch first (a mean would cancel). The `samples` rows of a prompt are neighbours; no values are read. Ahmadian et al. (2024),
    "Back to basics: revisiting REINFORCE-style optimization for learning from human feedback in LLMs".
    """
    rewards_B = scores_B - kl_coef * jnp.sum(masked_fill(kl_BT, mask_BT), axis=1)
    returns_B = rewards_B
    if whiten_rewards:
        returns_B = masked_whiten(rewards_B, rows_B, shift_mean=False, axis_name=axis_name)
    # A prompt's responses may lie on two devices, where a device's rows are not whole groups.
    advantages_B = own_rows(rloo_advantages(global_rows(returns_B, axis_name), samples=samples), axis_name)

    def of_tokens(values_B: Array) -> Array:
        return jnp.where(mask_BT, values_B[:, None], 0.0)

    return Credit(rewards_B, of_tokens(advantages_B), of_tokens(returns_B), jnp.zeros_like(kl_BT), mask_BT, {})


def global_mean(values: Array, mask: Array, axis_name: str | None) -> Array:
    """Mean over the mask of the global batch."""
    return global_sum(masked_mean(values, mask, total=global_sum(masked_count(mask), axis_name)), axis_name)
