"""The true reward, where a run has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrlhf import distributed
from jaxrlhf.config import Config
from jaxrlhf.data.pairs import Prompt
from jaxrlhf.data.tokens import Limits
from jaxrlhf.models import DecoderConfig
from jaxrlhf.models.hub import read_config, resolve
from jaxrlhf.scorers import Scorer
from jaxrlhf.scorers.function import function_scorer
from jaxrlhf.scorers.reward_model import reward_model_scorer
from jaxrlhf.scorers.toy import toy_gold


def try_gold(gold: Scorer | None, rows: list[Prompt]) -> None:
    """Call a gold function once, on the references of a few prompts: what is wrong with its answer is said before anything is built."""
    if gold is not None:
        gold([row.prompt for row in rows], [row.reference or "" for row in rows])


def gold_of(config: Config, mesh: Any = None) -> Scorer | None:
    """The true reward, or None where the config names none."""
    gold = config.gold
    if gold.kind == "toy":
        return toy_gold(config.data.toy)
    if gold.kind == "function":
        return scored_by_leader(function_scorer(gold.source or ""))
    if gold.kind == "model":
        limits = gold_limits(config, read_config(resolve(gold.source or "")))
        return reward_model_scorer(gold.source or "", batch_size=gold.batch_size, limits=limits, dtype=gold.dtype, mesh=mesh)
    return None


def scored_by_leader(scorer: Scorer) -> Scorer:
    """A scorer that of several processes the leader asks, for all: a user's function may ask a server, or not say the same thing twice."""

    def score(prompts: Sequence[str], responses: Sequence[str], /) -> np.ndarray:
        said = scorer(prompts, responses).tolist() if distributed.is_leader() else None
        return np.asarray(distributed.agree(said, "gold"), np.float32)

    return score


def gold_limits(config: Config, model: DecoderConfig) -> Limits:
    """Twice the run's, because gold's tokenizer may need more tokens for a text; less where gold has not learned so many positions."""
    prompt, response = 2 * config.data.limits.max_prompt_length, 2 * config.data.limits.max_response_length
    if model.positions == "learned":
        response = min(response, model.max_positions // 2)
        prompt = min(prompt, model.max_positions - response)
    return Limits(prompt, response, "truncate", "truncate")
