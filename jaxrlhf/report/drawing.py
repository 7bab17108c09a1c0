"""Means to draw a report's figures: colours for the colour-blind, lines and marks for grey paper, and SVG that can stand in a page."""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.evaluation.curves import over_seeds
from jaxrlhf.evaluation.intervals import Interval
from jaxrlhf.evaluation.plotting import PALETTE, style, svg_of
from jaxrlhf.report.arms import Arm, View

INK = "#010203"  # becomes the page's own text colour where a figure stands in a page
COLOURS = (*PALETTE, INK)
LINES = ("-", "--", "-.", ":")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKS = ("o", "s", "^", "D", "v", "P", "X")
SIZE = (4.7, 3.3)  # inches: on a narrow screen a figure is as wide as the screen, and its letters stay letters
PNG_DPI = 200
LABEL_LIMIT = 28
ROOT_KL = "√KL to SFT (√nats a response)"
DATA = "data"  # the gid of what shows data, and is no axis, aid or legend


class Drawing(NamedTuple):
    """A figure: its name (of the files), what it shows, and the means to draw it: False where there is nothing to draw."""

    name: str
    title: str
    caption: str
    draw: Callable[[Any, Sequence[Arm]], bool]
    missing: str  # why there may be nothing


class Figure(NamedTuple):
    """A figure drawn: `inline` is SVG to stand in a page, `svg` and `png` are files."""

    name: str
    title: str
    caption: str
    inline: str
    svg: bytes
    png: bytes


def line_style(number: int) -> dict[str, Any]:
    """The line of the n-th arm; no two of 49 have both colour and mark in common."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
        "marker": MARKS[(number + number // len(COLOURS)) % len(MARKS)],
    }


def dashed_style(number: int) -> dict[str, Any]:
    """The line of the n-th arm where it bears no marks: no two of 49 have both colour and dashes in common."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[(number + number // len(COLOURS)) % len(DASHES)]}


def label_of(name: str) -> str:
    """A name as a legend can show it: short, and not begun by the underscore that hides an entry."""
    short = name if len(name) <= LABEL_LIMIT else f"…{name[-LABEL_LIMIT + 1 :]}"
    return f"\u200a{short}" if short.startswith("_") else short


Quantity = Callable[[View], Sequence[Interval | float | None]]  # by round, of one run


def over_seeds_of(arms: Sequence[Arm]) -> bool:
    """What a band is in all of a page's figures: one standard error over seeds, or, where no arm has two, the interval over prompts."""
    return any(len(arm.compared) > 1 for arm in arms)


def bands_said(arms: Sequence[Arm]) -> str:
    return "Bands and bars: ± one standard error over seeds." if over_seeds_of(arms) else "Bands and bars: 95 % intervals over prompts."


def bands_of(arms: Sequence[Arm], arm: Arm, of: Quantity) -> list[Interval | None]:
    """An arm's quantity by round with its band; its ends are nan where it has none."""
    series = [[one if isinstance(one, Interval) or one is None else Interval(one, math.nan, math.nan, 1) for one in of(view)]
              for view in arm.compared]  # fmt: skip
    if not over_seeds_of(arms):
        return series[0]
    means = over_seeds([[None if one is None else one.value for one in run] for run in series])
    reach = [None if one is None else math.nan if one.error is None else one.error for one in means]
    return [None if m is None or r is None else Interval(m.mean, m.mean - r, m.mean + r, m.n) for m, r in zip(means, reach, strict=True)]


def line_of(axes: Any, x: Sequence[Interval | None], y: Sequence[Interval | None], style: dict[str, Any], label: str | None = None) -> bool:
    """A line through the values with a band of y and a bar of x; False where no point has both coordinates."""
    points = [(at, one) for at, one in zip(x, y, strict=False) if at is not None and one is not None]
    if not points:
        return False
    at, low, high = np.array([(one.value, one.low, one.high) for one, _ in points]).T
    value, bottom, top = np.array([(one.value, one.low, one.high) for _, one in points]).T
    axes.plot(at, value, label=label, gid=DATA, **style)
    if np.isfinite(bottom).any():
        known = np.isfinite(bottom)
        bottom, top = np.where(known, bottom, value), np.where(known, top, value)
        axes.fill_between(at, bottom, top, color=style["color"], alpha=0.16, linewidth=0)
    if np.isfinite(low).any():
        axes.hlines(value, low, high, color=style["color"], alpha=0.5, linewidth=0.9)
    return True


