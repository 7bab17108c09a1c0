"""The figure of a sweep: gold by KL to SFT and by episodes, a curve an arm, a band of one standard error over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.sweep.statistics import Estimate, Sweep, estimate

# Okabe & Ito (2008): colours that the colour-blind tell apart; lines and marks tell arms of equal colour apart, on grey paper all of them.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
LINES = ("-", "--", ":", "-.")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
PNG_DPI = 200


def curve(sweep: Sweep, arm: str, figure: str) -> list[Estimate | None]:
    """`figure` of every round, SFT first, over the seeds that have it."""
    runs = [run.rounds for run in sweep.finished(arm)]
    count = max(map(len, runs), default=0)
    rounds = [[rows[number].get(figure) for rows in runs if number < len(rows)] for number in range(count)]
    return [estimate([value for value in values if value is not None]) for values in rounds]


def draw(sweep: Sweep, folder: Path) -> Path | None:
    """Write grid.svg and grid.png into `folder`; the former's path, None (and no file) where no run has gold."""
    curves = {arm: (curve(sweep, arm, "gold"), curve(sweep, arm, "kl_sft")) for arm in sweep.settings}
    if not any(point for gold, _ in curves.values() for point in gold):
        return None
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    # Text stays text; equal tables give equal files.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "grid", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 3.4 + 0.17 * (len(curves) // 3)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for number, (arm, (gold, kl)) in enumerate(curves.items()):
            look = {
                "color": COLOURS[number % len(COLOURS)],
                "linestyle": LINES[number // len(COLOURS) % len(LINES)],
                "marker": MARKS[number % len(MARKS)],
                "markersize": 4,
                "linewidth": 1.3,
            }
            faint = 0.15 if len(curves) <= len(COLOURS) else 0.06  # of a band: many on top of each other hide the lines
            _line(left, [None if k is None else k.mean for k in kl], gold, look, faint, arm)
            _by_episodes(right, sweep, arm, gold, look, faint)
        for axes in (left, right):
            axes.locator_params(axis="x", nbins=6)
        left.set(xlabel="KL to SFT (nats a response)", ylabel="gold (true reward)")
        right.set(xlabel="episodes (thousands)")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, handlelength=3.2)
        n = max(len(sweep.finished(arm)) for arm in sweep.settings)
        figure.suptitle(
            f"{sweep.name}: mean over {n} seed{'s' if n > 1 else ''}" + (", band ± 1 standard error" if n > 1 else ""), fontsize=9
        )
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "grid.svg", format="svg", metadata={"Date": None})
        figure.savefig(folder / "grid.png", format="png", dpi=PNG_DPI)
    return folder / "grid.svg"


def _line(
    axes: Any, x: Sequence[float | None], gold: Sequence[Estimate | None], look: dict[str, Any], faint: float, label: str | None = None
) -> None:
    points = [(at, point) for at, point in zip(x, gold, strict=True) if at is not None and point is not None]
    if not points:
        return
    at = np.array([one for one, _ in points])
    mean = np.array([point.mean for _, point in points])
    se = np.array([point.se or 0.0 for _, point in points])
    axes.plot(at, mean, label=label, **look)
    axes.fill_between(at, mean - se, mean + se, color=look["color"], alpha=faint, linewidth=0)


def _by_episodes(axes: Any, sweep: Sweep, arm: str, gold: Sequence[Estimate | None], look: dict[str, Any], faint: float) -> None:
    """A policy that samples nothing has no place on the axis: its last gold is a line across."""
    setting = sweep.settings[arm]
    if setting["episodes"]:
        a_round = setting["episodes"] / setting["rounds"] / 1000
        _line(axes, [number * a_round for number in range(len(gold))], gold, look, faint)
    elif gold and (last := gold[-1]):
        axes.axhline(last.mean, color=look["color"], linestyle=look["linestyle"], linewidth=look["linewidth"])
