"""The figures of a report: what each of them shows, and in which order they stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxrlhf.evaluation.report_arms import Arm, View
from jaxrlhf.evaluation.report_costs import PARTS
from jaxrlhf.evaluation.report_drawing import (
    DATA,
    INK,
    ROOT_KL,
    Drawing,
    Figure,
    against_kl,
    by_round,
    finished,
    label_of,
    look,
    percents,
    unmarked,
    whole_numbers,
)  # fmt: skip


def overoptimisation(axes: Any, arms: Sequence[Arm]) -> bool:
    """Gao et al.'s figure: gold (solid) and proxy (dashed) gained since π_SFT in one unit."""
    if not any(x is not None for arm in arms for view in arm.views for x in view.curve.proxy_gain[1:]):
        return False  # π_SFT alone, where both are 0 by definition
    against_kl(axes, arms, lambda view: view.curve.proxy_gain, style={"linestyle": (0, (2, 1.5)), "markerfacecolor": "none"})
    count = len(axes.get_lines())
    drawn = against_kl(axes, arms, lambda view: view.curve.gold_gain, style={"linestyle": "-"})
    for line in axes.get_lines()[:count]:
        line.set_label("_")
    for text, line in (("gold", "-"), ("proxy", "--")):
        axes.plot([], [], color=INK, linestyle=line, linewidth=1.2, label=text)
    axes.set(xlabel=ROOT_KL, ylabel="gained since SFT (σ)")
    axes.axhline(0, color=INK, linewidth=0.5, alpha=0.5)
    return drawn


def gold_by_kl(axes: Any, arms: Sequence[Arm]) -> bool:
    drawn = against_kl(axes, arms, lambda view: [p.gold for p in view.curve.points])
    for number, arm in enumerate(arms):
        for view in arm.views if len(arm.views) <= 3 else ():
            peak = view.curve.peak
            if peak is not None and peak.root_kl is not None:
                axes.plot(peak.root_kl, peak.gold, marker="*", markersize=12, color=look(number)["color"], alpha=0.55, zorder=1)
    axes.set(xlabel=ROOT_KL, ylabel="gold (true reward)")
    return drawn


def proxy_by_kl(axes: Any, arms: Sequence[Arm]) -> bool:
    """Each round's reward model from where the round began to where it ended; where a refit breaks the line, a diamond begins the next."""
    drawn = False
    for number, arm in enumerate(arms):
        style, label = look(number), label_of(arm.name)
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


def gold_by_round(axes: Any, arms: Sequence[Arm]) -> bool:
    axes.set_ylabel("gold (true reward)")
    return by_round(axes, arms, lambda view: view.by_round("gold"))


def win_rate_by_round(axes: Any, arms: Sequence[Arm]) -> bool:
    axes.set_ylabel("win rate (% of prompts)")
    drawn = by_round(axes, arms, lambda view: percents(view.by_round("win_rate")))
    for number, arm in enumerate(arms):
        if len(arm.views) == 1:  # of one seed the interval is over prompts
            low, high = (percents(arm.first.by_round(f"win_rate_{end}")) for end in ("low", "high"))
            at = [i for i in range(len(low)) if low[i] is not None and high[i] is not None]
            axes.fill_between(at, [low[i] for i in at], [high[i] for i in at], color=look(number)["color"], alpha=0.13, linewidth=0)
    return drawn


def accuracy_by_round(axes: Any, arms: Sequence[Arm]) -> bool:
    drawn = by_round(axes, arms, lambda view: percents(view.by_round("reward_accuracy")))
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
            at, right, pairs = zip(*rows, strict=True)
            axes.plot(at, right, label=label_of(arm.name), gid=DATA, **look(number))
            axes.scatter(at, right, s=[160 * n / max(pairs) for n in pairs], color=look(number)["color"], alpha=0.2, linewidth=0)
            drawn = True
    axes.set(xlabel="P(the preferred side is better), said (%)", ylabel="right, by gold (%)", xlim=(49, 101))
    return drawn


def pooled(diagrams: Sequence[Sequence[dict[str, Any]]]) -> list[tuple[float, float, int]]:
    """(confidence %, right %, pairs) of every bin that is not empty, the seeds' pairs put together."""
    points = []
    for bins in zip(*diagrams, strict=False):
        filled = [one for one in bins if one["pairs"] and None not in (one["confidence"], one["accuracy"])]
        n = sum(one["pairs"] for one in filled)
        if n:
            said, right = (100 * sum(one["pairs"] * one[name] for one in filled) / n for name in ("confidence", "accuracy"))
            points.append((said, right, n))
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

    axes.set_ylabel(ylabel)
    return by_round(axes, arms, of, style=style)


