"""The arms of a report: runs that differ in nothing but their seeds, each with its diagnostics, and one row of figures an arm."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.evaluation.curves import Curve, Estimate, estimate
from jaxrlhf.evaluation.findings import Trial, difference_to, equally_far
from jaxrlhf.evaluation.intervals import Interval, from_fields, mean_interval
from jaxrlhf.report import diagnoses as reading
from jaxrlhf.report.costs import flops_by_part, seconds_by_part, seconds_of, share_of_corrections
from jaxrlhf.report.runs import ReportError, RunRead, now_doing, read_runs, settings_key

TRAINING = ("rollout/score", "kl/sft", "rollout/kl")


class View(NamedTuple):
    """One run and what is computed from its folder."""

    run: RunRead
    curve: Curve
    prompts: Curve  # the same curve, of every prompt
    last_gold: dict[str, float]
    reliabilities: dict[int, dict[str, Any]]
    drifts: dict[int, dict[str, float | None]]
    budgets: list[dict[str, Any]]
    weights: dict[int, dict[str, Any]]
    filters: dict[int, dict[str, Any]]
    seconds: dict[str, float]
    flops: tuple[dict[str, float | None], list[str]]
    training: dict[str, list[tuple[float, float]]]
    lineage: list[dict[str, Any]]

    def by_round(self, name: str) -> list[float | None]:
        """One figure of summary.json, π_SFT first."""
        return [value if isinstance(value := row.get(name), int | float) else None for row in self.run.rounds]

    def intervals(self, name: str) -> list[Interval | None]:
        """The same with its interval over prompts."""
        return [from_fields(row, name) for row in self.run.rounds]


def view_of(run: RunRead) -> View:
    """Everything is read here, so that `run.missing` is complete afterwards."""
    return View(
        run, *reading.curves(run), reading.last_gold(run), reading.reliabilities(run), reading.drifts(run),
        reading.budgets(run), reading.weights(run), reading.filters(run), seconds_by_part(run),
        flops_by_part(run), reading.training(run, TRAINING), reading.lineage_lines(run),
    )  # fmt: skip


class Arm(NamedTuple):
    """Runs under one name, lowest seed first."""

    name: str
    views: list[View]

    @property
    def first(self) -> View:
        return self.views[0]

    @property
    def compared(self) -> list[View]:
        """The seeds that means are taken of: those with the most finished rounds. One that is behind would mix rounds with one another."""
        furthest = max(len(view.run.rounds) for view in self.views)
        return [view for view in self.views if len(view.run.rounds) == furthest]

    @property
    def trials(self) -> list[Trial]:
        """`compared`, as sentences are made of them."""
        return [Trial(self.name, view.run.seed, view.run.rounds, view.last_gold, view.run.finished) for view in self.compared]


class Collected(NamedTuple):
    """All arms of a report, and the folders nothing could be shown of, in words."""

    arms: list[Arm]
    problems: list[str]
    folders: list[Path]


def collect(folders: Sequence[str | Path]) -> Collected:
    """Read every folder. Raises ReportError where none of them has anything to show; one that has not is named in `problems`."""
    found: list[tuple[Path, RunRead]] = []
    problems: list[str] = []
    seen: set[Path] = set()
    for folder in map(Path, folders):
        try:
            runs = read_runs(folder)
        except ReportError as error:
            problems.append(str(error))
            continue
        new = [run for run in runs if run.folder.resolve() not in seen]
        seen |= {run.folder.resolve() for run in new}
        found += [(folder, run) for run in new]
    if not found:
        raise ReportError("\n".join(problems) or "name at least one run folder.")
    return Collected(_arms(found), problems, [Path(one) for one in folders])


def _arms(found: Sequence[tuple[Path, RunRead]]) -> list[Arm]:
    """Runs of equal settings are one arm's seeds; arms of equal names and other settings are told apart by their run's name."""
    groups: dict[tuple[str, str, Any], list[RunRead]] = {}
    homes: dict[tuple[str, str, Any], Path] = {}
    for folder, run in found:
        key = (run.arm, settings_key(run), None)
        if any(one.seed == run.seed for one in groups.get(key, [])):
            key = (run.arm, settings_key(run), str(run.folder))  # the same settings and seed, run again: another line, no second seed
        groups.setdefault(key, []).append(run)
        homes.setdefault(key, folder)
    names = [key[0] for key in groups]
    labels: list[str] = []
    for key in groups:
        home = homes[key].expanduser().resolve().name
        label = key[0] if names.count(key[0]) == 1 else f"{home}/{key[0]}" if home != key[0] else str(groups[key][0].folder)
        while label in labels:
            label = f"{label}′"
        labels.append(label)
    ordered = [sorted(runs, key=lambda run: -1 if run.seed is None else run.seed) for runs in groups.values()]
    return [Arm(label, [view_of(run) for run in runs]) for label, runs in zip(labels, ordered, strict=True)]


class Column(NamedTuple):
    """A column of the summary table: its key, title, unit or meaning, digits, and how it is taken of a run. `interval`: of one seed it
    has an interval over prompts under this name of summary.json, in the last round that has it."""

    key: str
    title: str
    meaning: str
    digits: int
    of: Callable[[View], float | None]
    interval: str | None = None


def _last(name: str) -> Callable[[View], float | None]:
    return lambda view: next((value for value in reversed(view.by_round(name)) if value is not None), None)


def _end(name: str) -> Callable[[View], float | None]:
    return lambda view: values[-1] if (values := view.by_round(name)) else None


def _peak(name: str) -> Callable[[View], float | None]:
    return lambda view: None if (peak := view.curve.peak) is None else getattr(peak, name)


def _ece(view: View) -> float | None:
    return view.reliabilities[max(view.reliabilities)].get("ece") if view.reliabilities else None


def _gap_and_lost(view: View) -> dict[str, Interval | None]:
    """Of every prompt: what the curve says of their means."""
    gap, peak, last = view.prompts.gap, view.curve.peak, view.prompts.points[-1:]
    highest: Any = next((p.gold for p in view.prompts.points if peak is not None and p.round == peak.round), None)
    lost = highest - last[0].gold if highest is not None and last[0].gold is not None else None
    return {name: None if one is None else mean_interval(np.asarray(one)) for name, one in (("gap", gap), ("lost", lost))}


def _agreement(view: View) -> float | None:
    return view.drifts[max(view.drifts)]["agreement"] if view.drifts else None


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


COLUMNS = (
    Column("round", "rounds", "finished", 0, lambda view: len(view.run.rounds) - 1 if view.run.rounds else None),
    Column("gold", "gold", "true reward at the end", 3, _end("gold"), "gold"),
    Column("peak", "peak gold", "the highest of all rounds, SFT included", 3, _peak("gold")),
    Column("peak_round", "at round", "of the peak; 0 is SFT", 0, _peak("round")),
    Column("lost", "lost since", "gold at the peak less gold at the end", 3, lambda view: view.curve.lost),
    Column("gap", "gap (σ)", "proxy gain less gold gain at the end, in standard deviations", 2, lambda view: view.curve.gap),
    Column("proxy", "proxy", "the last round's reward model, nats of preference; not comparable across refits", 3, _end("proxy"), "proxy"),
    Column("kl_sft", "KL to SFT", "nats a response", 2, _end("kl_sft"), "kl_sft"),
    Column("reward_accuracy", "RM accuracy", "on fresh pairs of the policy that entered the last round", 3, _last("reward_accuracy"),
           "reward_accuracy"),
    Column("ece", "ECE", "expected calibration error of the same", 3, _ece, "ece"),
    Column("agreement", "RM drift", "share of held-out pairs on which the last two reward models agree", 3, _agreement),
    Column("ess", "ESS %", "of the last weighted refit", 1, lambda view: _percent(_last("ess_fraction")(view))),
    Column("win_rate", "win rate %", "strict, against the reference responses", 1, lambda view: _percent(_end("win_rate")(view)),
           "win_rate"),
    Column("length", "length", "tokens of a response", 1, _end("length")),
    Column("corrections", "time on RM %", "share of wall-clock without evaluation, spent on correcting the reward model", 1,
           lambda view: _percent(share_of_corrections(view.seconds))),
    Column("corrections_flops", "FLOPs on RM %", "share of FLOPs without evaluation, spent on correcting the reward model", 1,
           lambda view: _percent(share_of_corrections(view.flops[0]))),
    Column("seconds", "seconds", "of all stages, shared ones included", 0,
           lambda view: seconds_of(stage.record for stage in view.run.stages) or None),
)  # fmt: skip


def difference_column(arms: Sequence[Arm]) -> Column:
    return Column(
        "difference", f"gold − {arms[0].name}", "at the end, on the same seeds, or prompts where there is one seed", 3, lambda _: None
    )


def table(arms: Sequence[Arm]) -> tuple[list[Column], list[dict[str, Any]]]:
    """(columns that have a value somewhere, one row an arm): {"arm", "seeds" (of the means), "state", "intervals": {key: Interval} over
    prompts of the first seed where it is the only one or all are alike, key: Estimate | None, …}."""
    columns = [*COLUMNS[:2], difference_column(arms), *COLUMNS[2:]] if arms else []
    rows = []
    for arm in arms:
        row: dict[str, Any] = {"arm": arm.name, "seeds": len(arm.compared), "state": state_of(arm)}
        row |= {column.key: estimate([column.of(view) for view in arm.compared]) for column in columns}
        row["intervals"] = _over_prompts(arm.compared[0], columns)
        if arm is not arms[0] and equally_far(arm.trials[0], arms[0].trials[0]):
            row["difference"] = difference_to(_by_seed(arms[0], COLUMNS[1]), _by_seed(arm, COLUMNS[1]))
            own, other = arm.compared[0].last_gold, arms[0].compared[0].last_gold
            both = [name for name in own if name in other]
            if row["difference"] is not None and both:
                row["intervals"]["difference"] = mean_interval(np.array([own[name] - other[name] for name in both]))
        alone = {key for key, one in row["intervals"].items() if one and row[key] and row[key].error is None and not math.isnan(one.low)}
        row["intervals"] = {key: one for key, one in row["intervals"].items() if key in alone}
        rows.append(row)
    return [column for column in columns if any(row[column.key] is not None for row in rows)], rows


def _over_prompts(view: View, columns: Sequence[Column]) -> dict[str, Interval | None]:
    found = _gap_and_lost(view)
    for column in (one for one in columns if one.interval):
        known = [one for one in view.intervals(column.interval or "") if one is not None]
        found[column.key] = known[-1].scaled(100 if column.key == "win_rate" else 1) if known else None
    return found


def _by_seed(arm: Arm, column: Column) -> dict[int | None, float | None]:
    return {view.run.seed: column.of(view) for view in arm.compared}


def best_of(arms: Sequence[Arm], column: Column) -> str | None:
    """The arm that lies more than two standard errors above every other, seed by seed; None of one seed, which has no error, and where
    another has not come equally far."""
    for arm in arms:
        fair = [other for other in arms if other is not arm and equally_far(arm.trials[0], other.trials[0])]
        against = [difference_to(_by_seed(other, column), _by_seed(arm, column)) for other in fair] if len(fair) == len(arms) - 1 else []
        if against and all(one is not None and one.interval.direction > 0 for one in against):
            return arm.name
    return None


def origin(arms: Sequence[Arm]) -> str:
    """Of what data and which model the runs are, what they were made with, and when their last stage was finished."""
    runs = [view.run for arm in arms for view in arm.views]
    facts = []
    for name, of in (("data", _data_of), ("model", _model_of)):
        found = dict.fromkeys(one for run in runs if (one := of(run.config)))
        facts += [f"{name}: {', '.join(found)}"] if found else []
    records = [stage.record for run in runs for stage in run.stages]
    versions = [one for record in records if isinstance(one := record.get("versions"), dict)]
    for name in dict.fromkeys(name for one in versions for name in one):
        found = dict.fromkeys(str(one[name]) for one in versions if one.get(name))
        facts += [f"{name} {', '.join(found)}"] if found else []
    finished = max((record.get("finished") or "" for record in records), default="")
    return " · ".join(facts + ([f"last stage finished {finished}"] if finished else []))


def _data_of(config: dict[str, Any]) -> str:
    data = config.get("data")
    train = data.get("train") if isinstance(data, dict) else None
    names = train if isinstance(train, list) else [train]
    return ", ".join(Path(str(name)).name for name in names if name)


def _model_of(config: dict[str, Any]) -> str:
    model = config.get("model")
    if not isinstance(model, dict):
        return ""
    shape = model.get("shape")
    if model.get("source") or not isinstance(shape, dict):
        return str(model.get("source") or "")
    return f"{shape.get('family')} from scratch, {shape.get('hidden_size')} wide and {shape.get('num_layers')} deep"


def state_of(arm: Arm) -> str:
    open_ = [view.run for view in arm.views if not view.run.finished]
    if not open_:
        return "finished"
    return f"{len(arm.views) - len(open_)} of {len(arm.views)} finished" if len(arm.views) > 1 else now_doing(open_[0]) or "unfinished"


def as_text(value: Estimate | None, digits: int, *, sign: bool = False) -> str:
    """mean, or mean ± one standard error; "–" where there is nothing."""
    if value is None:
        return "–"
    if digits == 0 and value.error and abs(value.mean) < 100:
        digits = 1  # whole numbers have means that are none
    return value.spelled(digits, sign=sign)
