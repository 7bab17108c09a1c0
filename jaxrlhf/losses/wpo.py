"""Weighted preference optimisation: the DPO loss under weights that say how on-policy each pair is."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxrlhf.losses.bradley_terry import pair_metrics
from jaxrlhf.losses.dpo import dpo_loss, log_ratios
from jaxrlhf.losses.masked import AnyArray, Number, Scalar, masked_fill, masked_mean
from jaxrlhf.types import Metrics, PairBatch, PairOutputs, TokenStats


def wpo_weights(
    chosen: TokenStats,
    chosen_mask: Bool[AnyArray, "B T"],
    rejected: TokenStats,
    rejected_mask: Bool[AnyArray, "B U"],
    *,
    clip: Number | None = 1.0,
) -> Float[Array, " B"]:
    """How likely the current policy is to produce the pair, per token and relative to sampling from it.

        s(y) = 1/|y| Σ_t [ log π(y_t) − log Σ_v π(v)² ],   w = min( clip, exp( s(y⁺) + s(y⁻) ) )

    A *mean* over tokens, and no reference model: unlike OCRM's weights these are not density ratios. They are those of
    the policy being trained, recomputed at every step, and carry no gradient. `clip=1` is the authors' code and OCRM's;
    `clip=None` leaves them unbounded, as TRL 1.x does. Zhou et al. (2024), "WPO", §3 ("sampled alignment").
    """
    weights = jnp.exp(_alignment(chosen, chosen_mask) + _alignment(rejected, rejected_mask))
    return jax.lax.stop_gradient(weights if clip is None else jnp.minimum(weights, clip))


def wpo_pair_loss(
    outputs: PairOutputs,
    batch: PairBatch,
    *,
    total: Scalar | None = None,
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
    clip: Number | None = 1.0,
) -> tuple[Float[Array, ""], Metrics]:
    """`dpo_loss` under `wpo_weights` times `batch.weights_B`; adds the mean WPO weight to the metrics."""
    if outputs.chosen_stats is None or outputs.rejected_stats is None:
        raise ValueError("wpo needs the token statistics of both responses; PairOutputs carries none: use an lm head.")
    wpo = wpo_weights(outputs.chosen_stats, batch.chosen_mask_BT, outputs.rejected_stats, batch.rejected_mask_BT, clip=clip)
    chosen, rejected = log_ratios(outputs, batch)
    weights = wpo * masked_fill(batch.weights_B, batch.row_mask_B)
    loss = dpo_loss(chosen, rejected, weights, beta=beta, label_smoothing=label_smoothing, row_mask=batch.row_mask_B, total=total)
    metrics = pair_metrics(beta * chosen, beta * rejected, batch, total=total)
    return loss, metrics | {"wpo_weight": masked_mean(wpo, batch.row_mask_B, total=total)}


def _alignment(stats: TokenStats, mask: Bool[AnyArray, "B T"]) -> Float[Array, " B"]:
    aligned = masked_fill(stats.logp_BT, mask) - masked_fill(stats.log_sum_sq_BT, mask)
    return jnp.sum(aligned, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)