def kl_budget_by_round(axes: Any, arms: Sequence[Arm]) -> bool:
    drawn = by_round(axes, arms, lambda view: view.by_round("kl_sft"))
    path = {"linestyle": (0, (3, 1.5)), "markerfacecolor": "none", "linewidth": 1.2}
    drawn |= by_round(axes, arms, lambda view: [0.0, *(row["spent"] for row in view.budgets)] if view.budgets else [], style=path)
    axes.plot([], [], color=INK, **path, label="let pass by the penalty, added up")
    axes.set_ylabel("KL (nats a response)")
    return drawn


def weights_by_round(axes: Any, arms: Sequence[Arm]) -> bool:
    def of(view: View) -> list[float | None]:
        found = {number: body.get("ess_fraction") for number, body in view.weights.items()}
        return percents([found.get(number) for number in range(max(found, default=-1) + 1)])

    axes.set_ylabel("ESS (% of the pairs)")
    drawn = by_round(axes, arms, of)
    axes.set_ylim(0, 104)
    return drawn


def weights_by_length(axes: Any, arms: Sequence[Arm]) -> bool:
    drawn = False
    for number, arm in enumerate(arms):
        last = arm.first.weights.get(max(arm.first.weights, default=-1), {})
        rows = [row for row in last.get("by_length") or [] if row.get("ess_fraction") is not None]
        if rows:
            at = [(row["from"] + row["to"]) / 2 for row in rows]
            axes.plot(at, [100 * row["ess_fraction"] for row in rows], gid=DATA, label=label_of(arm.name), **look(number))
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
            style, rounds = look(number), sorted(found)
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
            axes.stairs(shares, edges, **unmarked(number), linewidth=1.6, label=label_of(arm.name), gid=DATA)
            drawn = True
    axes.set(xlabel="cosine with the policy's text", ylabel="kept pairs (%)")
    return drawn


PART_COLOURS = ("#999999", "#56B4E9", "#0072B2", "#009E73", "#D55E00", "#E69F00")
HATCHES = ("", "..", "//", "", "xx", "\\\\")


def seconds_bars(axes: Any, arms: Sequence[Arm]) -> bool:
    return _bars(axes, arms, lambda view: dict(view.seconds), "wall-clock (minutes)", 1 / 60)


def flops_bars(axes: Any, arms: Sequence[Arm]) -> bool:
    return _bars(axes, arms, lambda view: view.flops[0], "counted FLOPs (10¹²)", 1e-12)


def _bars(axes: Any, arms: Sequence[Arm], of: Callable[[View], dict[str, Any]], xlabel: str, unit: float) -> bool:
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


def training_score(axes: Any, arms: Sequence[Arm]) -> bool:
    axes.set_ylabel("reward model's score (nats)")
    return _training(axes, arms, "rollout/score")


def training_kl(axes: Any, arms: Sequence[Arm]) -> bool:
    axes.set_ylabel("KL to SFT (nats a response)")
    return _training(axes, arms, "kl/sft")


def _training(axes: Any, arms: Sequence[Arm], name: str) -> bool:
    drawn = False
    for number, arm in enumerate(arms):
        for place, view in enumerate(arm.views):
            points = view.training.get(name) or (view.training.get("rollout/kl") if name == "kl/sft" and _from_sft(view) else None)
            if points:
                axes.plot([x for x, _ in points], [y for _, y in points], label=label_of(arm.name) if place == 0 else None,
                          linewidth=1.0, alpha=0.9 if len(arm.views) == 1 else 0.5, gid=DATA, **unmarked(number))  # fmt: skip
                drawn = True
    axes.set_xlabel("updates of the policy")
    return drawn


def _from_sft(view: View) -> bool:
    return all(row["from_sft"] for row in view.budgets)


