"""Direct preference losses: a policy is its own reward model, r(x, y) = β log π(y|x)/π_ref(y|x)."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxrlhf.losses.bradley_terry import bradley_terry_loss, column, pair_metrics
from jaxrlhf.losses.masked import AnyArray, Number, Scalar, as_float, masked_fill, row_mean
from jaxrlhf.types import Metrics, PairBatch, PairOutputs


def dpo_loss(
    chosen_log_ratio: Float[AnyArray, " B"],
    rejected_log_ratio: Float[AnyArray, " B"],
    weights: Float[AnyArray, " B"] | None = None,
    *,
    beta: Number,
    label_smoothing: Number = 0.0,
    row_mask: Bool[AnyArray, " B"] | None = None,
    total: Scalar | None = None,
) -> Float[Array, ""]:
    """The Bradley–Terry loss of the implicit rewards β log π/π_ref.

        L = 1/B Σ_b w_b · −log σ( β (h⁺_b − h⁻_b) ),   h = log π(y|x) − log π_ref(y|x)

    Log-ratios are of whole responses (sums over tokens). At the reference policy the loss is log 2 for any β.
    `label_smoothing` ε mixes in the flipped pair: (1−ε) L(y⁺, y⁻) + ε L(y⁻, y⁺) (Mitchell, 2023, "cDPO"). TRL's `robust`
    subtracts that term instead and divides by 1 − 2ε (Chowdhury et al., 2024): another loss.
    Rafailov et al. (2023), eq. 7.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing {label_smoothing} must lie in [0, 0.5): it is the chance that a label is flipped.")
    chosen, rejected = beta * as_float(chosen_log_ratio), beta * as_float(rejected_log_ratio)
    loss = bradley_terry_loss(chosen, rejected, weights, row_mask=row_mask, total=total)
    if not label_smoothing:
        return loss
    flipped = bradley_terry_loss(rejected, chosen, weights, row_mask=row_mask, total=total)
    return (1 - label_smoothing) * loss + label_smoothing * flipped


def ipo_loss(
    chosen_log_ratio: Float[AnyArray, " B"],
    rejected_log_ratio: Float[AnyArray, " B"],
    weights: Float[AnyArray, " B"] | None = None,
    *,
    beta: Number,
    row_mask: Bool[AnyArray, " B"] | None = None,
    total: Scalar | None = None,
) -> Float[Array, ""]:
    """Squared distance of the log-ratio gap from the fixed target 1/(2β).

        L = 1/B Σ_b w_b · ( h⁺_b − h⁻_b − 1/(2β) )²

    β is the paper's τ: a *larger* β asks for a *smaller* gap. As eq. 17 has it, h is of whole responses; `ipo_mean` divides
    it by the response's length first, and its β is not on this scale. At the reference policy the loss is 1/(4β²).
    Azar et al. (2023), "A general theoretical paradigm to understand learning from human preferences", eq. 17.
    """
    row_mask = jnp.ones(chosen_log_ratio.shape, bool) if row_mask is None else row_mask
    gap = masked_fill(chosen_log_ratio, row_mask) - masked_fill(rejected_log_ratio, row_mask)
    return row_mean(jnp.square(gap - 1 / (2 * beta)), weights, row_mask, total=total)


def log_ratios(outputs: PairOutputs, batch: PairBatch) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """log π/π_ref of both responses, from the precomputed columns `reference_chosen_logp`, `reference_rejected_logp`."""
    return (
        as_float(outputs.chosen_B) - as_float(column(batch, "reference_chosen_logp")),
        as_float(outputs.rejected_B) - as_float(column(batch, "reference_rejected_logp")),
    )


def dpo_pair_loss(
    outputs: PairOutputs, batch: PairBatch, *, total: Scalar | None = None, beta: Number = 0.1, label_smoothing: Number = 0.0
) -> tuple[Float[Array, ""], Metrics]:
    """`dpo_loss` on a batch, weighted by `batch.weights_B`; metrics are of the implicit rewards β h."""
    chosen, rejected = log_ratios(outputs, batch)
    loss = dpo_loss(chosen, rejected, batch.weights_B, beta=beta, label_smoothing=label_smoothing, row_mask=batch.row_mask_B, total=total)
    return loss, pair_metrics(beta * chosen, beta * rejected, batch, total=total)


def ipo_pair_loss(
    outputs: PairOutputs, batch: PairBatch, *, total: Scalar | None = None, beta: Number = 0.1
) -> tuple[Float[Array, ""], Metrics]:
    """`ipo_loss` on a batch, weighted by `batch.weights_B`; metrics are of the implicit rewards β h."""
    chosen, rejected = log_ratios(outputs, batch)
    loss = ipo_loss(chosen, rejected, batch.weights_B, beta=beta, row_mask=batch.row_mask_B, total=total)
    return loss, pair_metrics(beta * chosen, beta * rejected, batch, total=total)


def ipo_mean_pair_loss(
    outputs: PairOutputs, batch: PairBatch, *, total: Scalar | None = None, beta: Number = 0.1
) -> tuple[Float[Array, ""], Metrics]:
    """`ipo_loss` of log-ratios *per token*, h/|y|, weighted by `batch.weights_B`: the gap no longer grows with the responses' length.

    What TRL calls `ipo`; its authors note that IPO's confirmed this form as the one behind the paper's results. Metrics are of the
    whole responses' β h, as there.
    """
    chosen, rejected = log_ratios(outputs, batch)
    means = chosen / _length(batch.chosen_mask_BT), rejected / _length(batch.rejected_mask_BT)
    loss = ipo_loss(*means, batch.weights_B, beta=beta, row_mask=batch.row_mask_B, total=total)
    return loss, pair_metrics(beta * chosen, beta * rejected, batch, total=total)


def _length(mask: Bool[AnyArray, "B T"]) -> Float[Array, " B"]:
    """Tokens of each response, EOS included; 1 for an empty one."""
    return jnp.maximum(jnp.sum(mask, axis=-1, dtype=jnp.float32), 1.0)
