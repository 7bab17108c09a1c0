"""Supervised fine-tuning: the likelihood of demonstrations."""

from jax import Array
from jaxtyping import Bool, Float

from jaxrlhf.losses.masked import AnyArray, Scalar, masked_mean


def sft_loss(logp: Float[AnyArray, "B T"], mask: Bool[AnyArray, "B T"], *, total: Scalar | None = None) -> Float[Array, ""]:
    """Mean negative log-likelihood of the tokens under the mask, in nats a token.

        L = −1/Σm Σ_t m_t log π(y_t | x, y_<t)

    The mean is over *tokens* of the whole batch, so long demonstrations count more; with micro-batches give `total`, since
    their token counts differ. Rows that only fill the batch must be False in `mask`.
    """
    return -masked_mean(logp, mask, total=total)
