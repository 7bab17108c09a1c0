"""The plain forms that what runs is tested against: statistics of tokens from whole logits, and the mask of a response from its ids."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxrlhf.losses.masked import AnyArray, Number, as_float
from jaxrlhf.types import TokenStats


def response_mask(tokens: Int[AnyArray, "*B T"], eos_ids: Sequence[int]) -> Bool[Array, "*B T"]:
    """True up to and including the first end-of-sequence token; everywhere when there is none.

        mask_t = 1[no y_s with s < t is in eos_ids]

    The first EOS itself is True: stopping is an action the policy must be trained on. The padding id is never
    looked at, because it may equal EOS.
    """
    is_eos = jnp.isin(jnp.asarray(tokens), jnp.asarray(tuple(eos_ids), jnp.int32))
    seen = jnp.cumsum(is_eos, axis=-1, dtype=jnp.int32) - is_eos
    return seen == 0


def token_logp(logits: Float[AnyArray, "B T V"], tokens: Int[AnyArray, "B T"], *, temperature: Number = 1.0) -> Float[Array, "B T"]:
    """Log-probability of each token under the tempered softmax.

        log π_τ(y_t) = z_{t,y_t} / τ − log Σ_v exp(z_{t,v} / τ)

    `logits[:, t]` are those that *predict* `tokens[:, t]`: the shift by one is the caller's. Computed in float32
    whatever the logits are: a bfloat16 softmax is off by up to 1e-2 a token, and sequence log-probs add that up.
    This is the plain reference that the chunked `Model.score_tokens` is tested against.
    """
    scaled = _tempered(logits, temperature)
    return _gather(scaled, tokens) - jax.nn.logsumexp(scaled, axis=-1)


def token_stats(logits: Float[AnyArray, "B T V"], tokens: Int[AnyArray, "B T"], *, temperature: Number = 1.0) -> TokenStats:
    """Log-probability, entropy and log-sum-of-squares of the tempered softmax at each token.

        log π(y_t),   H_t = −Σ_v π(v) log π(v),   log Σ_v π(v)²     (nats; all under π_τ)

    A logit of −inf (a forbidden token) is allowed: it has probability 0 and adds 0 to the entropy, gradient included.
    log Σπ² is what WPO aligns its weights with (Zhou et al., 2024, "WPO: Enhancing RLHF with Weighted Preference
    Optimization", §3).
    """
    scaled = _tempered(logits, temperature)
    log_z = jax.nn.logsumexp(scaled, axis=-1)
    logp_all = scaled - log_z[..., None]
    possible = jnp.isfinite(scaled)
    entropy = -jnp.sum(jnp.where(possible, jnp.exp(logp_all) * jnp.where(possible, logp_all, 0.0), 0.0), axis=-1)
    log_sum_sq = jax.nn.logsumexp(2.0 * logp_all, axis=-1)
    return TokenStats(logp_BT=_gather(scaled, tokens) - log_z, entropy_BT=entropy, log_sum_sq_BT=log_sum_sq)


def _tempered(logits: Float[AnyArray, "B T V"], temperature: Number) -> Float[Array, "B T V"]:
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0; greedy decoding reports its log-probs at temperature 1.")
    return as_float(logits) / temperature


def _gather(scaled: Float[Array, "B T V"], tokens: Int[AnyArray, "B T"]) -> Float[Array, "B T"]:
    return jnp.take_along_axis(scaled, jnp.asarray(tokens)[..., None], axis=-1)[..., 0]
