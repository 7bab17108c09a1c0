"""One optimizer step of supervised fine-tuning."""

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
import optax

from jaxrlhf.losses import masked_mean, sft_loss
from jaxrlhf.steps.accumulate import ConstrainRows, accumulate_gradients, global_sum
from jaxrlhf.steps.state import apply_gradients
from jaxrlhf.types import Array, Evaluate, Metrics, Model, Params, TextBatch, TokenStats, TrainState

SFTStep = Callable[[TrainState, TextBatch], tuple[TrainState, Metrics]]


def text_loss(model: Model, params: Params, batch: TextBatch, *, loss_on: str, total: Array) -> tuple[Array, TokenStats]:
    """−Σ log π(token) / total over the response tokens, or over all tokens but each row's first (`loss_on="all"`), and what it read."""
    tokens = jnp.concatenate([batch.prompt_BL, batch.response_BT], axis=1)
    mask = jnp.concatenate([batch.prompt_mask_BL, batch.response_mask_BT], axis=1)
    start = batch.prompt_BL.shape[1] if loss_on == "response" else 1
    stats = model.score_tokens(params, tokens, mask, start=start, temperature=1.0)
    return sft_loss(stats.logp_BT, loss_mask(batch, loss_on), total=total), stats


def loss_mask(batch: TextBatch, loss_on: str) -> Array:
    """Which tokens are learned: [B, T] for "response", [B, L + T − 1] for "all". Rows that only fill the batch have none."""
    rows = batch.row_mask_B[:, None]
    if loss_on == "response":
        return batch.response_mask_BT & rows
    mask = jnp.concatenate([batch.prompt_mask_BL, batch.response_mask_BT], axis=1)
    return mask[:, 1:] & mask[:, :-1] & rows  # a row's first token has nothing to be predicted from


def make_sft_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    loss_on: str = "response",
    accumulate: int = 1,
    axis_name: str | None = None,
    constrain_rows: ConstrainRows | None = None,
) -> SFTStep:
    """A step (state, TextBatch) → (state, metrics); the loss is a mean over the learned tokens of the global batch.

    Where loss or gradient is not finite `step` counts, and nothing else changes (`apply_gradients`).
    """
    if loss_on not in ("response", "all"):
        raise ValueError(f"loss_on {loss_on!r} is unknown; use 'response' or 'all'.")

    def step(state: TrainState, batch: TextBatch) -> tuple[TrainState, Metrics]:
        total = global_sum(loss_mask(batch, loss_on).sum().astype(jnp.float32), axis_name)

        def loss_fn(params: Params, rows: TextBatch) -> tuple[Array, Metrics]:
            return text_loss(model, params, rows, loss_on=loss_on, total=total)[0], {}

        how = {"steps": accumulate, "axis_name": axis_name, "constrain_rows": constrain_rows}
        grads, loss, _ = accumulate_gradients(loss_fn, state.params, batch, **how)
        state, norms = apply_gradients(state, grads, loss, optimizer)
        return replace(state, step=state.step + 1), {"loss/sft": loss, "tokens": total, **norms}

    return step


def make_sft_evaluation(model: Model, loss_on: str, *, axis_name: str | None = None) -> Evaluate:
    """The loss of the step, and how many of its tokens are the likeliest, as a pass that learns nothing: see `types.Evaluate`."""

    def evaluate(params: Params, batch: TextBatch) -> tuple[Array, Metrics]:
        mask = loss_mask(batch, loss_on)
        total = global_sum(mask.sum().astype(jnp.float32), axis_name)
        loss, stats = text_loss(model, params, batch, loss_on=loss_on, total=total)
        assert stats.greedy_BT is not None
        right = masked_mean(stats.greedy_BT.astype(jnp.float32), mask, total=total)
        return batch.row_mask_B, {**global_sum({"loss": loss, "accuracy": right}, axis_name), "total": total}

    return evaluate
