"""What the figures of runs say, in sentences: the same in the terminal, on the page and under a sweep's table.

Whatever is said to have risen, fallen or been better has an interval on one side of zero (`Interval.direction`); the rest is within noise.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.evaluation.curves import Estimate, estimate
from jaxrlhf.evaluation.intervals import Interval, chance_beyond, from_fields, mean_interval, unpaired_difference

Row = Mapping[str, Any]  # of summary.json: a round


class Trial(NamedTuple):
    """One arm at one seed; `gold` is that of its last responses by prompt, where that is known: arms are then compared prompt by prompt.
    `finished`: it has all the rounds of its recipe, as far as is known."""

    arm: str
    seed: int | None
    rounds: Sequence[Row]
    gold: Mapping[str, float] = {}
    finished: bool = False


def equally_far(one: Trial, other: Trial) -> bool:
    """Whether they reached the same round, or both their ends: one more round is more training, not a better method."""
    return (one.finished and other.finished) or _reached(one) == _reached(other)


def _reached(trial: Trial) -> int | None:
    return trial.rounds[-1]["round"] if trial.rounds else None


def findings(trials: Sequence[Trial]) -> list[str]:
    """Of one seed: what each round changed and how the arms differ, by intervals over prompts. Of several: over seeds."""
    arms: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.rounds:
            arms.setdefault(trial.arm, []).append(trial)
    if any(len(seeds) > 1 for seeds in arms.values()):
        return _over_seeds(arms)
    alone = {arm: seeds[0] for arm, seeds in arms.items()}
    lines = [f"{arm}: {'; '.join(said)}." for arm, trial in alone.items() if (said := _of_arm(trial.rounds))]
    lines += _by_chance("changes", [one for trial in alone.values() for one in _tested(trial.rounds)])
    lines += _final_gold(alone)
    seeds = {trial.seed for trial in alone.values()}
    if len(seeds) == 1:
        lines.append(
            f"This is one seed ({seeds.pop()}): intervals are over prompts, and another seed may differ by more than they are wide."
        )
    return lines


def _of_arm(rounds: Sequence[Row]) -> list[str]:
    """What became of gold in each round and of the reward model's accuracy over them; nothing where neither is known."""
    trained = [row for row in rounds if row["round"]]
    changes = {row["round"]: found for row in trained if (found := from_fields(row, "gold_change"))}
    said = []
    if changes:
        told = []
        for word, way in (("rose", 1), ("fell", -1)):
            rounds_so = [f"{n} ({one.spelled()})" for n, one in changes.items() if one.direction == way]
            told += [f"{word} in round {', '.join(rounds_so)}"] if rounds_so else []
        rest = ", ".join(str(n) for n, one in changes.items() if not one.direction)
        said += [f"gold {', '.join(told)}"] if told else []
        said += [f"gold's change is within noise in round {rest} (n = {min(one.n for one in changes.values())})"] if rest else []
    for row in trained:
        if proxy_alone_rose(row):
            said.append(f"in round {row['round']} its reward model liked the new policy better ({_change(row, 'proxy_change')})")
        elif _direction(row, "proxy_change") < 0:
            said.append(
                f"in round {row['round']} the proxy fell ({_change(row, 'proxy_change')}): the policy did not learn what it was asked"
            )
    if accuracy := _accuracies(rounds):
        (first, start), (last, end), change = accuracy
        said.append(
            f"reward-model accuracy on the policy's own text {'fell' if change.direction < 0 else 'rose'} from {start.value:.3f} (round "
            f"{first}) to {end.value:.3f} (round {last}; {change.spelled(3)})"
            if change.direction
            else f"the change of reward-model accuracy from round {first} to {last} is within noise (n = {change.n})"
        )
    return said


def _accuracies(rounds: Sequence[Row]) -> tuple[tuple[int, Interval], tuple[int, Interval], Interval] | None:
    """(first, last, their difference) of the reward model's accuracy by round, where two rounds have one."""
    known = [(row["round"], found) for row in rounds if row["round"] and (found := from_fields(row, "reward_accuracy")) and found.n]
    return (known[0], known[-1], unpaired_difference(known[-1][1], known[0][1])) if len(known) > 1 else None


def _tested(rounds: Sequence[Row]) -> list[int]:
    """Of every change that `_of_arm` looks at whether it is told: its direction, else 0. A proxy that rose is told where gold fell."""
    rows = [row for row in rounds if row["round"]]
    told = [_direction(row, "gold_change") for row in rows if row.get("gold_change") is not None]
    told += [_direction(row, "proxy_change") < 0 or bool(proxy_alone_rose(row)) for row in rows if row.get("proxy_change") is not None]
    return told + ([accuracy[2].direction] if (accuracy := _accuracies(rounds)) else [])


def _by_chance(what: str, told: Sequence[int]) -> list[str]:
    """How many of so many 95 % intervals leave out zero by chance; nothing where none does."""
    n = len(told)
    return [f"Chance alone puts 5 % of {what} beyond their intervals: about {0.05 * n:.1f} of these {n}."] if any(told) else []


def _direction(row: Row, name: str) -> int:
    return 0 if (found := from_fields(row, name)) is None else found.direction


def _change(row: Row, name: str) -> str:
    return "" if (found := from_fields(row, name)) is None else found.spelled()


