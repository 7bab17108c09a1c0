"""The Bradley–Terry likelihood of pairwise preferences."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxrlhf.losses.masked import AnyArray, Number, Scalar, masked_fill, masked_mean, row_mean
from jaxrlhf.types import Metrics, PairBatch, PairOutputs


def bradley_terry_loss(
    chosen: Float[AnyArray, " B"],
    rejected: Float[AnyArray, " B"],
    weights: Float[AnyArray, " B"] | None = None,
    *,
    margin: Float[AnyArray, " B"] | None = None,
    center: Number = 0.0,
    row_mask: Bool[AnyArray, " B"] | None = None,
    total: Scalar | None = None,
) -> Float[Array, ""]:
    """Mean negative log-likelihood of the preferences, optionally weighted.

        L = 1/B Σ_b w_b · ( −log σ(r⁺_b − r⁻_b − m_b) + center · (r⁺_b + r⁻_b)² )

    The mean is over rows, not over Σw: normalise weights where they are made. Weights carry no gradient.
    Likelihood: Ouyang et al. (2022), eq. 1. Margin m: Touvron et al. (2023, Llama 2), eq. 2. Centring, which pins the
    otherwise free offset of the scores: Eisenstein et al. (2023), "Helping or Herding?".
    """
    row_mask = jnp.ones(chosen.shape, bool) if row_mask is None else row_mask
    chosen, rejected = masked_fill(chosen, row_mask), masked_fill(rejected, row_mask)
    gap = chosen - rejected if margin is None else chosen - rejected - masked_fill(margin, row_mask)
    losses = -jax.nn.log_sigmoid(gap)
    if center:
        losses = losses + center * jnp.square(chosen + rejected)
    return row_mean(losses, weights, row_mask, total=total)


def pair_metrics(
    chosen: Float[AnyArray, " B"], rejected: Float[AnyArray, " B"], batch: PairBatch, *, total: Scalar | None = None
) -> Metrics:
    """What every pair loss reports: accuracy (a tie counts ½), margin, both mean scores and the mean weight.

    Each is a sum over real rows divided by `total`, so the metrics of micro-batches add up as their losses do.
    Rows are counted once each, whatever their weight.
    """
    rows = batch.row_mask_B
    gap = masked_fill(chosen, rows) - masked_fill(rejected, rows)
    values = {
        "accuracy": 0.5 * (1.0 + jnp.sign(gap)),
        "margin": gap,
        "chosen": chosen,
        "rejected": rejected,
        "weight": batch.weights_B,
    }
    return {name: masked_mean(value, rows, total=total) for name, value in values.items()}


def bradley_terry_pair_loss(
    outputs: PairOutputs, batch: PairBatch, *, total: Scalar | None = None, center: Number = 0.0
) -> tuple[Float[Array, ""], Metrics]:
    """`bradley_terry_loss` on a batch, weighted by `batch.weights_B`; the loss of OCRM, FRFT and plain reward models."""
    loss = bradley_terry_loss(outputs.chosen_B, outputs.rejected_B, batch.weights_B, center=center, row_mask=batch.row_mask_B, total=total)
    return loss, pair_metrics(outputs.chosen_B, outputs.rejected_B, batch, total=total)


def bradley_terry_margin_pair_loss(
    outputs: PairOutputs, batch: PairBatch, *, total: Scalar | None = None, center: Number = 0.0
) -> tuple[Float[Array, ""], Metrics]:
    """As `bradley_terry_pair_loss`, with the column `margin` subtracted from the gap of scores."""
    loss = bradley_terry_loss(
        outputs.chosen_B,
        outputs.rejected_B,
        batch.weights_B,
        margin=column(batch, "margin"),
        center=center,
        row_mask=batch.row_mask_B,
        total=total,
    )
    return loss, pair_metrics(outputs.chosen_B, outputs.rejected_B, batch, total=total)


def column(batch: PairBatch, name: str) -> Array:
    """A precomputed column of the batch; an error that names what is there when it is missing."""
    if name not in batch.columns:
        have = ", ".join(sorted(batch.columns)) or "none"
        raise KeyError(f"the loss reads column '{name}', the batch has {have}; precompute and join it before training.")
    return batch.columns[name]
