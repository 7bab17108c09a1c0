"""The clipped losses of PPO, and what they report."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxrlhf.losses.masked import AnyArray, Number, Scalar, masked_fill, masked_mean
from jaxrlhf.types import Metrics, Rollout, TokenStats

# exp(60) is finite in float32 and exp(89) is not: without a bound, one token whose probability collapsed between
# sampling and training turns the gradient into 0 · inf = NaN even where the clip has switched it off.
MAX_LOG_RATIO = 60.0


def ppo_policy_loss(
    logp: Float[AnyArray, "B T"],
    old_logp: Float[AnyArray, "B T"],
    advantages: Float[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"],
    *,
    clip: Number,
    clip_high: Number | None = None,
    dual_clip: Number | None = None,
    total: Scalar | None = None,
) -> Float[Array, ""]:
    """The clipped surrogate, a mean over response tokens, to be minimised.

        ρ_t = exp(log π(y_t) − log π_old(y_t)),   L = 1/Σm Σ_t m_t max( −A_t ρ_t, −A_t clip(ρ_t, 1−clip, 1+clip_high) )

    The mean is over tokens of the whole batch, not over responses. `clip_high` defaults to `clip` (Yu et al., 2025,
    "DAPO", §3.1 makes it larger). `dual_clip` c > 1 also bounds the loss by −A c where A < 0: without it a token that
    became much likelier despite a negative advantage has an unbounded gradient (Ye et al., 2020, "Mastering
    complex control in MOBA games").
    Schulman et al. (2017), "Proximal policy optimization", eq. 7.
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip {dual_clip} must be above 1; 3 is common, None switches it off.")
    advantages = masked_fill(advantages, mask)
    unclipped, clipped = _surrogates(_log_ratio(logp, old_logp, mask), advantages, clip, clip_high)
    losses = jnp.maximum(unclipped, clipped)
    if dual_clip is not None:
        losses = jnp.where(advantages < 0, jnp.minimum(losses, -advantages * dual_clip), losses)
    return masked_mean(losses, mask, total=total)


def ppo_policy_stats(
    logp: Float[AnyArray, "B T"],
    old_logp: Float[AnyArray, "B T"],
    advantages: Float[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"],
    *,
    clip: Number,
    clip_high: Number | None = None,
    total: Scalar | None = None,
) -> Metrics:
    """`approxkl` = ½ E[(log ρ)²], `clipfrac` = share of tokens where the clipped branch is the larger loss, `ratio` = E[ρ].

    At the first update of a rollout approxkl is about 1e-7 and ratio 1; anything else means that sampling and training
    disagree about log-probs.
    """
    log_ratio = _log_ratio(logp, old_logp, mask)
    unclipped, clipped = _surrogates(log_ratio, masked_fill(advantages, mask), clip, clip_high)
    values = {"approxkl": 0.5 * jnp.square(log_ratio), "clipfrac": clipped > unclipped, "ratio": jnp.exp(log_ratio)}
    return {name: masked_mean(value.astype(jnp.float32), mask, total=total) for name, value in values.items()}


def ppo_value_loss(
    values: Float[AnyArray, "B T"],
    old_values: Float[AnyArray, "B T"],
    returns: Float[AnyArray, "B T"],
    value_mask: Bool[AnyArray, "B T"],
    *,
    clip: Number | None,
    total: Scalar | None = None,
) -> Float[Array, ""]:
    """Half the mean squared error of the values, clipped around the values of the rollout.

        L = ½ · 1/Σm Σ_t m_t max( (V_t − R_t)², (clip(V_t, V^old_t ± clip) − R_t)² )

    Contains the ½; the coefficient (vf_coef) is the step's. Its mask is the *value* mask, which is one longer than the
    policy's when the score lands after EOS. `clip=None` is the plain squared error.
    Huang et al. (2024), "The N+ implementation details of RLHF with PPO"; OpenAI baselines ppo2.
    """
    plain, clipped = _value_errors(values, old_values, returns, value_mask, clip)
    return 0.5 * masked_mean(jnp.maximum(plain, clipped), value_mask, total=total)


def ppo_value_stats(
    values: Float[AnyArray, "B T"],
    old_values: Float[AnyArray, "B T"],
    returns: Float[AnyArray, "B T"],
    value_mask: Bool[AnyArray, "B T"],
    *,
    clip: Number | None,
    total: Scalar | None = None,
) -> Metrics:
    """`value_clipfrac` = share of positions where the clipped error is the larger, `value_error` = mean (V − R)²,
    `value` and `return` = their means."""
    plain, clipped = _value_errors(values, old_values, returns, value_mask, clip)
    metrics = {"value_clipfrac": (clipped > plain).astype(jnp.float32), "value_error": plain, "value": values, "return": returns}
    return {name: masked_mean(value, value_mask, total=total) for name, value in metrics.items()}


def ppo_rollout_loss(
    stats: TokenStats,
    rollout: Rollout,
    *,
    total: Scalar | None = None,
    clip: Number = 0.2,
    clip_high: Number | None = None,
    dual_clip: Number | None = None,
    entropy_coef: Number = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """`ppo_policy_loss` on a rollout, minus `entropy_coef` times the mean token entropy; `total` counts policy tokens."""
    mask = rollout.mask_BT & rollout.row_mask_B[:, None]
    arrays = (stats.logp_BT, rollout.logp_BT, rollout.advantages_BT, mask)
    loss = ppo_policy_loss(*arrays, clip=clip, clip_high=clip_high, dual_clip=dual_clip, total=total)
    entropy = masked_mean(stats.entropy_BT, mask, total=total)
    if entropy_coef:
        loss = loss - entropy_coef * entropy
    return loss, ppo_policy_stats(*arrays, clip=clip, clip_high=clip_high, total=total) | {"entropy": entropy}


def _log_ratio(logp: Float[AnyArray, "B T"], old_logp: Float[AnyArray, "B T"], mask: Bool[AnyArray, "B T"]) -> Float[Array, "B T"]:
    return jnp.clip(masked_fill(logp, mask) - masked_fill(old_logp, mask), -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _surrogates(
    log_ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], clip: Number, clip_high: Number | None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    ratio = jnp.exp(log_ratio)
    bounded = jnp.clip(ratio, 1.0 - clip, 1.0 + (clip if clip_high is None else clip_high))
    return -advantages * ratio, -advantages * bounded


def _value_errors(
    values: Float[AnyArray, "B T"],
    old_values: Float[AnyArray, "B T"],
    returns: Float[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"],
    clip: Number | None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    values, old_values, returns = (masked_fill(array, mask) for array in (values, old_values, returns))
    plain = jnp.square(values - returns)
    if clip is None:
        return plain, plain
    return plain, jnp.square(jnp.clip(values, old_values - clip, old_values + clip) - returns)
