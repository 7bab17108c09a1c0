"""Figures of gold, proxy and the reward model."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrlhf.evaluation.intervals import Interval, mean_interval, proportion
from jaxrlhf.report.arms import Arm, View
from jaxrlhf.report.drawing import DATA, INK, ROOT_KL, against_kl, by_round, label_of, line_style, percents


def overoptimisation(axes: Any, arms: Sequence[Arm]) -> bool:
    """Gao et al.'s figure: gold (solid) and proxy (dashed) gained since π_SFT in one unit."""
    if not any(x is not None for arm in arms for view in arm.views for x in view.curve.proxy_gain[1:]):
        return False  # π_SFT alone, where both are 0 by definition
    against_kl(axes, arms, lambda view: gains(view, "proxy_gain"), style={"linestyle": (0, (2, 1.5)), "markerfacecolor": "none"})
    count = len(axes.get_lines())
    drawn = against_kl(axes, arms, lambda view: gains(view, "gold_gain"), style={"linestyle": "-"})
    for line in axes.get_lines()[:count]:
        line.set_label("_")
    for text, line in (("gold", "-"), ("proxy", "--")):
        axes.plot([], [], color=INK, linestyle=line, linewidth=1.2, label=text)
    axes.set(xlabel=ROOT_KL, ylabel="gained since SFT (σ)")
    axes.axhline(0, color=INK, linewidth=0.5, alpha=0.5)
    return drawn


def gains(view: View, name: str) -> list[Interval | float | None]:
    """The curve's gains, each with its interval over prompts where the samples have it."""
    by_prompt = getattr(view.prompts, name)
    return [value if value is None or one is None else mean_interval(np.asarray(one)) if np.ndim(one) else value
            for value, one in zip(getattr(view.curve, name), by_prompt, strict=True)]  # fmt: skip


def gold_by_kl(axes: Any, arms: Sequence[Arm]) -> bool:
    drawn = against_kl(axes, arms, lambda view: view.intervals("gold"))
    for number, arm in enumerate(arms):
        for view in arm.views if len(arm.views) <= 3 else ():
            peak = view.curve.peak
            if peak is not None and peak.root_kl is not None:
                axes.plot(peak.root_kl, peak.gold, marker="*", markersize=12, color=line_style(number)["color"], alpha=0.55, zorder=1)
    axes.set(xlabel=ROOT_KL, ylabel="gold (true reward)")
    return drawn


def proxy_by_kl(axes: Any, arms: Sequence[Arm]) -> bool:
    """Each round's reward model from where the round began to where it ended; where a refit breaks the line, a diamond begins the next."""
    drawn = False
    for number, arm in enumerate(arms):
        style, label = line_style(number), label_of(arm.name)
        for view in arm.views:
            points = {p.round: p for p in view.curve.points}
            for p in view.curve.points[1:]:
                start = points.get(p.start)
                if start is None or None in (start.root_kl, p.root_kl, p.proxy_start, p.proxy):
                    continue
                axes.plot([start.root_kl, p.root_kl], [p.proxy_start, p.proxy], color=style["color"], linestyle=style["linestyle"],
                          alpha=1 if len(arm.views) == 1 else 0.55)  # fmt: skip
                axes.plot(p.root_kl, p.proxy, gid=DATA, marker=style["marker"], color=style["color"], linestyle="none")
                if p.refit:
                    axes.plot(start.root_kl, p.proxy_start, marker="d", markersize=7, color=style["color"], markerfacecolor="none")
                drawn = True
        axes.plot([], [], label=label, **style)
    if any(p.refit for arm in arms for view in arm.views for p in view.curve.points):
        axes.plot([], [], marker="d", linestyle="none", markerfacecolor="none", color=INK, markersize=7, label="refit")
    axes.set(xlabel=ROOT_KL, ylabel="proxy (nats of preference)")
    return drawn


def accuracy_by_round(axes: Any, arms: Sequence[Arm]) -> bool:
    drawn = by_round(axes, arms, lambda view: percents(view.intervals("reward_accuracy")))
    held_out = {"linestyle": (0, (1, 1.2)), "markerfacecolor": "none", "linewidth": 1.2}
    drawn |= by_round(axes, arms, lambda view: percents(view.by_round("reward_accuracy_valid")), style=held_out)
    axes.axhline(50, color=INK, linewidth=0.7, alpha=0.6)
    axes.plot([], [], color=INK, marker="o", **held_out, label="on held-out pairs")
    axes.set_ylabel("reward model right (% of pairs)")
    return drawn


def reliability_diagram(axes: Any, arms: Sequence[Arm]) -> bool:
    drawn = False
    axes.plot([50, 100], [50, 100], color=INK, linewidth=0.7, alpha=0.6)
    for number, arm in enumerate(arms):
        rows = pooled([view.reliabilities[max(view.reliabilities)]["bins"] for view in arm.compared if view.reliabilities])
        if rows:
            at, right, low, high = zip(*rows, strict=True)
            axes.plot(at, right, label=label_of(arm.name), gid=DATA, **line_style(number))
            axes.vlines(at, low, high, color=line_style(number)["color"], alpha=0.5, linewidth=0.9)
            drawn = True
    axes.set(xlabel="P(the preferred side is better), said (%)", ylabel="right, by gold (%)", xlim=(49, 101))
    return drawn


def pooled(diagrams: Sequence[Sequence[dict[str, Any]]]) -> list[tuple[float, float, float, float]]:
    """(confidence, right, low and high of its Wilson interval; all in %) of every bin that is not empty, the seeds' pairs put together."""
    points = []
    for bins in zip(*diagrams, strict=False):
        filled = [one for one in bins if one["pairs"] and None not in (one["confidence"], one["accuracy"])]
        n = sum(one["pairs"] for one in filled)
        if n:
            said, right = (sum(one["pairs"] * one[name] for one in filled) for name in ("confidence", "accuracy"))
            points.append((100 * said / n, *proportion(right, n).scaled(100)[:3]))
    return points


def drift_agreement(axes: Any, arms: Sequence[Arm]) -> bool:
    drawn = _drift(axes, arms, "agreement", "with the model before (%)", 100)
    hollow = {"linestyle": (0, (1, 1.2)), "markerfacecolor": "none", "linewidth": 1.2}
    drawn |= _drift(axes, arms, "correlation", "with the model before (%)", 100, hollow)
    axes.plot([], [], color=INK, marker="o", **hollow, label="correlation")
    return drawn


def drift_scale(axes: Any, arms: Sequence[Arm]) -> bool:
    drawn = _drift(axes, arms, "scale", "spread of scores, new / old", 1)
    axes.axhline(1, color=INK, linewidth=0.7, alpha=0.6)
    return drawn


def _drift(axes: Any, arms: Sequence[Arm], name: str, ylabel: str, factor: float, style: dict[str, Any] | None = None) -> bool:
    def of(view: View) -> list[float | None]:
        values = [view.drifts.get(number, {}).get(name) for number in range(max(view.drifts, default=-1) + 1)]
        return [None if value is None else factor * value for value in values]

    return by_round(axes, arms, of, style=style, ylabel=ylabel)
