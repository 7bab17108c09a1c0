"""The page of a filter report: Markdown and a figure, from the dict that `filter_report` makes and nothing else."""

from typing import Any

from jaxrlhf.evaluation.plotting import BLUE, VERMILION, style, svg_of
from jaxrlhf.formatting import escape_markdown, markdown_table

SIDES = ("chosen", "rejected")
_FIELDS = {name: name for name in ("id", "source", "prompt", *SIDES)} | {"generation": "generation compared with chosen"}
_GROUPS = (
    ("Top and bottom", ("kept_best", "dropped_last"), ("best kept", "last dropped")),
    ("Borderline", ("kept_last", "dropped_best"), ("last kept", "best dropped")),
)


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a page; every text that comes from data is escaped."""
    parts = [_headline(report), "![Similarity of kept and dropped pairs](filter_report.svg)", _similarity_table(report)]
    parts += [_length_table(report), _other_figures(report), *(_example_table(report, *group) for group in _GROUPS)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(report: dict[str, Any]) -> str:
    where = "" if report["round"] is None else f", round {report['round']}"
    limits = [f"n = {report['n']:,}"] if report["n"] is not None else []
    limits += [f"threshold {report['threshold']:g}"] if report["threshold"] is not None else []
    against = "the generation for its own prompt"
    if report["compare"] == "nearest":
        against = f"its {report['k']} nearest generations" if report["k"] > 1 else "its nearest generation"
    by = ", ".join([f"rule {escape_markdown(report['rule'])}", *limits])
    lines = [
        f"# Filter report{where}",
        f"{report['kept']:,} of {report['pairs']:,} pairs kept ({_percent(report['kept'] / report['pairs'])}) by {by}. "
        f"Similarity is the cosine of a response with {against}.",
    ]
    if report["short_of_n"]:
        lines.append(f"**{report['short_of_n']:,} fewer than asked for**: no more pairs pass.")
    return "\n\n".join(lines)


def _similarity_table(report: dict[str, Any]) -> str:
    names = ("mean_kept", "mean_dropped", "mean_at_random", "lowest_kept", "highest_dropped")
    titles = ("side", "mean kept", "mean dropped", "mean of a random draw", "lowest kept", "highest dropped")
    rows = [[side, *(_number(report["similarity"][side][name], 3) for name in names)] for side in SIDES]
    return "## Similarity (cosine)\n\n" + markdown_table(titles, rows)


def _length_table(report: dict[str, Any]) -> str:
    rows = []
    for unit, sides in report["length"].items():
        for name, x in sides.items():
            title = "chosen − rejected" if name == "gap" else name
            rows.append([f"{title}, {unit}", *(_number(x[c], 1) for c in ("kept", "dropped", "at_random")), _number(x["shift"], 2)])
    heading = "## Length\n\nMeans. Shift: (kept − dropped) in standard deviations; 0 is no preference for longer or shorter text.\n\n"
    return heading + markdown_table(("side", "kept", "dropped", "random draw", "shift"), rows)


def _other_figures(report: dict[str, Any]) -> str:
    prompts, twice, before, near = (report[name] for name in ("prompts", "duplicates", "previous", "generations"))
    lines = [
        f"{prompts['kept']:,} of {prompts['all']:,} distinct prompts are left ({_percent(prompts['share'])}).",
        f"Further copies of a pair: {twice['pairs']:,} in all, {twice['pairs_kept']:,} kept. Further copies of a response among the kept: "
        f"{twice['chosen_kept']:,} chosen, {twice['rejected_kept']:,} rejected.",
    ]
    if near is not None and near["nearest_to_some_kept_pair"] is not None:
        lines.append(
            f"The chosen sides of the kept pairs are compared with {near['nearest_to_some_kept_pair']:,} distinct generations of "
            f"{near['rows']:,}; those of all pairs with {near['nearest_to_some_pair']:,}."
        )
    if before is not None:
        lines.append(
            f"{before['both']:,} pairs were kept in the round before too (Jaccard {before['jaccard']:.3f}); two random draws would share "
            f"{before['both_at_random']:,.1f}."
        )
    return "## Coverage, duplicates, overlap\n\n" + "\n".join(f"- {line}" for line in lines)


def _example_table(report: dict[str, Any], heading: str, names: tuple[str, str], titles: tuple[str, str]) -> str:
    """Kept and dropped side by side; a field a row."""
    left, right = (report["examples"][name] for name in names)
    blocks = []
    for i in range(max(len(left), len(right))):
        both = [column[i] if i < len(column) else None for column in (left, right)]
        rows = [
            [_FIELDS[name], *(_field(one, name) for one in both)] for name in _FIELDS if any(one and one[name] is not None for one in both)
        ]
        blocks.append(markdown_table(("", *titles), rows))
    return f"## {heading}\n\n" + "\n\n".join(blocks) if blocks else ""


def _field(example: dict[str, Any] | None, name: str) -> str:
    if example is None or example[name] is None:
        return "–"
    similarity = f"**{_number(example[f'{name}_similarity'], 3)}** " if name in SIDES else ""
    return similarity + escape_markdown(example[name])


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def to_svg(report: dict[str, Any]) -> str:
    """Histograms of both sides as SVG text. Letters are drawn as outlines: no viewer needs the font, and none is fetched."""
    from matplotlib.figure import Figure

    similarity, edges = report["similarity"], report["similarity"]["bin_edges"]
    with style("filter_report", **{"svg.fonttype": "path", "font.size": 10, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(7.5, 3.2), layout="constrained")
        axes = figure.subplots(1, 2, sharex=True, sharey=True)
        for axis, side in zip(axes, SIDES, strict=True):
            kept, dropped = (_shares(similarity[side][f"histogram_{name}"]) for name in ("kept", "dropped"))
            axis.stairs(kept, edges, fill=True, color=BLUE, alpha=0.55, label=f"kept ({report['kept']:,})")
            if sum(dropped):
                axis.stairs(dropped, edges, color=VERMILION, linewidth=1.8, label=f"dropped ({report['pairs'] - report['kept']:,})")
            if report["threshold"] is not None:
                axis.axvline(report["threshold"], color="black", linestyle="--", linewidth=1, label=f"threshold {report['threshold']:g}")
            axis.set(title=f"{side} responses", xlabel="cosine with the policy's text (no unit)")
        axes[0].set_ylabel("share of its group (%)")
        axes[1].legend(frameon=False, fontsize=9)
        return svg_of(figure)


def _shares(counts: list[int]) -> list[float]:
    return [100 * c / max(sum(counts), 1) for c in counts]
