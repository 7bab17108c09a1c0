"""The table at the end of a run, and words that follow its numbers."""

import math
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from jaxrlhf.data.tables import read_table
from jaxrlhf.evaluation.baselines import beside
from jaxrlhf.evaluation.findings import Trial, notes_of
from jaxrlhf.evaluation.findings import findings as said
from jaxrlhf.evaluation.intervals import from_fields
from jaxrlhf.files import DamagedFile, read_json
from jaxrlhf.formatting import too_narrow

Summary = dict[str, Any]
AGAIN = "`jaxrlhf run` on its config writes it again"

COLUMNS: tuple[tuple[str, str], ...] = (
    ("round", "round"),
    ("gold", "gold"),
    ("proxy_start", "proxy\nbefore"),
    ("proxy", "proxy\nafter"),
    ("kl_sft", "KL to\nSFT"),
    ("ess", "ESS"),
    ("reward_accuracy", "RM\naccuracy"),
    ("win_rate", "win rate\n[95 %]"),
)

SUBSETS = ("nearest", "random-subset")  # reward updates that keep some of the pairs; the second is the control of the first

SUBSET_COLUMNS: tuple[tuple[str, str], ...] = (
    ("pairs", "pairs\nkept"),
    ("reward_accuracy", "RM acc.\nown text"),
    ("reward_accuracy_valid", "RM acc.\nheld-out"),
    ("gold", "gold"),
    ("proxy_start", "proxy\nbefore"),
    ("proxy", "proxy\nafter"),
    ("kl_sft", "KL to\nSFT"),
)

NEED_GOLD = ("gold", "reward_accuracy", "win_rate")
WITHOUT_GOLD = (("reward_accuracy_valid", "RM acc.\nheld-out"),)

# Whose intervals the table has, from the widest screen to the narrowest; the win rate has its own in brackets.
INTERVALS_SHOWN = (("gold", "kl_sft", "reward_accuracy", "proxy_start", "proxy"), ("gold", "kl_sft", "reward_accuracy"), ("gold",), ())

LEGENDS = {
    "gold": "gold: true reward of the policy.",
    "proxy": "proxy before / after: the round's reward model on the policy that enters / leaves the round (nats of preference; not "
    "comparable across rounds that refit).",
    "kl_sft": "KL to SFT: nats a response.",
    "ess": "ESS: pairs that still count after weighting.",
    "reward_accuracy": "RM accuracy: on fresh pairs of the policy that enters the round, labelled by gold.",
    "win_rate": "win rate: against the reference responses, strict.",
    "reward_accuracy_valid": "RM acc. held-out: on held-out pairs. No gold is named: nothing here says whether the policy became better.",
}


def read_summaries(folder: Path) -> dict[str, Summary]:
    """The summaries of a run folder: of its arms, or its own; in the order of the config."""
    names = _arms(folder)
    found = [path for name in names if (path := folder / name / "summary.json").exists()]
    if not names and (folder / "summary.json").exists():
        found = [folder / "summary.json"]
    if not found:
        raise FileNotFoundError(f"{folder} holds no summary.json: the run has not finished a round; run `jaxrlhf run` on its config first.")
    return {path.parent.name: _read(path) for path in found}


def _read(path: Path) -> Summary:
    """A summary.json, with gold of the last responses by prompt: `last_gold`, empty where there is none."""
    body = read_json(path, AGAIN)
    if not isinstance(body.get("rounds"), list):
        raise DamagedFile(path, "has no rounds", AGAIN)
    number = body["rounds"][-1]["round"] if body["rounds"] else 0
    table = next(path.parent.glob(f"stages/*-{f'r{number}' if number else 'sft'}-evaluation/samples.parquet"), None)
    columns = {} if table is None else read_table(table)[0]
    return body | {"last_gold": dict(zip(columns.get("id", []), columns.get("gold_1", []), strict=False))}