def proxy_alone_rose(row: Row) -> bool | None:
    """Whether the round's reward model liked the new policy better than the one it started from while gold fell, both beyond their
    intervals; None where one of the two is not known."""
    if None in (row.get("proxy_change"), row.get("gold_change")):
        return None
    return _direction(row, "proxy_change") > 0 and _direction(row, "gold_change") < 0


def accuracy_change(rounds: Sequence[Row]) -> float | None:
    """The last round's reward-model accuracy less the first's; None where there are not two."""
    known = [row["reward_accuracy"] for row in rounds if row.get("reward_accuracy") is not None]
    return known[-1] - known[0] if len(known) > 1 else None


def _final_gold(alone: Mapping[str, Trial]) -> list[str]:
    """Against the first arm; an arm of which some gold is not finite is left out, as in the report."""
    golds = {arm: trial for arm, trial in alone.items() if trial.gold and np.isfinite(list(trial.gold.values())).all()}
    if len(golds) < 2:
        return []
    first, *others = golds
    found = {}
    for arm in others:
        if equally_far(golds[first], golds[arm]):
            both = [name for name in golds[arm].gold if name in golds[first].gold]
            found[arm] = mean_interval(np.array([golds[arm].gold[name] - golds[first].gold[name] for name in both]))
    left = _apart(golds)
    if not found:
        return left
    spelled = {arm: one.spelled() for arm, one in found.items()}
    noise = f"within noise (n = {min(one.n for one in found.values())})"
    lines = [f"Final gold against {first}, prompt by prompt: {_grouped(found, spelled, noise)}."]
    return lines + _by_chance("rows", [one.direction for one in found.values()]) + left


def _apart(arms: Mapping[str, Trial]) -> list[str]:
    """The arms that are not compared with the first, for they have not come equally far."""
    first = next(iter(arms))
    apart = ", ".join(f"{arm} ({_reached(one)})" for arm, one in arms.items() if not equally_far(arms[first], one))
    why = f"is not compared with that of {first}: it is not of round {_reached(arms[first])}."
    return [f"Final gold of {apart} {why}"] if apart else []


def _grouped(found: Mapping[str, Interval], spelled: Mapping[str, str], noise: str) -> str:
    """above: …; below: …; within noise: …, the groups that have someone."""
    groups = {"above": 1, "below": -1, noise: 0}
    texts = {name: [f"{arm} {spelled[arm]}" for arm, one in found.items() if one.direction == way] for name, way in groups.items()}
    return "; ".join(f"{name}: {', '.join(arms)}" for name, arms in texts.items() if arms)


def _over_seeds(arms: Mapping[str, Sequence[Trial]]) -> list[str]:
    first = next(iter(arms))
    last = {arm: {trial.seed: trial.rounds[-1].get("gold") for trial in seeds} for arm, seeds in arms.items()}
    one = {arm: seeds[0] for arm, seeds in arms.items()}
    gold = {arm: difference_to(last[first], values) for arm, values in last.items() if arm != first and equally_far(one[first], one[arm])}
    accuracy = {arm: estimate([accuracy_change(trial.rounds) for trial in seeds]) for arm, seeds in arms.items()}
    counts = []
    for arm, seeds in arms.items():
        known = [alone for trial in seeds if (alone := proxy_alone_rose(trial.rounds[-1])) is not None]
        counts += [f"{arm} in {sum(known)} of {len(known)} runs"] if any(known) else []
    lines = beyond_two_errors(f"Final gold against {first}, seed by seed", gold, 2)
    lines += beyond_two_errors("Reward-model accuracy on the policy's own text, last round less first", accuracy, 3)
    if lines:
        lines.insert(0, "Differences smaller than 2 standard errors are not differences.")
    known_gold = {arm: trial for arm, trial in one.items() if any(value is not None for value in last[arm].values())}
    lines += _apart(known_gold) if first in known_gold else []
    return lines + (
        [f"In the last round the proxy rose while gold fell, both beyond their intervals: {', '.join(counts)}."] if counts else []
    )


def notes_of(runs: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """What runs (their arm, their notes) note themselves: each once, after the arms it is noted of where there are several."""
    said: dict[str, list[str]] = {"": []}
    for arm, notes in runs:
        for note in ("", *notes):
            said.setdefault(note, []).append(arm)
    several = len({*said.pop("")}) > 1
    return [f"{', '.join(dict.fromkeys(arms))}: {note}" if several else note for note, arms in said.items()]


def difference_to(first: Mapping[Any, float | None], own: Mapping[Any, float | None]) -> Estimate | None:
    """Own less the first arm's, seed → value, over the seeds both have."""
    pairs = [(own[seed], first.get(seed)) for seed in own]
    return estimate([a - b for a, b in pairs if a is not None and b is not None])


def beyond_two_errors(what: str, found: Mapping[str, Estimate | None], digits: int) -> list[str]:
    """Which arms' means over seeds lie beyond two standard errors of zero, and how often chance alone does that; of one seed nothing."""
    known = {arm: one for arm, one in found.items() if one is not None and one.se is not None and math.isfinite(one.mean)}
    if not known:
        return []
    spelled = {arm: one.spelled(digits, sign=True) for arm, one in known.items()}
    fewest = min(one.n for one in known.values())
    chance = chance_beyond(fewest)
    return [
        f"{what}: {_grouped({arm: one.interval for arm, one in known.items()}, spelled, f'within noise (n = {fewest} seeds)')}. "
        f"Chance alone puts {100 * chance:.0f} % of rows beyond: about {chance * len(known):.1f} of these {len(known)}."
    ]
