"""The compiled programs of a run, in the order it runs them, each with the shapes it is called with and all that is in memory meanwhile.

They come from the same trainers and passes that the stages use (`run/models.py`, `run/data.py`, `run/preference.py`, `run/evaluate.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from jaxrlhf import sharding
from jaxrlhf.config import Config
from jaxrlhf.models.lora import adapters
from jaxrlhf.plan.counts import Counts
from jaxrlhf.plan.models import KEY, PlannedModels, gold_model, models_of, shapes_of
from jaxrlhf.types import Params


@dataclass(frozen=True)
class Phase:
    """One program: `function.lower(*arguments)` is what the run compiles.

    `held`: trees of shapes that are in memory while it runs, by name, arguments and others; rows apart. `rows`: the arrays that have
    rows. `calls` in a whole run, None where the number of rows is not known. `tokens` of a call; `loop`: rounds of a loop that may end
    early (sampling), at most. `layers` of the decoder it runs; 0: no decoder.
    """

    stage: str
    name: str
    function: sharding.Compiled
    arguments: tuple[Any, ...]
    held: dict[str, Any]
    rows: Any
    calls: int | None
    tokens: int
    layers: int
    knobs: tuple[str, ...]
    loop: int = 1
    learned: Any = None  # the tree that has gradients, in a training step

    @property
    def title(self) -> str:
        return f"{self.stage}: {self.name}"


@dataclass(frozen=True)
class Planner:
    """What the phases of one config are made from."""

    config: Config
    subjects: PlannedModels
    counts: Counts
    mesh: Any

    @property
    def models(self):
        return models_of(self.config, self.subjects, self.mesh)

    @property
    def policy(self) -> Params:
        return shapes_of(self.models[0])

    @property
    def scalar(self) -> Params:
        return shapes_of(self.models[1])

    def split_params(self) -> tuple[Params, Params | None]:
        """(what learns of the policy, what is frozen): its adapters and its base, or all of it and None."""
        lora = self.config.lora
        if not lora.r:
            return self.policy, None
        how = {"r": lora.r, "alpha": lora.alpha, "targets": lora.target_modules}
        return jax.eval_shape(lambda params, key: adapters(params, key, **how), self.policy, KEY)

    @property
    def gold_held(self) -> dict[str, Any]:
        """The gold model, which stays in memory for as long as a stage has texts for it."""
        if self.subjects.gold is None:
            return {}
        return {"gold": shapes_of(gold_model(self.config, self.subjects.gold, self.mesh))}

    @property
    def lengths(self) -> tuple[int, int, int]:
        """(prompt, response of the data, response of a policy), tokens."""
        limits = self.config.data.limits
        return limits.max_prompt_length, limits.max_response_length, self.config.ppo.response_length

    @property
    def layers(self) -> int:
        return self.subjects.base.num_layers

    def pairs_width(self) -> int:
        """Response tokens of a training pair."""
        _, T, response = self.lengths
        return response if self.config.pairs.source == "sample" else T
