"""Every reduction of the losses: sums, means and whitening over boolean masks, and the only collectives of the maths.

Three rules hold in here so that no loss has to repeat them. A masked-out entry may hold anything, NaN and infinity
included: values go through `where`, never through a product with the mask. An empty mask gives 0 with finite gradients.
A mean divides by `total` when it is given, so that the sums of micro-batches and devices add up to the big batch's mean.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Num

AnyArray: TypeAlias = Array | np.ndarray
Number: TypeAlias = float | int  # a hyperparameter that is static under jit
Scalar: TypeAlias = float | int | np.number | Num[AnyArray, ""]  # one that may be traced


def as_float(values: Num[AnyArray, "*S"]) -> Float[Array, "*S"]:
    """The values in at least float32: half precision and integers are promoted, float64 is kept."""
    return jnp.asarray(values, jnp.promote_types(values.dtype, jnp.float32))


def masked_fill(values: Num[AnyArray, "*S"], mask: Bool[AnyArray, "*S"]) -> Float[Array, "*S"]:
    """The values with 0 where the mask is False, so that what follows is finite there, and so is its gradient."""
    return jnp.where(mask, as_float(values), 0.0)


def masked_count(mask: Bool[AnyArray, "..."]) -> Float[Array, ""]:
    """The number of True entries as a float32: the `total` of a batch that is not split."""
    return jnp.sum(mask, dtype=jnp.float32)


def masked_sum(values: Num[AnyArray, "*S"], mask: Bool[AnyArray, "*S"]) -> Float[Array, ""]:
    """Sum of the values where the mask is True.

        Σ_i m_i x_i

    Entries outside the mask may be NaN or infinite: they reach neither the sum nor the gradient.
    """
    return jnp.sum(masked_fill(values, mask))


def masked_mean(values: Num[AnyArray, "*S"], mask: Bool[AnyArray, "*S"], *, total: Scalar | None = None) -> Float[Array, ""]:
    """Mean of the values where the mask is True.

        Σ_i m_i x_i / total,   total = Σ_i m_i by default

    `total` is the count of the whole (global) batch: give it to every micro-batch and *add* the results; averaging
    averages is wrong as soon as the counts differ. A total of 0 gives 0.
    """
    return _divide(masked_sum(values, mask), masked_count(mask) if total is None else total)


def row_mean(
    losses: Float[AnyArray, " B"],
    weights: Float[AnyArray, " B"] | None,
    row_mask: Bool[AnyArray, " B"],
    *,
    total: Scalar | None = None,
) -> Float[Array, ""]:
    """Mean over rows of weight times loss.

        1/B Σ_b w_b l_b

    B counts the rows with `row_mask` True, never Σw: normalise weights where they are made. Weights carry no gradient.
    """
    if weights is not None:
        losses = jax.lax.stop_gradient(masked_fill(weights, row_mask)) * masked_fill(losses, row_mask)
    return masked_mean(losses, row_mask, total=total)


def masked_whiten(
    values: Num[AnyArray, "*S"], mask: Bool[AnyArray, "*S"], *, shift_mean: bool = True, axis_name: str | None = None
) -> Float[Array, "*S"]:
    """Values scaled to unit variance, and to zero mean unless `shift_mean` is False; 0 outside the mask.

        (x − μ) / sqrt(σ² + 1e-8)   [+ μ when the mean is kept],   μ, σ² over m_i = 1

    σ² is the *biased* variance. With `axis_name` the statistics are those of the global batch, which the
    reference implementation of N+ does not do (it whitens per process).
    Huang et al. (2024), "The N+ implementation details of RLHF with PPO", detail 25.
    """
    values = masked_fill(values, mask)
    count = _over_axis(masked_count(mask), axis_name)
    mean = _divide(_over_axis(jnp.sum(values), axis_name), count)
    centred = jnp.where(mask, values - mean, 0.0)
    variance = _divide(_over_axis(jnp.sum(jnp.square(centred)), axis_name), count)
    whitened = centred * jax.lax.rsqrt(variance + 1e-8)
    return whitened if shift_mean else jnp.where(mask, whitened + mean, 0.0)


def _over_axis(value: Float[Array, ""], axis_name: str | None) -> Float[Array, ""]:
    return value if axis_name is None else jax.lax.psum(value, axis_name)


def _divide(total: Float[Array, ""], count: Scalar) -> Float[Array, ""]:
    count = jnp.asarray(count, total.dtype)
    return total / jnp.where(count > 0, count, 1.0)
