"""Figures of training: KL, weights, the filter, costs and curves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrlhf.evaluation.intervals import Interval
from jaxrlhf.evaluation.plotting import BLUE, GREEN, ORANGE, SKY, VERMILION
from jaxrlhf.report.arms import Arm, View
from jaxrlhf.report.costs import PARTS
from jaxrlhf.report.drawing import DATA, INK, by_round, dashed_style, label_of, line_style, percents, whole_numbers


def kl_budget_by_round(axes: Any, arms: Sequence[Arm]) -> bool:
    drawn = by_round(axes, arms, lambda view: view.intervals("kl_sft"))
    path = {"linestyle": (0, (3, 1.5)), "markerfacecolor": "none", "linewidth": 1.2}
    drawn |= by_round(axes, arms, lambda view: [0.0, *(row["spent"] for row in view.budgets)] if view.budgets else [], style=path)
    axes.plot([], [], color=INK, **path, label="let pass by the penalty, added up")
    axes.set_ylabel("KL (nats a response)")
    return drawn


def weights_by_round(view: View) -> Sequence[Interval | float | None]:
    found = {number: body.get("ess_fraction") for number, body in view.weights.items()}
    return percents([found.get(number) for number in range(max(found, default=-1) + 1)])


def weights_by_length(axes: Any, arms: Sequence[Arm]) -> bool:
    drawn = False
    for number, arm in enumerate(arms):
        last = arm.first.weights.get(max(arm.first.weights, default=-1), {})
        rows = [row for row in last.get("by_length") or [] if row.get("ess_fraction") is not None]
        if rows:
            at = [(row["from"] + row["to"]) / 2 for row in rows]
            axes.plot(at, [100 * row["ess_fraction"] for row in rows], gid=DATA, label=label_of(arm.name), **line_style(number))
            drawn = True
    axes.set(xlabel="length of a response (tokens)", ylabel="ESS (% of the bin's pairs)")
    axes.set_ylim(0, 104)
    return drawn


def filter_similarity(axes: Any, arms: Sequence[Arm]) -> bool:
    """Mean cosine of the chosen sides that were kept (filled) and of all pairs (hollow), by refit."""
    drawn = False
    for number, arm in enumerate(arms):
        found = {n: body["similarity"]["chosen"] for n, body in arm.first.filters.items() if "similarity" in body}
        if found:
            style, rounds = line_style(number), sorted(found)
            axes.plot(rounds, [found[n]["mean_kept"] for n in rounds], gid=DATA, label=label_of(arm.name), **style)
            hollow = style | {"markerfacecolor": "none", "linestyle": (0, (1, 1.2))}
            axes.plot(rounds, [found[n]["mean_at_random"] for n in rounds], **hollow)
            drawn = True
    whole_numbers(axes, arms)
    axes.plot([], [], color=INK, marker="o", markerfacecolor="none", linestyle=(0, (1, 1.2)), label="all pairs")
    axes.set_ylabel("cosine with the policy's text")
    return drawn


def filter_histogram(axes: Any, arms: Sequence[Arm]) -> bool:
    drawn = False
    for number, arm in enumerate(arms):
        last = arm.first.filters.get(max(arm.first.filters, default=-1), {})
        similarity = last.get("similarity") or {}
        if "chosen" in similarity:
            edges, kept = similarity["bin_edges"], similarity["chosen"]["histogram_kept"]
            shares = [100 * n / max(sum(kept), 1) for n in kept]
            axes.stairs(shares, edges, **dashed_style(number), linewidth=1.6, label=label_of(arm.name), gid=DATA)
            drawn = True
    axes.set(xlabel="cosine with the policy's text", ylabel="kept pairs (%)")
    return drawn


PART_COLOURS = ("#999999", SKY, BLUE, GREEN, VERMILION, ORANGE)
HATCHES = ("", "..", "//", "", "xx", "\\\\")


def bars(axes: Any, arms: Sequence[Arm], *, of: Callable[[View], Mapping[str, float | None]], xlabel: str, unit: float) -> bool:
    """Stacked bars, mean over seeds; a part that is not known has no piece."""
    drawn, used = False, set()
    for place, arm in enumerate(arms):
        parts = [of(view) for view in arm.compared]
        left = 0.0
        for number, part in enumerate(PARTS):
            known = [x for one in parts if (x := one[part]) is not None]
            width = unit * sum(known) / len(known) if known else 0.0
            if width:
                axes.barh(place, width, left=left, color=PART_COLOURS[number], hatch=HATCHES[number], edgecolor="white", linewidth=0.4,
                          label=None if part in used else part, gid=DATA)  # fmt: skip
                used.add(part)
                left, drawn = left + width, True
    axes.set_yticks(range(len(arms)), [label_of(arm.name) for arm in arms])
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    return drawn


def training(axes: Any, arms: Sequence[Arm], *, name: str, ylabel: str) -> bool:
    drawn = False
    axes.set_ylabel(ylabel)
    for number, arm in enumerate(arms):
        for place, view in enumerate(arm.views):
            from_sft = all(row["reference"] == 0 for row in view.budgets)
            points = view.training.get(name) or (view.training.get("rollout/kl") if name == "kl/sft" and from_sft else None)
            if points:
                axes.plot([x for x, _ in points], [y for _, y in points], label=label_of(arm.name) if place == 0 else None,
                          linewidth=1.0, alpha=0.9 if len(arm.views) == 1 else 0.5, gid=DATA, **dashed_style(number))  # fmt: skip
                drawn = True
    axes.set_xlabel("updates of the policy")
    return drawn
