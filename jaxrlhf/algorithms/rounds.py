"""The methods as rows of one table, and the rounds a row asks for.

A method is a row, a reward update is a function; the loop over the rounds (run/) knows neither.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from jaxrlhf.algorithms.frft import nearest, nearest_importance_weighted, random_subset
from jaxrlhf.algorithms.ocrm import importance_weighted
from jaxrlhf.algorithms.reward_update import RewardUpdate, unweighted
from jaxrlhf.algorithms.rlp import synthetic

PREFERENCE = ("dpo", "wpo")  # policy updates that learn from pairs and need no reward model


@dataclass(frozen=True)
class Method:
    """What a round does to the four models. Corrections begin in round 2; round 1 is the same for every row."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    policy_update: Literal["ppo", "rloo", "dpo", "wpo"] = "ppo"
    reward_update: str | None = None  # a name in REWARD_UPDATES or module:attribute; None: the first reward model is kept
    update_rounds: Literal["all", "once"] = "all"  # once: at the first refit (round 2), then kept
    reward_start: Literal["sft", "previous"] = "sft"  # sft: π_SFT's body with a new head
    reference: Literal["sft", "previous"] = "sft"  # of the KL penalty
    policy_start: Literal["previous", "sft"] = "previous"
    restart_optimizer: bool = True
    restart_critic: bool = True  # True: the critic starts as a copy of the round's reward model
    ensemble: Literal["mean", "mean-minus-spread"] | None = None  # of `reward.ensemble_size` reward models, and how their scores become one

    @property
    def needs_reward(self) -> bool:
        return self.policy_update not in PREFERENCE or self.reward_update is not None


METHODS: dict[str, Method] = {
    "ppo": Method(),
    "ppo-moving-reference": Method(reference="previous"),
    "ppo-ensemble": Method(ensemble="mean"),
    "ppo-pessimistic": Method(ensemble="mean-minus-spread"),
    "rloo": Method(policy_update="rloo"),
    "retrain": Method(reward_update="unweighted", reference="previous"),
    "retrain-fixed-reference": Method(reward_update="unweighted"),
    "frft": Method(reward_update="nearest", update_rounds="once"),
    "frft-alpha": Method(reward_update="nearest"),
    "random-subset": Method(reward_update="random-subset"),  # the control of frft-alpha
    "random-subset-once": Method(reward_update="random-subset", update_rounds="once"),  # the control of frft
    "ocrm": Method(reward_update="importance-weighted", reference="previous"),
    "ocrm-fixed-reference": Method(reward_update="importance-weighted"),
    "frft+ocrm": Method(reward_update="nearest-importance-weighted", reference="previous"),
    "rlp-spg": Method(reward_update="synthetic", policy_start="sft"),
    "dpo": Method(policy_update="dpo", policy_start="sft"),
    "wpo": Method(policy_update="wpo", policy_start="sft"),
}

REWARD_UPDATES: dict[str, RewardUpdate] = {
    "unweighted": unweighted,
    "importance-weighted": importance_weighted,
    "nearest": nearest,
    "random-subset": random_subset,
    "nearest-importance-weighted": nearest_importance_weighted,
    "synthetic": synthetic,
}

# The config sections a reward update reads: what its result depends on beside the models and the pairs.
SECTIONS_READ: dict[str, tuple[str, ...]] = {
    "unweighted": (),
    "importance-weighted": ("weights",),
    "nearest": ("filter", "encoder"),
    "random-subset": ("filter", "encoder"),
    "nearest-importance-weighted": ("filter", "encoder", "weights"),
    "synthetic": ("synthesize", "encoder"),
}


class Round(NamedTuple):
    """What one round needs; policies are named by the round that made them, 0 is π_SFT."""

    number: int
    policy_update: Literal["ppo", "rloo", "dpo", "wpo"]
    reward_update: str | None  # None in round 1 means: on all pairs with weight 1
    fits_reward: bool
    reward_start: Literal["sft", "previous"]
    ensemble: Literal["mean", "mean-minus-spread"] | None
    reference: int
    policy_start: int
    moved_reference: bool
    restart_optimizer: bool
    restart_critic: bool


def num_rounds(method: Method, rounds: int) -> int:
    """How many rounds a row has: one where every further one would only repeat it (DPO from and against π_SFT on the same pairs)."""
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least one round of training is needed.")
    from_sft = (method.policy_start, method.reference, method.reward_update) == ("sft", "sft", None)
    return 1 if from_sft and method.policy_update in PREFERENCE else rounds


def round_of(method: Method, number: int, last: Round | None = None, *, due: bool = True, updated: bool = False) -> Round:
    """The table's row, spelled out for round `number`; `last` is the round before.

    `due`: a refit is due (always, unless the config says otherwise). Where it is not, the round goes on with the policy, the reward model,
    the KL reference, the optimizer and the critic of the last one, whatever the row says.
    `updated`: the row's one update has been made (update_rounds: once).
    """
    if number == 1 or last is None:
        return Round(
            1, method.policy_update, None, method.needs_reward, "sft", method.ensemble,
            reference=0, policy_start=0, moved_reference=False, restart_optimizer=True, restart_critic=True,
        )  # fmt: skip
    if not due and method.reward_update is not None:
        return last._replace(
            number=number, reward_update=None, fits_reward=False, policy_start=number - 1, restart_optimizer=False, restart_critic=False
        )
    updates = method.reward_update is not None and not (method.update_rounds == "once" and updated)
    moved = method.reference == "previous"
    return Round(
        number=number,
        policy_update=method.policy_update,
        reward_update=method.reward_update if updates else None,
        fits_reward=updates,
        reward_start=method.reward_start,
        ensemble=method.ensemble,
        reference=number - 1 if moved else 0,
        policy_start=number - 1 if method.policy_start == "previous" else 0,
        moved_reference=moved,
        restart_optimizer=method.restart_optimizer,
        restart_critic=method.restart_critic,
    )


def method_of(name: str, changes: Mapping[str, Any], plugin: Callable[[str], Any]) -> Method:
    """The row `name` (or the Method that `module:attribute` names), with some of its columns changed.

    Raises ValueError for an unknown row, something that is no Method, or a column or value the table does not have.
    """
    method = plugin(name) if ":" in name else _named(name, METHODS, "method")
    if not isinstance(method, Method):
        raise ValueError(f"method {name!r} is a {type(method).__name__}; name a jaxrlhf.algorithms.rounds.Method(…).")
    if not changes and ":" not in name:
        return method
    try:
        return TypeAdapter(Method).validate_python(dataclasses.asdict(method) | dict(changes))
    except ValidationError as error:
        fault = error.errors()[0]
        column = fault["loc"][0] if fault["loc"] else "?"
        known = [f.name for f in dataclasses.fields(Method)]
        if column not in known:
            raise ValueError(f"row.{column} is no column of a method; the columns are {', '.join(known)}.") from None
        raise ValueError(f"row.{column} is {fault['input']!r}: {fault['msg']}.") from None


def reward_update_named(name: str, plugin: Callable[[str], RewardUpdate]) -> RewardUpdate:
    """The update `name`, or what `module:attribute` names (resolved by `plugin`)."""
    update = plugin(name) if ":" in name else _named(name, REWARD_UPDATES, "reward update")
    if not callable(update):
        raise ValueError(
            f"reward update {name!r} is a {type(update).__name__}; name a function (RoundContext, Pairs) -> (Pairs, weights_N)."
        )
    return update


def _named(name, table, what):
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} {name!r} is unknown; the table has {', '.join(table)}.{hint}")
    return table[name]
