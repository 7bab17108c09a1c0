"""Supervised training loops: what SFT and reward training have in common, and SFT."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.config import OptimizerConfig, SFTConfig, SupervisedConfig
from jaxrlhf.data.batches import evaluation_batches
from jaxrlhf.steps.sft import make_sft_step
from jaxrlhf.steps.state import adamw, learning_rate_schedule
from jaxrlhf.types import Evaluate, Metrics, Model, Params, TrainState

Trained = Iterator[tuple[TrainState, Metrics]]


def train(step: Callable, state: TrainState, batches: Iterator, *rest: Any) -> Trained:
    """The loop: one step (state, batch, *rest) a batch. Logging, saving and stopping are the caller's."""
    for batch in batches:
        state, metrics = step(state, batch, *rest)
        yield state, metrics


def num_steps(rows: int, section: SupervisedConfig) -> int:
    """Optimizer steps of a training: whole epochs (the last batch of each may be part-filled), at most `max_steps`."""
    if rows == 0:
        raise ValueError("there is nothing to train on: 0 rows are left after reading and the length limits.")
    steps = section.num_train_epochs * -(-rows // section.batch_size)
    return steps if section.max_steps is None else min(steps, section.max_steps)


def optimizer_of(config: OptimizerConfig, *, steps: int, learning_rate: float | None = None):
    """AdamW with the section's schedule over `steps` optimizer steps."""
    schedule = learning_rate_schedule(
        config.lr_scheduler_type,
        config.learning_rate if learning_rate is None else learning_rate,
        steps=steps,
        warmup_steps=config.warmup_steps,
    )
    return adamw(
        schedule,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay,
        weight_decay_on=config.weight_decay_on,
        max_grad_norm=config.max_grad_norm,
    )


def own_copy(params: Params) -> Params:
    """Parameters a training may donate without destroying the model they came from."""
    return jax.tree.map(jnp.copy, params)


class HeldOut(NamedTuple):
    """How a training is watched: `look(params)` gives "loss" and "accuracy" on held-out rows."""

    look: Callable[[Params], dict[str, float]]
    every: int  # steps
    best: Literal["loss", "accuracy"] | None  # the figure by which the parameters to go on with are chosen; None: those of the last step


def held_out(
    make: Callable[..., Evaluate],
    model: Model,
    what: Any,
    rows: Callable[[], Any],
    config: SupervisedConfig,
    mesh: Any,
    *frozen: Params,
) -> HeldOut | None:
    """The section's look at the table `rows()` by the pass `make(model, what, axis_name=…)`; None where it asks for none.

    It reads as many rows at once as a microbatch has, so it fits where the training does. Raises ValueError where there are no rows, or
    where the loss does not report the figure that is asked for.
    """
    if config.eval_steps is None:
        return None
    table, best = rows(), config.metric_for_best_model if config.load_best_model_at_end else None
    if len(table.index_B) == 0:
        raise ValueError("eval_steps asks for looks at held-out rows, and there are none: hold rows out (data.valid), or leave it out.")
    evaluate = _evaluation(make, model, what, mesh)
    size = sharding.rows_at_once(len(table.index_B), config.batch_size // config.gradient_accumulation_steps, mesh)

    def look(params: Params) -> dict[str, float]:
        batches = evaluation_batches(table, size)
        parts = jax.device_get([evaluate(params, sharding.place_batch(batch, mesh), *frozen)[1] for batch in batches])
        totals, known = [part["total"] for part in parts], [name for name in ("loss", "accuracy") if name in parts[0]]
        means = {name: float(np.average([part[name] for part in parts], weights=totals)) for name in known}
        if best is not None and best not in means:
            raise ValueError(f"metric_for_best_model is {best!r}, which the loss does not report; choose by 'loss'.")
        return means

    return HeldOut(look, config.eval_steps, best)


@lru_cache(maxsize=16)
def _evaluation(make: Callable[..., Evaluate], model: Model, what: Any, mesh: Any) -> sharding.Compiled:
    """Cached, so that every refit of a run compiles once."""
    return sharding.rows_and_metrics(lambda axis_name: make(model, what, axis_name=axis_name), mesh)


@lru_cache(maxsize=16)
def sft_trainer(model: Model, config: SFTConfig, steps: int, mesh: Any):
    """(optimizer, compiled step); cached, so that equal trainings compile once a process."""
    optimizer = optimizer_of(config, steps=steps)
    how = {"loss_on": config.loss_on, "accumulate": config.gradient_accumulation_steps, "constrain_rows": sharding.constrain_rows(mesh)}
    return optimizer, sharding.step(lambda axis_name: make_sft_step(model, optimizer, axis_name=axis_name, **how), mesh)
