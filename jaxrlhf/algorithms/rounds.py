"""The methods as rows of one table, and the rounds a row asks for.

A method is a row, a reward update is a function; the loop over the rounds (run/) knows neither.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxrlhf.algorithms.ocrm import importance_weighted
from jaxrlhf.algorithms.update import RewardUpdate, unweighted


@dataclass(frozen=True)
class Method:
    """What a round does to the four models. Corrections begin in round 2; round 1 is the same for every row."""

    policy_update: Literal["ppo"] = "ppo"
    reward_update: str | None = None  # a name in REWARD_UPDATES or module:attribute; None: the first reward model is kept
    update_rounds: Literal["all", "once"] = "all"  # once: in round 2, then kept
    reward_start: Literal["sft", "previous"] = "sft"  # sft: π_SFT's body with a new head
    reference: Literal["sft", "previous"] = "sft"
    policy_start: Literal["previous", "sft"] = "previous"
    restart_optimizer: bool = True
    restart_critic: bool = True  # True: the critic starts as a copy of the round's reward model


METHODS: dict[str, Method] = {
    "ppo": Method(),
    "ppo-moving-reference": Method(reference="previous"),
    "retrain": Method(reward_update="unweighted", reference="previous"),
    "ocrm": Method(reward_update="importance-weighted", reference="previous"),
    "ocrm-fixed-reference": Method(reward_update="importance-weighted"),
}

REWARD_UPDATES: dict[str, RewardUpdate] = {
    "unweighted": unweighted,
    "importance-weighted": importance_weighted,
}


class Round(NamedTuple):
    """What one round needs; policies and reward models are named by the round that made them, 0 is SFT."""

    number: int
    reward_update: str | None  # None in round 1 means: on all pairs with weight 1
    fits_reward: bool
    reward_start: Literal["sft", "previous"]
    reference: int
    policy_start: int
    moved_reference: bool
    restart_optimizer: bool
    restart_critic: bool


def rounds_of(method: Method, rounds: int) -> list[Round]:
    """The table's row, spelled out for every round."""
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least one round of PPO is needed.")
    return [_round(method, number) for number in range(1, rounds + 1)]


def _round(method: Method, number: int) -> Round:
    first = number == 1
    updates = not first and method.reward_update is not None and (method.update_rounds == "all" or number == 2)
    previous = number - 1
    return Round(
        number=number,
        reward_update=method.reward_update if updates else None,
        fits_reward=first or updates,
        reward_start="sft" if first else method.reward_start,
        reference=previous if method.reference == "previous" else 0,
        policy_start=previous if method.policy_start == "previous" else 0,
        moved_reference=method.reference == "previous" and not first,
        restart_optimizer=first or method.restart_optimizer,
        restart_critic=first or method.restart_critic,
    )


def method_named(name: str) -> Method:
    """The row `name`; an unknown name is an error that offers the nearest."""
    return _named(name, METHODS, "method")


def reward_update_named(name: str, plugin: Callable[[str], RewardUpdate]) -> RewardUpdate:
    """The update `name`, or what `module:attribute` names (resolved by `plugin`)."""
    return plugin(name) if ":" in name else _named(name, REWARD_UPDATES, "reward update")


def _named(name, table, what):
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} {name!r} is unknown; the table has {', '.join(table)}.{hint}")
    return table[name]
