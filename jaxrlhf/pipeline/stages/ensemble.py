"""The reward models of a round as one scorer, and as inputs of a stage: one model, or the members of an ensemble."""

from collections.abc import Sequence

import numpy as np

from jaxrlhf.config import Config
from jaxrlhf.losses.ensemble import ensemble_score
from jaxrlhf.models.hub import reward_bias
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.scorers.reward_model import score_responses
from jaxrlhf.storage.stage import Done
from jaxrlhf.types import TextBatch


def spread_of(ensemble: str | None, config: Config) -> float | None:
    """How many of the members' deviations are taken off their mean (0 for "mean"); None where the reward is no ensemble."""
    return {None: None, "mean": 0.0, "mean-minus-spread": config.reward.spread_coef}[ensemble]


def reward_inputs(rewards: Sequence[Done]) -> dict[str, Done]:
    """The reward models as inputs of a stage: "reward", "reward-1", …"""
    return {f"reward-{n}" if n else "reward": done for n, done in enumerate(rewards)}


def reward_scores(
    run: RunContext, rewards: Sequence[Done], spread_coef: float | None, tables: Sequence[TextBatch]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(scores, spreads): of the responses in every table, float32 [N] each; no spreads where there is no ensemble.

    A score is in units of reward, each model's own bias taken off. One model is in memory at a time.
    """
    by_model = []
    for done in rewards:
        loaded = run.load(done, head="scalar")
        options = {"batch_size": run.config.reward.eval_batch_size, "mesh": run.mesh, "bias": reward_bias(loaded)}
        blocks = run.blocks.of(f"scores of {done.hash}")
        by_model.append([score_responses(loaded.model, loaded.params, table, blocks=blocks, **options) for table in tables])
        del loaded
    if spread_coef is None:
        return by_model[0], []
    joined = [ensemble_score(np.stack(members, axis=1), spread_coef=spread_coef) for members in zip(*by_model, strict=True)]
    return [np.asarray(score) for score, _ in joined], [np.asarray(spread) for _, spread in joined]
