"""Off-policy corrected reward modelling: how much each offline pair counts under the current policy.

Pairs were sampled from π_SFT; reward models are used on text of the policy π. Weighting each pair by how much likelier
π is to produce it turns the Bradley–Terry fit on old pairs into one on the policy's own distribution:

    E_{y₁,y₂~π_SFT}[ w(x,y₁,y₂) l(x,y₁,y₂) ] = E_{y₁,y₂~π}[ l(x,y₁,y₂) ],   w = π(y₁|x) π(y₂|x) / (π_SFT(y₁|x) π_SFT(y₂|x))

for any pair loss l. The identity is exact at α = 0 and η = 1 only: a relative ratio (α > 0) and flattening (η < 1) buy
lower variance with bias. Ackermann, Ishida & Sugiyama (2025), "Off-Policy Corrected Reward Modeling for RLHF".
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxrlhf.losses.masked import AnyArray, Number, Scalar, as_float

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def relative_log_ratio(
    policy_logp: Float[AnyArray, " B"], reference_logp: Float[AnyArray, " B"], *, alpha: Number, floor: float | None = None
) -> Float[Array, " B"]:
    """Log of the α-relative density ratio of a response, from its two sequence log-probs (sums, EOS included).

        log r_α(y) = log [ π(y) / (α π(y) + (1−α) π_ref(y)) ] = −logaddexp( log α, log(1−α) − (L_π − L_ref) )

    Bounded above by log 1/α; α = 0 is the plain ratio L_π − L_ref. `floor` reproduces the published code instead, which
    leaves log space: L_π − log(α e^{L_π} + (1−α) e^{L_ref} + floor) in float32, floor = 1e-36. There both exponentials
    vanish below about −83 nats and the result becomes L_π + 82.9, whatever L_ref is; use it for comparison only. At
    α = 0 the published code takes the plain ratio without a floor, and so does this.
    Relative ratio: Yamada et al. (2013), "Relative density-ratio estimation for robust distribution comparison".
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha {alpha} must lie in [0, 1); 0 is the plain ratio, 0.1 the published choice.")
    if alpha == 0:
        return as_float(policy_logp) - as_float(reference_logp)
    if floor is not None:
        policy, reference = (jnp.asarray(logp, jnp.float32) for logp in (policy_logp, reference_logp))
        return policy - jnp.log(alpha * jnp.exp(policy) + (1 - alpha) * jnp.exp(reference) + floor)
    difference = as_float(policy_logp) - as_float(reference_logp)
    return -jnp.logaddexp(math.log(alpha), math.log1p(-alpha) - difference)


def importance_weights(
    log_ratio_chosen: Float[AnyArray, " B"],
    log_ratio_rejected: Float[AnyArray, " B"],
    *,
    eta: Scalar,
    normalize: Literal["none", "mean"] = "none",
) -> Float[Array, " B"]:
    """Weight of each pair from the log-ratios of its two responses.

        w_b = exp( η · (log r(y⁺_b) + log r(y⁻_b)) )          "mean": divided by the mean over the array given

    The weight is the pair's: which response was chosen does not enter. "mean" wants the whole training set, once a round,
    never a mini-batch (whose mean is a biased normaliser). Weights carry no gradient. η = 0 gives exactly 1. Unnormalised
    weights change the effective step size: log their mean and `effective_sample_size`.
    """
    if normalize not in ("none", "mean"):
        raise ValueError(f'normalize {normalize!r} is not one of "none", "mean".')
    log_weights = _scaled(as_float(log_ratio_chosen) + as_float(log_ratio_rejected), eta)
    if normalize == "none":
        return jax.lax.stop_gradient(jnp.exp(log_weights))
    unscaled = jnp.exp(log_weights - _finite_max(log_weights))
    return jax.lax.stop_gradient(unscaled / jnp.mean(unscaled))


def effective_sample_size(weights: Float[AnyArray, " N"]) -> Float[Array, ""]:
    """How many equally weighted pairs carry as much information.

        ESS = (Σ_n w_n)² / Σ_n w_n²        between 1 and N; the scale of w cancels

    Kish (1965). All-zero weights give 0.
    """
    weights = as_float(weights)
    largest = jnp.max(weights)
    shares = weights / jnp.where(largest > 0, largest, 1.0)  # the squares of large weights would overflow
    return jnp.square(jnp.sum(shares)) / jnp.maximum(jnp.sum(jnp.square(shares)), jnp.finfo(shares.dtype).tiny)


def eta_for_ess(log_ratio_chosen: Float[AnyArray, " N"], log_ratio_rejected: Float[AnyArray, " N"], *, target: Scalar) -> Float[Array, ""]:
    """The largest exponent η ≤ 1 that keeps the effective sample size at `target` · N or more, by bisection.

        η* = max { η ∈ [0, 1] : ESS(exp(η s)) ≥ target · N },   s_n = log r(y⁺_n) + log r(y⁻_n)

    ESS falls monotonically in η: log(ESS/N) = 2K(η) − K(2η) with K the convex cumulant function of s, so its slope
    2K'(η) − 2K'(2η) is never positive. ESS(0) = N: an η always exists. `target` is a fraction in (0, 1]; jittable.
    """
    if isinstance(target, (int, float)) and not 0 < target <= 1:
        raise ValueError(f"target {target} must lie in (0, 1]: it is the effective sample size as a fraction of N.")
    scores = as_float(log_ratio_chosen) + as_float(log_ratio_rejected)
    scores = scores - _finite_max(scores)  # ESS does not see the shift, float32 does

    def enough(eta: Array) -> Array:
        return effective_sample_size(jnp.exp(_scaled(scores, eta))) >= target * scores.shape[0]

    def halve(_, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        fits = enough(middle)
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    zero, one = jnp.zeros((), scores.dtype), jnp.ones((), scores.dtype)
    low, _ = jax.lax.fori_loop(0, 60, halve, (zero, one))
    return jax.lax.stop_gradient(jnp.where(enough(one), one, low))


def weight_summary(weights: Float[AnyArray, " N"]) -> dict[str, Float[Array, ""]]:
    """What to look at before training on weights: ESS, extremes, quantiles, and the share of the heaviest pair.

    Keys: `ess` (pairs), `ess_fraction` (of N), `mean`, `min`, `max`, `largest_share` (max w / Σw), `q01` … `q99`.
    A mean far from 1 changes the step size; a large share means the reward model is fitted to one pair.
    """
    weights = as_float(weights)
    ess = effective_sample_size(weights)
    sum_ = jnp.sum(weights)
    summary = {
        "ess": ess,
        "ess_fraction": ess / weights.shape[0],
        "mean": jnp.mean(weights),
        "min": jnp.min(weights),
        "max": jnp.max(weights),
        "largest_share": jnp.max(weights) / jnp.where(sum_ > 0, sum_, 1.0),
    }
    values = jnp.quantile(weights, jnp.asarray(QUANTILES, weights.dtype))
    return summary | {f"q{round(100 * q):02d}": values[i] for i, q in enumerate(QUANTILES)}


def _scaled(scores: Float[Array, " B"], eta: Scalar) -> Float[Array, " B"]:
    """η s, with 0 · (−inf) = 0: a pair the policy cannot produce still weighs 1 at η = 0."""
    return jnp.where(jnp.asarray(eta) == 0, 0.0, eta * scores)


def _finite_max(scores: Float[Array, " B"]) -> Float[Array, ""]:
    largest = jnp.max(scores)
    return jnp.where(jnp.isfinite(largest), largest, 0.0)
