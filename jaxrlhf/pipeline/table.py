"""The table at the end of a run, and words that follow its numbers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from jaxrlhf.evaluation.baselines import beside

Summary = dict[str, Any]

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
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in found}


def _arms(folder: Path) -> list[str]:
    """The arms of the config that was run, in its order; an arm that left the config is no part of the run."""
    config = folder / "config.yaml"
    return list((yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("arms") or {}) if config.exists() else []


def show(summaries: dict[str, Summary], console: Console | None = None) -> None:
    """One table for all arms, a legend, and what the figures say."""
    console = console or Console()
    columns = columns_of(summaries)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    if len(summaries) > 1:
        table.add_column("arm")
    for _, title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for arm, summary in summaries.items():
        for row in summary["rounds"]:
            cells = [_cell(row, name) for name, _ in columns]
            named = arm if row is summary["rounds"][0] else ""
            table.add_row(*([named, *cells] if len(summaries) > 1 else cells), end_section=row is summary["rounds"][-1])
    console.print(table)
    if (subsets := subset_table(summaries)) is not None:
        console.print(subsets)
    console.print(" ".join(LEGENDS[name] for name, _ in columns if name in LEGENDS), style="dim", highlight=False)
    for line in findings(summaries):
        console.print(f"- {line}", highlight=False)


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


def _cell(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if name == "round":
        return "SFT" if value == 0 else str(value)
    if value is None:
        return "–"
    if name == "win_rate":
        return f"{value:.2f} [{row['win_rate_low']:.2f}, {row['win_rate_high']:.2f}]"
    text = f"{value:.0f}" if name in ("ess", "pairs") else f"{value:.3f}" if name.startswith("reward_accuracy") else f"{value:.2f}"
    return "0.00" if text == "-0.00" else text


def findings(summaries: dict[str, Summary]) -> list[str]:
    """Sentences computed from the figures; every one holds whichever way they came out."""
    lines = [line for arm, summary in summaries.items() for line in _of_arm(arm, summary)]
    lines += _final_gold(summaries) + beside({arm: (summary["rounds"], summary.get("baselines")) for arm, summary in summaries.items()})
    seeds = {s["seed"] for s in summaries.values()}
    if len(seeds) == 1:
        lines.append(f"This is one seed ({seeds.pop()}); differences between arms need several before they mean anything.")
    return lines + sorted({note for s in summaries.values() for note in s.get("notes", [])})


def _final_gold(summaries: dict[str, Summary]) -> list[str]:
    """Who ends highest, where all arms have come equally far: one more round is more training, not a better method."""
    last = {arm: summary["rounds"][-1] for arm, summary in summaries.items()}
    gold = {arm: row["gold"] for arm, row in last.items() if row["gold"] is not None}
    if len(gold) < 2:
        return []
    if len({last[arm]["round"] for arm in gold}) > 1:
        reached = ", ".join(f"{arm} {last[arm]['round']}" for arm in gold)
        return [f"The arms have not finished equally many rounds ({reached}), so their final gold is not compared."]
    ranked = sorted(gold.items(), key=lambda item: -item[1])
    best = [arm for arm, value in ranked if value == ranked[0][1]]
    verdict = f"{best[0]} ends highest" if len(best) == 1 else f"{' and '.join(best)} are equal"
    return [f"Final gold: {', '.join(f'{arm} {value:.2f}' for arm, value in ranked)}. {verdict}."]


def _of_arm(arm: str, summary: Summary) -> list[str]:
    rounds = summary["rounds"]
    trained = [row for row in rounds if row["proxy"] is not None]
    lines = []
    stale = [row for row in trained if proxy_alone_rose(rounds, row)]
    if stale:
        names, first = ", ".join(str(row["round"]) for row in stale), stale[0]
        lines.append(
            f"{arm}: in round {names} the reward model liked the new policy better and gold did not "
            f"(round {first['round']}: proxy {first['proxy_start']:+.2f} → {first['proxy']:+.2f}, "
            f"gold {start_of(rounds, first)['gold']:.2f} → {first['gold']:.2f})."
        )
    elif any(row["gold"] is not None and row["proxy"] > row["proxy_start"] for row in trained):
        lines.append(f"{arm}: gold did not fall in any round in which the proxy rose.")
    fallen = [row["round"] for row in trained if row["proxy"] <= row["proxy_start"]]
    if fallen:
        lines.append(f"{arm}: the proxy did not rise in round {', '.join(map(str, fallen))}; PPO did not learn what it was asked there.")
    accuracies = [(row["round"], row["reward_accuracy"]) for row in trained if row["reward_accuracy"] is not None]
    if len(accuracies) > 1:
        (first, start), (last, end) = accuracies[0], accuracies[-1]
        change = (
            f"stayed at {start:.3f} (rounds {first} and {last})"
            if start == end
            else f"{'fell' if end < start else 'rose'} from {start:.3f} (round {first}) to {end:.3f} (round {last})"
        )
        lines.append(f"{arm}: reward-model accuracy on the policy's own text {change}.")
    return lines


def start_of(rounds: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of the policy that a round started from: the round before, unless the row names another (0: π_SFT)."""
    return rounds[row.get("policy_start", row["round"] - 1)]


def proxy_alone_rose(rounds: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> bool | None:
    """Whether the round's reward model liked what became of its start while gold fell; None where one of the two is not known."""
    before = start_of(rounds, row)
    if None in (before["gold"], row["gold"], row["proxy"], row["proxy_start"]):
        return None
    return row["proxy"] > row["proxy_start"] and row["gold"] < before["gold"]