def _arms(folder: Path) -> list[str]:
    """The arms of the config that was run, in its order; an arm that left the config is no part of the run."""
    config = folder / "config.yaml"
    return list((yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("arms") or {}) if config.exists() else []


def show(summaries: dict[str, Summary], console: Console | None = None) -> None:
    """One table for all arms with as many of the intervals as fit, a legend, and what the figures say."""
    console = console or Console()
    columns = columns_of(summaries)
    for shown in INTERVALS_SHOWN:
        table = _table(summaries, columns, shown)
        if Console(width=10_000).measure(table).maximum <= console.width:
            break
    console.print(table)
    if (subsets := subset_table(summaries)) is not None:
        console.print(subsets)
    legend = [LEGENDS[name] for name, _ in columns if name in LEGENDS]
    n = sorted({row["kl_sft_n"] for one in summaries.values() for row in one["rounds"] if row.get("kl_sft_n")})
    if shown and n:
        legend.append(f"±: half of the 95 % interval over n = {', '.join(map(str, n))} prompts.")
    console.print(" ".join(legend), style="dim", highlight=False)
    for line in findings(summaries):
        console.print(f"- {line}", highlight=False)
    rows = [row for one in summaries.values() for row in one["rounds"]]
    narrow = [title for name, title in columns if any(_cell(row, name, name in shown) != _cell(row, name, True) for row in rows)]
    if narrow:
        console.print(f"- {too_narrow([f'the interval of {title}' for title in narrow], 'summary.json')}", highlight=False)


def _table(summaries: dict[str, Summary], columns: tuple[tuple[str, str], ...], intervals: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    for name, title in columns:
        first = name == "round"  # alone may be folded: figures are whole
        table.add_column(f"arm {title}" if first and len(summaries) > 1 else title, justify="right", no_wrap=not first, overflow="fold")
    for arm, summary in summaries.items():
        for row in summary["rounds"]:
            cells = [_cell(row, name, name in intervals) for name, _ in columns]
            if len(summaries) > 1 and row is summary["rounds"][0]:
                cells[0] = f"{arm}  {cells[0]}"
            table.add_row(*cells, end_section=row is summary["rounds"][-1])
    return table


def subset_table(summaries: dict[str, Summary]) -> Table | None:
    """Filtered against random, round by round, where a run has both at one budget; `held-out` is a test set that nothing has filtered."""
    rows = [(row, arm) for arm, summary in summaries.items() for row in summary["rounds"] if row.get("update") in SUBSETS]
    both = [(row, arm) for row, arm in rows if {other["update"] for other, _ in rows if other["round"] == row["round"]} == set(SUBSETS)]
    if not both:
        return None
    columns = [column for column in SUBSET_COLUMNS if any(row.get(column[0]) is not None for row, _ in both)]
    equal = all(other["pairs"] == row["pairs"] for row, _ in both for other, _ in both if other["round"] == row["round"])
    budget = "equal budget" if equal else "NOT the same number of pairs in every round"  # a threshold keeps what it keeps
    table = Table(title=f"Filtered against random, {budget}", box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for title in ("round", "arm", *(title for _, title in columns)):
        table.add_column(title, justify="left" if title == "arm" else "right", no_wrap=True)
    both.sort(key=lambda item: (item[0]["round"], SUBSETS.index(item[0]["update"])))
    for n, (row, arm) in enumerate(both):
        last = n + 1 == len(both) or both[n + 1][0]["round"] != row["round"]
        table.add_row(str(row["round"]), arm, *(_cell(row, name) for name, _ in columns), end_section=last)
    return table


def columns_of(summaries: dict[str, Summary]) -> tuple[tuple[str, str], ...]:
    """The columns that can say something: without gold the reward models' accuracy on held-out pairs, in place of all that needs it."""
    if any(row["gold"] is not None for summary in summaries.values() for row in summary["rounds"]):
        return COLUMNS
    return tuple(column for column in COLUMNS if column[0] not in NEED_GOLD) + WITHOUT_GOLD


def _cell(row: dict[str, Any], name: str, interval: bool = False) -> str:
    value = row.get(name)
    if name == "round":
        return "SFT" if value == 0 else str(value)
    if value is None:
        return "–"
    if name == "win_rate":
        return f"{value:.2f} [{row['win_rate_low']:.2f}, {row['win_rate_high']:.2f}]".replace("0.", ".")
    digits = 0 if name in ("ess", "pairs") else 3 if name.startswith("reward_accuracy") else 2
    text = f"{round(value, digits) + 0.0:.{digits}f}"  # and no -0.00
    found = from_fields(row, name) if interval else None
    if found is None or math.isnan(found.low):
        return text
    return text + f" ±{(found.high - found.low) / 2:.{digits}f}".replace("±0.", "±.")


def findings(summaries: dict[str, Summary]) -> list[str]:
    """What the figures say beyond their intervals, and what the runs note."""
    trials = [
        Trial(arm, one["seed"], one["rounds"], one.get("last_gold") or {}, bool(one.get("finished"))) for arm, one in summaries.items()
    ]
    compared = beside({arm: (one["rounds"], one.get("baselines")) for arm, one in summaries.items()})
    spoke = {f"guard {found['name']}: {found['text']}": None for one in summaries.values() for found in one.get("guards", [])}
    return said(trials) + compared + notes_of((arm, one.get("notes", [])) for arm, one in summaries.items()) + list(spoke)
