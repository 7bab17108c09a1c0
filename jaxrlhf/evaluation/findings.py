"""What the figures of runs say, in sentences: the same in the terminal, on the page and under a sweep's table.

Whatever is said to have risen, fallen or been better has an interval on one side of zero (`Interval.direction`); the rest is within noise.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.evaluation.curves import Estimate, estimate
from jaxrlhf.evaluation.intervals import Interval, chance_beyond, from_fields, mean_interval, unpaired_difference

Row = Mapping[str, Any]  # of summary.json: a round


class Trial(NamedTuple):
    """One arm at one seed; `gold` is that of its last responses by prompt, where that is known: arms are then compared prompt by prompt."""

    arm: str
    seed: int | None
    rounds: Sequence[Row]
    gold: Mapping[str, float] = {}


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
        told += [f"is within noise in round {rest} (n = {min(one.n for one in changes.values())})"] if rest else []
        said.append(f"gold {', '.join(told)}")
    for row in trained:
        if proxy_alone_rose(row):
            said.append(f"in round {row['round']} its reward model liked the new policy better ({_change(row, 'proxy_change')})")
        elif _direction(row, "proxy_change") < 0:
            said.append(
                f"in round {row['round']} the proxy fell ({_change(row, 'proxy_change')}): the policy did not learn what it was asked"
            )
    known = [(row["round"], found) for row in trained if (found := from_fields(row, "reward_accuracy")) and found.n]
    if len(known) > 1:
        (first, start), (last, end) = known[0], known[-1]
        change = unpaired_difference(end, start)
        said.append(
            f"reward-model accuracy on the policy's own text {'fell' if change.direction < 0 else 'rose'} from {start.value:.3f} (round "
            f"{first}) to {end.value:.3f} (round {last}; {change.spelled(3)})"
            if change.direction
            else f"the change of reward-model accuracy from round {first} to {last} is within noise (n = {change.n})"
        )
    return said


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
    """Against the first arm, where all have come equally far: one more round is more training, not a better method."""
    golds = {arm: trial for arm, trial in alone.items() if trial.gold}
    if len(golds) < 2:
        return []
    reached = {arm: trial.rounds[-1]["round"] for arm, trial in golds.items()}
    first = next(iter(golds))
    others = [arm for arm in golds if arm != first and reached[arm] == reached[first]]
    apart = ", ".join(f"{arm} ({n})" for arm, n in reached.items() if n != reached[first])
    left = [f"Final gold of {apart} is not compared with that of {first}: it is not of round {reached[first]}."] if apart else []
    if not others:
        return left
    found = {}
    for arm in others:
        both = [name for name in golds[arm].gold if name in golds[first].gold]
        found[arm] = mean_interval(np.array([golds[arm].gold[name] - golds[first].gold[name] for name in both]))
    spelled = {arm: one.spelled() for arm, one in found.items()}
    noise = f"within noise (n = {min(one.n for one in found.values())})"
    lines = [f"Final gold against {first}, prompt by prompt: {_grouped(found, spelled, noise)}."]
    told = any(one.direction for one in found.values())
    return (
        lines
        + ([f"Chance alone puts 5 % of rows beyond their intervals: about {0.05 * len(found):.1f} of these {len(found)}."] * told)
        + left
    )


def _grouped(found: Mapping[str, Interval], spelled: Mapping[str, str], noise: str) -> str:
    """above: …; below: …; within noise: …, the groups that have someone."""
    groups = {"above": 1, "below": -1, noise: 0}
    texts = {name: [f"{arm} {spelled[arm]}" for arm, one in found.items() if one.direction == way] for name, way in groups.items()}
    return "; ".join(f"{name}: {', '.join(arms)}" for name, arms in texts.items() if arms)


def _over_seeds(arms: Mapping[str, Sequence[Trial]]) -> list[str]:
    first = next(iter(arms))
    last = {arm: {trial.seed: trial.rounds[-1].get("gold") for trial in seeds} for arm, seeds in arms.items()}
    gold = {arm: difference_to(last[first], values) for arm, values in last.items() if arm != first}
    accuracy = {arm: estimate([accuracy_change(trial.rounds) for trial in seeds]) for arm, seeds in arms.items()}
    counts = []
    for arm, seeds in arms.items():
        known = [alone for trial in seeds if (alone := proxy_alone_rose(trial.rounds[-1])) is not None]
        counts += [f"{arm} in {sum(known)} of {len(known)} runs"] if any(known) else []
    lines = beyond_two_errors(f"Final gold against {first}, seed by seed", gold, 2)
    lines += beyond_two_errors("Reward-model accuracy on the policy's own text, last round less first", accuracy, 3)
    if lines:
        lines.insert(0, "Differences smaller than 2 standard errors are not differences.")
    return lines + (
        [f"In the last round the proxy rose while gold fell, both beyond their intervals: {', '.join(counts)}."] if counts else []
    )


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
