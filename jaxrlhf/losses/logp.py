"""Log-probabilities of whole responses."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxrlhf.losses.masked import AnyArray, masked_fill


def sequence_logp(logp: Float[AnyArray, "B T"], mask: Bool[AnyArray, "B T"]) -> Float[Array, " B"]:
    """Log-probability of each response: the sum over its tokens, EOS included.

        log π(y|x) = Σ_t m_t log π(y_t | x, y_<t)

    A sum, not a mean: density ratios and DPO need the probability of the response. (WPO alone uses the mean.)
    """
    return jnp.sum(masked_fill(logp, mask), axis=-1)
