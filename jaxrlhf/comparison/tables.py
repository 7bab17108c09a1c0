"""The tables of a comparison, in the terminal and in Markdown."""

import json
from pathlib import Path
from typing import Any

from jaxrlhf.comparison.figures import FIGURES, ROWS, TABLE, Comparison
from jaxrlhf.files import write_whole
from jaxrlhf.formatting import markdown_table


def write_comparison(comparison: Comparison, folder: str | Path) -> None:
    """comparison.jsonl, comparison.md and, last, comparison.json: where it is, the others are whole."""
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in comparison.rows)
    write_whole(Path(folder) / ROWS, lines, errors="surrogatepass")
    write_whole(Path(folder) / TABLE, as_markdown(comparison.figures), errors="surrogatepass")
    figures = json.dumps(comparison.figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(Path(folder) / FIGURES, figures, errors="surrogatepass")


Row = tuple[str, ...]


def main_table(figures: dict[str, Any]) -> tuple[Row, list[Row]]:
    """(head, rows) of what the two sides won and are, as text."""
    columns = [name for name in ("gold", "judge") if figures[name] is not None]
    found = [figures[name] for name in columns]
    rows = [
        ("prompts", *(str(f["n"]) for f in found)),
        ("A wins (strictly)", *(_share(f["win_rate"], f["win_rate_low"], f["win_rate_high"]) for f in found)),
        ("ties", *(_share(f["tie_rate"]) for f in found)),
        ("score of A (wins + ½ ties)", *(_share(f["score"], f["score_low"], f["score_high"]) for f in found)),
        ("score of A at equal lengths", *(_share(*_values(f["length_controlled"], "score")) for f in found)),
    ]
    if figures["gold"] is not None:
        blank = ("",) * (len(columns) - 1)
        rows += [(f"mean gold of {side.upper()}", _plain(*_values(figures[side]["gold"], "value")), *blank) for side in ("a", "b")]
        gap = figures["gold"]["difference"]
        rows.append(("difference, paired", _plain(*_values(gap, "difference")) + f", p ≈ {gap['p']:.2g}", *blank))
    return ("A against B", *columns), rows


def reference_table(figures: dict[str, Any]) -> list[Row]:
    """What each side wins against the references by gold, and the paired difference of their scores; empty without references."""
    against = figures["against_references"]
    if against is None:
        return []
    rows = [
        (
            side.upper(),
            _share(f["win_rate"], f["win_rate_low"], f["win_rate_high"]),
            _share(f["tie_rate"]),
            _share(*_values(f, "score", True)),
        )
        for side, f in (("a", against["a"]), ("b", against["b"]))
    ]
    gap = against["difference"]
    return [*rows, ("A − B", "", "", _share(*_values(gap, "difference")) + f", p ≈ {gap['p']:.2g}")]


def as_markdown(figures: dict[str, Any]) -> str:
    """comparison.md: the tables, what was left out, and how to read them."""
    unit = figures["length_unit"]
    lines = ["# A against B", ""]
    for side in ("a", "b"):
        length = figures[side]["length"]
        lines.append(f"- {side.upper()}: {figures[side]['name']}" + ("" if length is None else f", {length:.1f} {unit} on average"))
    lines += ["", markdown_table(*main_table(figures), others="---:")]
    if rows := reference_table(figures):
        lines += ["", markdown_table(("by gold, against the references", "wins (strictly)", "ties", "score"), rows, others="---:")]
    for name in ("gold", "judge"):
        if figures[name] is not None and figures[name]["by_length"]:
            bins = figures[name]["by_length"]
            rows = [(f"{b['low']:+.0f} … {b['high']:+.0f}", str(b["n"]), _share(b["score"]), _share(b["win_rate"])) for b in bins]
            lines += ["", markdown_table((f"{name}: A longer by ({unit})", "prompts", "score of A", "A wins"), rows, others="---:")]
    if figures["judge"] is not None:
        lines += ["", judge_line(figures["judge"]["usage"])]
    if figures["agreement"] and figures["agreement"]["rate"] is not None:
        lines += ["", f"Judge and gold prefer the same response on {_share(figures['agreement']['rate'])} of the prompts both decide."]
    lines += ["", *(f"- {note}" for note in figures.get("notes", ())), ""] if figures.get("notes") else [""]
    lines.append(
        "Brackets: 95 % over prompts (wins and scores: Wilson; at equal lengths: of the logistic regression; all else: Student's t)."
    )
    return "\n".join(lines) + "\n"


def judge_line(usage: dict[str, Any]) -> str:
    """The judge's account in a sentence or two."""
    parts = [f"The judge gave {usage['judged']} of {usage['pairs']} verdicts in {usage['requests']} requests"]
    parts.append(f"{usage['prompt_tokens']} tokens in and {usage['completion_tokens']} out")
    parts.append("cost unknown" if usage["cost"] is None else f"cost {usage['cost']:.4g}")
    line = ", ".join(parts) + "."
    if usage["consistency"] is not None:
        line += f" Both orders agree on {_share(usage['consistency'])} of the pairs"
        line += "." if usage["first_rate"] is None else f"; the first response won {_share(usage['first_rate'])} of the decided questions."
    if usage["no_verdict"]:
        line += (
            f" Without a verdict, and left out: {usage['no_verdict']} pairs ({usage['nonsense']} questions with nonsense for an answer, "
            f"{usage['refused']} refused, {usage['unanswered']} unanswered; the latter two are asked again by the same command)."
        )
    return line


def _values(figures: dict[str, Any] | None, name: str, prefixed: bool = False) -> tuple[float | None, ...]:
    low, high = (f"{name}_low", f"{name}_high") if prefixed else ("low", "high")
    return (None,) if figures is None else (figures[name], figures[low], figures[high])


def _share(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A share as per cent, with its interval."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" + ("" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]")


def _plain(value: float | None, low: float | None = None, high: float | None = None) -> str:
    return "–" if value is None else f"{value:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")
