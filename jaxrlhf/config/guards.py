"""Config of the guards: bounds beyond which a figure of a run is said to be wrong, and which of them end it. No stage depends on them."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from jaxrlhf.config.data import STRICT

GuardName = Literal["reward", "reward_own_text", "ties", "cut", "empty", "kl", "entropy", "ess", "length_correlation"]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class GuardsConfig:
    """Where each guard of evaluation/guards.py speaks; where the defaults come from stands in docs/evaluation.md."""

    __pydantic_config__ = STRICT

    kl: Annotated[float, Field(gt=0)] = 50.0  # above so many nats a response: a rollout's to the reference, an evaluation's to SFT
    entropy: Annotated[float, Field(ge=0)] = 0.01  # below so many nats a token; 0: never
    ess: Share = 0.1  # below this share of the pairs; 0: never
    cut: Share = 0.9  # above this share of responses without EOS; 1: never
    empty: Share = 0.9  # above this share of responses without text; 1: never
    ties: Share = 0.9  # above this share of pairs of different responses that gold scores alike; 1: never
    length_correlation: Share = 0.8  # above this |r| of the reward model's score with a response's length; 1: never
    stop: tuple[GuardName, ...] | Literal["all"] = ()  # guards that end the run; the others speak, and it goes on
