"""One optimizer step on preference pairs: Bradley–Terry, importance-weighted, DPO and whatever a user plugs in."""

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
import optax

from jaxrlhf.losses import sequence_logp
from jaxrlhf.steps.accumulate import ConstrainRows, accumulate_gradients, global_sum
from jaxrlhf.steps.state import apply_gradients, joined, named
from jaxrlhf.types import Array, Evaluate, Metrics, Model, PairBatch, PairLoss, PairOutputs, Params, TokenStats, TrainState

PairStep = Callable[..., tuple[TrainState, Metrics]]  # (state, PairBatch, frozen parameters or None)

# A loss over log-probs reports implicit rewards; they get the names TRL logs them under.
_IMPLICIT = {"accuracy": "rewards/accuracies", "margin": "rewards/margins", "chosen": "rewards/chosen", "rejected": "rewards/rejected"}


def response_scores(
    model: Model,
    params: Params,
    prompt_BL: Array,
    prompt_mask_BL: Array,
    response_BT: Array,
    response_mask_BT: Array,
    bias: float | Array = 0.0,
) -> Array:
    """The scalar head at the last token of the response mask (EOS, where there is one) less `bias`: float32 [B]; 0 for an empty mask.

    This one function reads the reward in training, in the bias pass, in evaluation and in PPO.
    """
    tokens = jnp.concatenate([prompt_BL, response_BT], axis=1)
    mask = jnp.concatenate([prompt_mask_BL, response_mask_BT], axis=1)
    scalars_BT = model.apply(params, tokens, mask, start=prompt_BL.shape[1]).scalars
    assert scalars_BT is not None, "a reward model has head 'scalar'"
    last_B = response_mask_BT.shape[1] - 1 - jnp.argmax(response_mask_BT[:, ::-1], axis=1)
    read_B = jnp.take_along_axis(scalars_BT, last_B[:, None], axis=1)[:, 0]
    return jnp.where(jnp.any(response_mask_BT, axis=1), read_B - bias, 0.0)


def pair_outputs(model: Model, params: Params, batch: PairBatch, *, head: str) -> PairOutputs:
    """Both sides of every pair through the model in one forward pass of 2B rows."""
    sides = (
        jnp.concatenate([batch.prompt_BL] * 2),
        jnp.concatenate([batch.prompt_mask_BL] * 2),
        jnp.concatenate([batch.chosen_BT, batch.rejected_BT]),
        jnp.concatenate([batch.chosen_mask_BT, batch.rejected_mask_BT]),
    )
    B = batch.row_mask_B.shape[0]
    if head == "scalar":
        scores = response_scores(model, params, *sides)
        return PairOutputs(scores[:B], scores[B:])
    prompt, prompt_mask, response, mask = sides
    stats = model.score_tokens(
        params, jnp.concatenate([prompt, response], axis=1), jnp.concatenate([prompt_mask, mask], axis=1), start=prompt.shape[1]
    )
    logp = sequence_logp(stats.logp_BT, mask)
    chosen, rejected = (TokenStats(*(x[half] for x in (stats.logp_BT, stats.entropy_BT, stats.log_sum_sq_BT)))
                        for half in (slice(None, B), slice(B, None)))  # fmt: skip
    return PairOutputs(logp[:B], logp[B:], chosen, rejected)


def make_pair_step(
    model: Model,
    pair_loss: PairLoss,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    axis_name: str | None = None,
    constrain_rows: ConstrainRows | None = None,
) -> PairStep:
    """A step (state, PairBatch, frozen=None) → (state, metrics) for any `PairLoss`.

    `frozen` are parameters of the model that do not learn, beside those in the state (`state.joined`): the base under adapters.
    The loss is a mean over the rows with `row_mask` True of the global batch, whatever `accumulate` and the devices. Where loss or gradient
    is not finite `step` counts, and nothing else changes (`apply_gradients`).
    """

    def step(state: TrainState, batch: PairBatch, frozen: Params | None = None) -> tuple[TrainState, Metrics]:
        missing = [name for name in pair_loss.columns if name not in batch.columns]
        if missing:
            have = ", ".join(sorted(batch.columns)) or "no columns"
            raise ValueError(f"the loss reads column {missing[0]!r}, but the pairs carry {have}; join it first.")
        total = global_sum(batch.row_mask_B.sum().astype(jnp.float32), axis_name)

        def loss_fn(params: Params, rows: PairBatch) -> tuple[Array, Metrics]:
            return pair_loss.loss(pair_outputs(model, joined(params, frozen), rows, head=pair_loss.head), rows, total=total)

        how = {"steps": accumulate, "axis_name": axis_name, "constrain_rows": constrain_rows}
        grads, loss, metrics = accumulate_gradients(loss_fn, state.params, batch, **how)
        state, norms = apply_gradients(state, grads, loss, optimizer)
        return replace(state, step=state.step + 1), {"loss/pair": loss, **_metric_names(pair_loss.head, metrics), **norms}

    return step


def make_pair_evaluation(model: Model, pair_loss: PairLoss, *, axis_name: str | None = None) -> Evaluate:
    """The loss of the step and its bare metrics, as a pass that learns nothing: see `types.Evaluate`."""

    def evaluate(params: Params, batch: PairBatch, frozen: Params | None = None) -> tuple[Array, Metrics]:
        total = global_sum(batch.row_mask_B.sum().astype(jnp.float32), axis_name)
        outputs = pair_outputs(model, joined(params, frozen), batch, head=pair_loss.head)
        loss, metrics = pair_loss.loss(outputs, batch, total=total)
        return batch.row_mask_B, {**global_sum({**metrics, "loss": loss}, axis_name), "total": total}

    return evaluate


def _metric_names(head: str, metrics: Metrics) -> Metrics:
    """pair/NAME, but rewards/… where a policy is its own reward model."""
    if head == "scalar":
        return named("pair", metrics)
    return {_IMPLICIT.get(name, f"pair/{name}"): value for name, value in metrics.items()}
