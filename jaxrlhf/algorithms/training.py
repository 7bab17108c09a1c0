"""Supervised training loops: what SFT and reward training have in common, and SFT."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf import sharding
from jaxrlhf.config import OptimizerConfig, SFTConfig
from jaxrlhf.steps.sft import make_sft_step
from jaxrlhf.steps.state import adamw, learning_rate_schedule
from jaxrlhf.types import Metrics, Model, Params, TrainState

Trained = Iterator[tuple[TrainState, Metrics]]


def train(step: Callable, state: TrainState, batches: Iterator, *rest: Any) -> Trained:
    """The loop: one step (state, batch, *rest) a batch. Logging, saving and stopping are the caller's."""
    for batch in batches:
        state, metrics = step(state, batch, *rest)
        yield state, metrics


def num_steps(rows: int, *, batch_size: int, num_train_epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of a training: whole epochs (the last batch of each may be part-filled), at most `max_steps`."""
    if rows == 0:
        raise ValueError("there is nothing to train on: 0 rows are left after reading and the length limits.")
    steps = num_train_epochs * -(-rows // batch_size)
    return steps if max_steps is None else min(steps, max_steps)


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


@lru_cache(maxsize=16)
def sft_trainer(model: Model, config: SFTConfig, steps: int, mesh: Any):
    """(optimizer, compiled step); cached, so that equal trainings compile once a process."""
    optimizer = optimizer_of(config, steps=steps)
    how = {"loss_on": config.loss_on, "accumulate": config.gradient_accumulation_steps, "constrain_rows": sharding.constrain_rows(mesh)}
    return optimizer, sharding.step(lambda axis_name: make_sft_step(model, optimizer, axis_name=axis_name, **how), mesh)
