"""The KL penalty: estimating it, putting it into rewards, steering its coefficient."""

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Num

from jaxrlhf.losses.advantages import Placement, check_placement
from jaxrlhf.losses.masked import AnyArray, Number, Scalar, as_float, masked_fill


def kl_estimate(
    logp: Float[AnyArray, "B T"],
    reference_logp: Float[AnyArray, "B T"],
    *,
    estimator: Literal["k1", "k2", "k3"] = "k1",
    mask: Bool[AnyArray, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """Per-token estimate of KL(π ‖ π_ref) from tokens sampled from π, in nats.

        d = log π − log π_ref:   k1 = d,   k2 = d²/2,   k3 = e^{−d} − 1 + d

    k1 is unbiased and may be negative; k3 is unbiased and never negative, but its tail is heavy; k2 is biased and never
    negative. Both log-probs must be taken at the same temperature, or the estimate is not 0 for equal models. With
    `mask`, padding may hold anything and gets 0. Schulman (2020), "Approximating KL divergence".
    """
    if mask is not None:
        logp, reference_logp = masked_fill(logp, mask), masked_fill(reference_logp, mask)
    difference = as_float(logp) - as_float(reference_logp)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * jnp.square(difference)
    if estimator == "k3":
        return jnp.expm1(-difference) + difference
    raise ValueError(f'estimator {estimator!r} is not one of "k1", "k2", "k3".')


def shaped_rewards(
    scores: Num[AnyArray, " B"],
    kl: Num[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"],
    *,
    kl_coef: Scalar,
    placement: Placement = "after_eos",
) -> Float[Array, "B T"]:
    """Token rewards: the KL penalty at every response token, the score once at the end.

        r_t = −β kl_t for t ≤ len;   r_p += score,   p = min(len + 1, T − 1) (after_eos) or len (at_eos)

    After EOS is where the reference implementation of N+ puts the score; without room it falls back to the last position.
    Always floating point, whatever the scores are: an integer buffer would silently truncate 0.75 to 0. A row without
    any response token gets no reward. Stiennon et al. (2020), §3.4; Huang et al. (2024).
    """
    check_placement(placement)
    length = mask.shape[1]
    last = length - 1 - jnp.argmax(jnp.asarray(mask)[:, ::-1], axis=1)
    place = jnp.minimum(last + 1, length - 1) if placement == "after_eos" else last
    lands = (jnp.arange(length) == place[:, None]) & jnp.any(mask, axis=1, keepdims=True)
    return -jnp.asarray(kl_coef, jnp.float32) * masked_fill(kl, mask) + jnp.where(lands, as_float(scores)[:, None], 0.0)


def adaptive_kl(coef: Scalar, kl: Scalar, *, target: Number, horizon: Number, steps: Scalar) -> Float[Array, ""]:
    """The KL coefficient after `steps` more episodes, pushed so that the KL of a response approaches `target` nats.

        e = clip(KL / target − 1, −0.2, 0.2),   β ← β (1 + e · steps / horizon)

    `kl` is the mean over *responses* (summed over tokens); `steps` counts episodes, not updates. The error is clipped, so
    β changes by at most 20 % · steps / horizon. Ziegler et al. (2019), "Fine-tuning language models from human
    preferences", §2.2.
    """
    if not (target > 0 and horizon > 0):
        raise ValueError(f"target {target} and horizon {horizon} must be above 0.")
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -0.2, 0.2)
    return jnp.asarray(coef, jnp.float32) * (1.0 + error * steps / horizon)