NEEDS_GOLD = "No gold scorer is named in the config (gold.kind), so nothing says how good the policy really is."
DRAWINGS = (
    Drawing("overoptimisation", "Gold and proxy as the policy moves away",
            "Gold (solid) and proxy (dashed) gained since SFT, against √KL (Gao et al. 2023), in standard deviations σ: gold's over SFT's "
            "responses; proxy's over each reward model's scores of the same held-out pairs, summed over rounds by what "
            "the round's own reward model saw change: a refit starts no jump. The gap between the two is over-optimisation.",
            overoptimisation, "Needs gold and the reward models' scores on held-out pairs, which runs of this version keep."),
    Drawing("gold_kl", "Gold against √KL", "Mean gold of the policy's responses; a star marks the peak of each run, in arms "
            "of up to three seeds.", gold_by_kl, NEEDS_GOLD),
    Drawing("proxy_kl", "Proxy against √KL", "Every round's own reward model, from the policy that entered the round to the one that left "
            "it. A refit (diamond) changes the unit: values before and after it are not comparable.", proxy_by_kl,
            "No round with a reward model is finished."),
    Drawing("gold_round", "Gold by round", "Mean gold of the policy's responses at the end of each round.", gold_by_round, NEEDS_GOLD),
    Drawing("win_rate", "Win rate by round", "Responses of strictly higher gold than the reference's; of one seed with Wilson's 95 % "
            "interval over prompts.", win_rate_by_round, "Needs gold and reference responses."),
    Drawing("accuracy", "Reward-model accuracy by round", "On fresh pairs of the policy that enters the round, labelled by gold; dotted "
            "and hollow: on held-out pairs of the data. The line at 50 % is chance.",
            accuracy_by_round, "No round with a reward model is finished."),
    Drawing("reliability", "Reliability of the reward model", "How often the last round's reward model is right where it says it is so "
            "sure, on fresh pairs of the policy that entered the round. Below the diagonal it is too sure. Discs: pairs in a bin.",
            reliability_diagram, "Needs gold and reliability.json in a round's evaluation, which runs of this version write."),
    Drawing("drift_agreement", "Drift: agreement and correlation", "Share of held-out pairs on which a "
            "refitted reward model prefers the same side as the "
            "one before it; hollow: Pearson correlation of the two models' scores.",
            drift_agreement, "Needs a refit, and valid_scores.npy of both reward models."),
    Drawing("drift_scale", "Drift: scale", "Standard deviation of the scores on the held-out pairs, refitted model over the one before.",
            drift_scale, "Needs a refit, and valid_scores.npy of both reward models."),
    Drawing("kl_budget", "KL budget", "Solid: KL to SFT at the end of the round. Dashed: KL of the round's last rollout to the penalty's "
            "reference (k1, whatever the penalty estimates); of a moving reference "
            "added up over rounds, of SFT the level itself.", kl_budget_by_round, "No round is finished."),
    Drawing("weights", "Weight health", "Effective sample size of each refit's importance weights.", weights_by_round,
            "No refit of these runs weighs its pairs."),
    Drawing("weights_length", "Weight health by length", "Effective sample size of the last refit among pairs of similar length "
            "(first seed).", weights_by_length, "No weight_health.json: no refit of these runs weighs its pairs."),
    Drawing("filter", "Filter by round", "Mean similarity of the chosen sides that each refit kept; hollow: of all pairs, what a random "
            "draw would have (first seed).", filter_similarity, "No refit of these runs filters its pairs."),
    Drawing("filter_histogram", "Filter: what the last refit kept", "Similarity of the chosen sides (first seed).", filter_histogram,
            "No refit of these runs filters its pairs."),
    Drawing("training_score", "Training: score", "Mean score of each rollout under the round's reward model.", training_score,
            "No policy has logged a rollout yet."),
    Drawing("training_kl", "Training: KL to SFT", "Of each rollout, k1 estimate.", training_kl, "No policy has logged its KL yet."),
    Drawing("cost_seconds", "Where the time went", "Corrections: deciding, weighing or choosing pairs, and fitting reward models from "
            "round 2 on. Compilation included; stages shared between arms count in each.", seconds_bars, "No stage is finished."),
    Drawing("cost_flops", "Where the FLOPs went", "Counted: 6 · parameters · tokens of training, 2 · parameters · tokens of a forward pass "
            "or of sampling; padding not counted. A part with a count missing is left out.", flops_bars, "No count is known."),
)  # fmt: skip


def draw(arms: Sequence[Arm]) -> tuple[list[Figure], list[tuple[str, str]]]:
    """(figures, (title, why it is not there) of the others)."""
    figures, absent = [], []
    for drawing in DRAWINGS:
        figure = finished(drawing, arms)
        if figure is None:
            absent.append((drawing.title, drawing.missing))
        else:
            figures.append(figure)
    return figures, absent
