"""The table of a sweep, one row an arm: on the screen, as a page for people, as JSON for machines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from jaxrlhf.evaluation.curves import NO_ERROR, Estimate
from jaxrlhf.formatting import as_strict_json, markdown_table, too_narrow
from jaxrlhf.sweep.findings import findings
from jaxrlhf.sweep.statistics import FIGURES, Sweep


class Column(NamedTuple):
    """`keep`: the higher, the longer the column stays where the screen is narrow."""

    title: str
    cell: Callable[[Sweep, str], str]
    keep: int


def _mean(figure: str, digits: int) -> Callable[[Sweep, str], str]:
    return lambda sweep, arm: _spelled(sweep.estimate(arm, figure), digits)


def _spelled(found: Estimate | None, digits: int, *, sign: bool = False) -> str:
    return "–" if found is None else found.spelled(digits, sign=sign)


def _fits(sweep: Sweep, arm: str) -> str:
    found = sweep.estimate(arm, "fits")
    return "–" if found is None else f"{found.mean:.1f}".removesuffix(".0")


def _least(found: Estimate | None, sign: str = "") -> str:
    return "–" if found is None else f"{found.least:{sign}.2f}"


def columns_of(sweep: Sweep) -> list[Column]:
    return [
        Column("n", lambda sweep, arm: str(len(sweep.finished(arm))), 100),
        Column("gold", _mean("gold", 2), 99),
        Column(f"gold −\n{sweep.first}", lambda sweep, arm: _spelled(sweep.difference(arm), 2, sign=True), 98),
        Column("gold,\nleast", lambda sweep, arm: _least(sweep.estimate(arm, "gold")), 97),
        Column("diff.,\nleast", lambda sweep, arm: _least(sweep.difference(arm), "+"), 90),
        Column("gold,\nbest round", _mean("peak", 2), 92),
        Column("win rate", _mean("win_rate", 2), 94),
        Column("proxy", _mean("proxy", 2), 91),
        Column("KL to\nSFT", _mean("kl_sft", 2), 96),
        Column("RM\naccuracy", _mean("reward_accuracy", 3), 95),
        Column("ESS", _mean("ess", 0), 93),
        Column("RM\nfits", _fits, 89),
        Column("s", _mean("seconds", 0), 88),
    ]


SETTINGS: tuple[tuple[str, str], ...] = (
    ("policy_update", "policy"),
    ("reference", "KL reference"),
    ("reward", "reward model after round 1"),
    ("restart", "restarts each round"),
    ("rounds", "rounds"),
    ("episodes", "episodes"),
)

LEGEND = (
    "Mean ± standard error over n seeds (sample deviation / √n). gold: true reward of the last policy; least: of the seeds; best round: of "
    "each seed, which takes gold to know. proxy: the last round's reward model on the last policy, not comparable between reward models. "
    "KL to SFT: nats a response. RM accuracy: on fresh text of the policy that enters the last round, labelled by gold. ESS: pairs that "
    "still count in the last weighted fit. RM fits: reward models fitted. s: seconds of all stages of a run, those it shares included. "
    f"{NO_ERROR}"
)


def show(sweep: Sweep, console: Console | None = None) -> None:
    """The table in as many columns as fit, what the rows are, a legend, and what the figures say."""
    console = console or Console()
    columns = columns_of(sweep)
    table = _table(sweep, columns)
    left_out = []
    while len(columns) > 2 and Console(width=10_000).measure(table).maximum > console.width:
        worst = min(columns, key=lambda column: column.keep)
        left_out.append(worst.title)
        columns.remove(worst)
        table = _table(sweep, columns)
    console.print(table)
    settings = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    settings.add_column("arm", overflow="fold", min_width=min(24, max(map(len, sweep.settings))))
    for _, title in SETTINGS:
        settings.add_column(title, overflow="fold", justify="right" if title in ("rounds", "episodes") else "left")
    for arm, setting in sweep.settings.items():
        settings.add_row(arm, *(_setting(setting, name) for name, _ in SETTINGS))
    console.print(settings)
    console.print(LEGEND, style="dim", highlight=False)
    for line in findings(sweep):
        console.print(f"- {line}", highlight=False)
    if left_out:
        console.print(f"- {too_narrow(left_out, 'sweep.md')}", highlight=False)


def _table(sweep: Sweep, columns: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for arm in sweep.settings:
        table.add_row(arm, *(column.cell(sweep, arm) for column in columns))
    return table


def _setting(setting: Mapping[str, Any], name: str) -> str:
    value = setting[name]
    return ("–" if value == 0 else f"{value:,}") if isinstance(value, int) else str(value)


def as_markdown(sweep: Sweep) -> str:
    """The whole table, what the rows are, the legend and the findings, as a page."""
    columns = columns_of(sweep)
    head = ["arm", *(column.title.replace("\n", " ") for column in columns)]
    rows = [[arm, *(column.cell(sweep, arm) for column in columns)] for arm in sweep.settings]
    about = [[arm, *(_setting(setting, name) for name, _ in SETTINGS)] for arm, setting in sweep.settings.items()]
    parts = [
        f"# {sweep.name}",
        _grid(head, rows),
        LEGEND,
        "\n".join(f"- {line}" for line in findings(sweep)),
        _grid(["arm", *(title for _, title in SETTINGS)], about),
    ]
    return "\n\n".join(parts) + "\n"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first, *others = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    return markdown_table(first, others)


def as_json(sweep: Sweep) -> dict[str, Any]:
    """The table for machines; numbers that JSON lacks are the strings "NaN", "Infinity" and "-Infinity"."""
    arms = {}
    for arm, setting in sweep.settings.items():
        found = {name: sweep.estimate(arm, name) for name in FIGURES}
        arms[arm] = {
            "setting": dict(setting),
            "seeds": [run.seed for run in sweep.finished(arm)],
            "figures": {name: one and one._asdict() for name, one in found.items()},
            "difference": (one := sweep.difference(arm)) and one._asdict(),
        }
    runs = [asdict(run) | {"figures": run.figures} for run in sweep.runs]
    body = {"name": sweep.name, "sft_seed": sweep.sft_seed, "compared_with": sweep.first, "arms": arms, "runs": runs}
    return as_strict_json(body | {"findings": findings(sweep)})
