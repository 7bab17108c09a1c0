"""Reward models: Bradley–Terry training on (weighted) pairs, and the bias that puts reference responses at 0."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from jaxrlhf import sharding
from jaxrlhf.algorithms.training import HeldOut, held_out, optimizer_of
from jaxrlhf.config import DPOConfig, RewardConfig
from jaxrlhf.data.batches import sides
from jaxrlhf.losses import bind, hyperparameter_names, pair_loss_named
from jaxrlhf.scorers.reward_model import score_responses
from jaxrlhf.steps.pair import make_pair_evaluation, make_pair_step
from jaxrlhf.types import Model, PairBatch, PairLoss, Params


def reward_loss(config: RewardConfig, plugin: Callable[[str], PairLoss]) -> PairLoss:
    """The section's pair loss with those of the section's hyperparameters bound that it has.

    Raises ValueError where it is not one for scalar heads, or does not know what the section sets.
    """
    name = _name(config)
    loss = pair_loss_named(name, "scalar", plugin, key="reward.loss", of="a reward model")
    if loss.defaults and len(loss.defaults) != len(loss.columns):
        raise ValueError(f"reward.loss {name!r} has {len(loss.columns)} columns and {len(loss.defaults)} defaults; give one each, or none.")
    if config.use_margin and "margin" not in loss.columns:
        raise ValueError(f"reward.use_margin is set, but reward.loss {name!r} reads no column 'margin'; unset it or name another loss.")
    center = config.center_rewards_coefficient
    if "center" in hyperparameter_names(loss):
        return bind(loss, center=center)
    if center:
        raise ValueError(
            f"reward.center_rewards_coefficient is {center}, but reward.loss {name!r} has no hyperparameter 'center'; "
            "set it to 0 or give the loss that keyword."
        )
    return loss


def _name(config: RewardConfig) -> str:
    """The name of the section's loss, where `use_margin` may stand for one."""
    return "bradley_terry_margin" if config.use_margin and config.loss == "bradley_terry" else config.loss


def called(config: RewardConfig) -> str:
    """The section's loss as messages call it."""
    return f"reward.loss {_name(config)!r}"


def check_columns(loss: PairLoss, reward_update: str | None, *, name: str, given: tuple[str, ...] = ("margin",)) -> None:
    """Raise ValueError where the loss called `name` reads a column that no pairs of the run will carry, or that round 1 has not.

    `given` are columns that do not come from a reward update; the package's own updates add none.
    """
    for place, column in enumerate(loss.columns):
        if column in given:
            continue
        if reward_update is None or ":" not in reward_update:
            has = "no reward update" if reward_update is None else f"reward update {reward_update!r}, which adds none"
            raise ValueError(
                f"{name} reads column {column!r}, which nothing makes: this method has {has}. Name a method whose reward_update is a "
                "function of your own that adds the column."
            )
        if not loss.defaults or loss.defaults[place] is None:
            raise ValueError(
                f"{name} reads column {column!r}, which no reward update has made in round 1; give PairLoss(…, defaults=(…,)) the value "
                "that stands for it until then."
            )


def with_columns(tokens: PairBatch, loss: PairLoss, *, name: str, updated: bool) -> PairBatch:
    """The pairs with a column for every name the loss reads: its default where no reward update has been made (`updated` False).

    Raises ValueError for a column that is not there after one, naming what is.
    """
    missing = [column for column in loss.columns if column not in tokens.columns]
    if not missing:
        return tokens
    defaults = dict(zip(loss.columns, loss.defaults, strict=False))
    if updated or any(defaults.get(column) is None for column in missing):
        have = ", ".join(sorted(tokens.columns)) or "none"
        after = "after the reward update the pairs carry" if updated else "the pairs carry"
        raise ValueError(
            f"{name} reads column {missing[0]!r}, but {after} {have}; return pairs whose tokens.columns have it "
            "(`dataclasses.replace(pairs.tokens, columns={…})`)."
        )
    made = {column: np.full(len(tokens.index_B), defaults[column], np.float32) for column in missing}
    return replace(tokens, columns={**tokens.columns, **made})


@lru_cache(maxsize=16)
def pair_trainer(model: Model, loss: PairLoss, config: RewardConfig | DPOConfig, steps: int, mesh: Any):
    """(optimizer, compiled step) of a reward model or of a policy fitted to pairs; cached, so that every refit of a run compiles once."""
    optimizer = optimizer_of(config, steps=steps)
    how = {"accumulate": config.gradient_accumulation_steps, "constrain_rows": sharding.constrain_rows(mesh)}
    return optimizer, sharding.step(lambda axis_name: make_pair_step(model, loss, optimizer, axis_name=axis_name, **how), mesh)


def held_out_pairs(
    model: Model, loss: PairLoss, name: str, pairs: PairBatch, config: RewardConfig | DPOConfig, mesh: Any, *frozen: Params
) -> HeldOut | None:
    """The section's look at held-out pairs, each with weight 1, by the loss called `name` (`training.held_out`)."""

    def rows() -> PairBatch:
        return with_columns(pairs, loss, name=f"{name} on held-out pairs (eval_steps)", updated=False)

    return held_out(make_pair_evaluation, model, loss, rows, config, mesh, *frozen)


def with_weights(tokens: PairBatch, weights_N: np.ndarray) -> PairBatch:
    """The pairs with their weights. Raises ValueError unless there is one finite weight ≥ 0 a pair."""
    weights = np.asarray(weights_N, np.float32)
    if weights.shape != (len(tokens.index_B),):
        raise ValueError(f"a reward update gave weights of shape {weights.shape} for {len(tokens.index_B)} pairs; give one a pair.")
    if not np.isfinite(weights).all() or (weights < 0).any():
        bad = weights[~np.isfinite(weights) | (weights < 0)][0]
        raise ValueError(f"weight {bad} is not a finite number ≥ 0; look at eta and alpha, or at your own update.")
    return replace(tokens, weights_B=weights)


def score_pairs(model: Model, params: Params, pairs: PairBatch, **how: Any) -> tuple[np.ndarray, np.ndarray]:
    """(chosen_N, rejected_N) scores; the bias cancels in whatever one does with them. `how` as `score_responses` takes it."""
    chosen, rejected = (score_responses(model, params, texts, **how) for texts in sides(pairs))
    return chosen, rejected