def against_kl(axes: Any, arms: Sequence[Arm], of: Quantity, *, style: dict[str, Any] | None = None) -> bool:
    """A quantity by √KL: every seed faintly, their means as the line."""
    drawn = False
    for number, arm in enumerate(arms):
        own = line_style(number) | (style or {})
        for view in arm.views if len(arm.views) > 1 else ():
            points = [(x.value, y) for x, y in zip(root_kl(view), of(view), strict=False) if x is not None and y is not None]
            ys = [y.value if isinstance(y, Interval) else y for _, y in points]
            axes.plot([x for x, _ in points], ys, **dashed_style(number), linewidth=0.6, alpha=0.35)
        drawn |= line_of(axes, bands_of(arms, arm, root_kl), bands_of(arms, arm, of), own, label_of(arm.name))
    return drawn


def root_kl(view: View) -> list[Interval | None]:
    """√KL by round, its interval's ends too; an estimate just under 0 is 0."""

    def root(x: float) -> float:
        return x if math.isnan(x) else math.sqrt(max(x, 0.0))

    found = view.intervals("kl_sft")
    return [None if one is None else Interval(root(one.value), root(one.low), root(one.high), one.n) for one in found]


def by_round(
    axes: Any, arms: Sequence[Arm], of: Quantity, *, style: dict[str, Any] | None = None, ylabel: str = "", ylim: Any = None
) -> bool:
    drawn = False
    for number, arm in enumerate(arms):
        bands = bands_of(arms, arm, of)
        rounds = [Interval(n, math.nan, math.nan, 1) for n in range(len(bands))]
        drawn |= line_of(axes, rounds, bands, line_style(number) | (style or {}), None if style else label_of(arm.name))
    whole_numbers(axes, arms)
    axes.set_ylabel(ylabel)
    if ylim is not None:
        axes.set_ylim(ylim)
    return drawn


def whole_numbers(axes: Any, arms: Sequence[Arm]) -> None:
    """The axis of rounds: the same in every figure, from π_SFT to the last round that is there."""
    from matplotlib.ticker import MaxNLocator

    last = max((row["round"] for arm in arms for view in arm.views for row in view.run.rounds), default=0)
    axes.set(xlabel="round (0: SFT)", xlim=(-0.15, max(last, 1) + 0.15))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def percents(values: Sequence[Interval | float | None]) -> list[Interval | float | None]:
    return [None if one is None else one.scaled(100) if isinstance(one, Interval) else 100 * one for one in values]


def render(drawing: Drawing, arms: Sequence[Arm]) -> Figure | None:
    """The figure as it stands in a page and in files; None where there is nothing to draw."""
    from matplotlib.figure import Figure as Canvas

    own: Any = {
        "font.size": 10, "axes.titlesize": 10, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "text.parse_math": False,
        "lines.linewidth": 1.6, "lines.markersize": 5, "axes.grid": True, "grid.alpha": 0.18, "grid.linewidth": 0.6,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK),
    }  # fmt: skip
    with style(drawing.name, **own):
        bars = drawing.name.startswith("cost_")
        count = len(arms)
        width, height = SIZE
        canvas = Canvas(figsize=(width, height + 0.22 * max(0, (count - 1) // 2) + (0.18 * count if bars else 0)), layout="constrained")
        axes = canvas.subplots()
        if not drawing.draw(axes, arms):
            return None
        banded = any(type(one).__name__ in ("PolyCollection", "FillBetweenPolyCollection") for one in axes.collections)
        caption = f"{drawing.caption} {bands_said(arms)}" if banded else drawing.caption
        for n, artist in enumerate(one for one in axes.get_children() if one.get_gid() == DATA):
            artist.set_gid(f"{DATA}-{n}")
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            canvas.legend(handles, labels, loc="outside lower center", ncols=2 if max(map(len, labels)) > 16 else 3, frameon=False,
                          fontsize=9, handlelength=2.6, columnspacing=1.2)  # fmt: skip
        png = io.BytesIO()
        canvas.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        svg = svg_of(canvas)
        canvas.patch.set_alpha(1)
        canvas.savefig(png, format="png", dpi=PNG_DPI, facecolor="white")
    return Figure(drawing.name, drawing.title, caption, inline(svg, drawing), svg.replace(INK, "#000000").encode(), png.getvalue())


def inline(svg: str, drawing: Drawing) -> str:
    """SVG text to stand in a page: no prologue, ids of its own, the page's text colour and width, and its title in words."""
    from html import escape

    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{drawing.name}-\1"', svg)
    svg = re.sub(r"url\(#", f"url(#{drawing.name}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{drawing.name}-', svg).replace(INK, "currentColor")
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
                  rf'<svg viewBox="\1" role="img" aria-label="{escape(drawing.title, quote=True)}" xmlns="http://www.w3.org/2000/svg">',
                  svg, count=1)  # fmt: skip
