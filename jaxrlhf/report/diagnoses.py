"""What a run's folder says of its reward models and policies: curves, reliability, drift, KL budget, training, lineage."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrlhf.evaluation.curves import Curve, curve_of
from jaxrlhf.evaluation.diagnostics import RELIABILITY, VALID_SCORES, drift, kl_budget
from jaxrlhf.report.run_files import number, read_json, read_scores, sample_columns
from jaxrlhf.report.runs import RunRead, StageRead

CURVES_KEPT = 400  # points of a training curve at most: a page has no more pixels


def curves(run: RunRead) -> tuple[Curve, Curve]:
    """Gold and proxy by round, with the scales that make proxies comparable where the run kept them; the same of every prompt: its
    figures are arrays over prompts (those of samples.parquet, first responses), None where these are not known."""
    starts = _policies_named(run, "start")
    fitted = set(run.fitted) or {row["round"] for row in run.rounds if row["round"] == 1 or row.get("refit")}
    scales = {}
    for n, members in run.fitted.items():
        mean = _mean_scores(run, members)
        if mean is not None and np.std(mean) > 0:
            scales[n] = float(np.std(mean))
    given = {"starts": starts, "fitted": fitted, "scales": scales, "gold_scale": _gold_scale(run)}
    return curve_of(run.rounds, **given), curve_of(_by_prompt(run), **given)


def _by_prompt(run: RunRead) -> list[dict[str, Any]]:
    samples = {s.round or 0: sample_columns(s.folder, run.missing) for s in run.of("evaluation")}
    prompts = samples.get(0, {}).get("id")
    rows = []
    for row in run.rounds:
        columns = samples.get(row["round"], {})
        same = columns if prompts and columns.get("id") == prompts else {}
        names = {"gold": "gold_1", "proxy": "proxy", "proxy_start": "proxy_start_1"}
        rows.append({"round": row["round"]} | {name: _numbers(same.get(column)) for name, column in names.items()})
    return rows


def _numbers(values: list[Any] | None) -> np.ndarray | None:
    found = [number(value) for value in values or []]
    return np.array(found, np.float64) if found and None not in found else None


def last_gold(run: RunRead) -> dict[str, float]:
    """Gold of the last evaluation's first responses by prompt; empty where it is not known."""
    number_ = run.rounds[-1]["round"] if run.rounds else 0
    last = next((s for s in run.of("evaluation") if (s.round or 0) == number_), None)
    columns = {} if last is None else sample_columns(last.folder, run.missing)
    gold = _numbers(columns.get("gold_1"))
    return {} if gold is None else dict(zip(columns.get("id") or [], gold.tolist(), strict=False))


def _policies_named(run: RunRead, name: str) -> dict[int, int]:
    """Round → the round (0: π_SFT) whose policy its own has as the input `name`, where that is a policy of the run."""
    by_hash = {s.hash: s.round or 0 for s in (*run.policies, *run.of("sft"))}
    return {s.round or 0: by_hash[s.inputs[name]] for s in run.policies if s.inputs.get(name) in by_hash}


def _mean_scores(run: RunRead, members: Sequence[StageRead]) -> np.ndarray | None:
    """Of an ensemble's members on the held-out pairs, [2, M]; None unless all of them kept theirs of the same pairs."""
    scores = [read_scores(s.folder / VALID_SCORES, run.missing) for s in members]
    known = [x for x in scores if x is not None]
    return np.mean(known, axis=0) if known and len({x.shape for x in known}) == 1 and len(known) == len(scores) else None


def _gold_scale(run: RunRead) -> float | None:
    first = next(iter(run.of("evaluation")), None)
    columns = sample_columns(first.folder, run.missing) if first and first.round is None else {}
    gold = [x for name in ("gold_1", "gold_2") for one in columns.get(name) or [] if (x := number(one)) is not None]
    return float(np.std(gold)) or None if gold else None


def reliabilities(run: RunRead) -> dict[int, dict[str, Any]]:
    """reliability.json by round, the bins that have pairs."""
    found = {}
    for s in run.of("evaluation"):
        body = read_json(s.folder / RELIABILITY, run.missing, "no reliability diagram") if s.round else {}
        bins = rows_of(body.get("bins"), ("pairs", "confidence", "accuracy"))
        if body and bins is None:
            run.missing.append(f"{RELIABILITY} of {s.name} has no bins of ours: no reliability diagram.")
        elif bins and s.round:
            found[s.round] = body | {"bins": bins, "ece": number(body.get("ece"))}
    return found


def rows_of(value: Any, names: Sequence[str]) -> list[dict[str, Any]] | None:
    """The objects of a list; a figure of `names` that is no finite number is None. None where it is no list of objects."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        return None
    return [one | {name: number(one.get(name)) for name in names} for one in value]


def drifts(run: RunRead) -> dict[int, dict[str, float | None]]:
    """Of every refit, the drift from the reward model before it."""
    found, before = {}, None
    for n, members in sorted(run.fitted.items()):
        now = _mean_scores(run, members)
        if before is not None and now is not None and before.shape == now.shape:
            found[n] = drift(before, now)
        before = now
    return found


def weights(run: RunRead) -> dict[int, dict[str, Any]]:
    """{"ess_fraction", "by_length"} by round: of weight_health.json, or else of what the update's report.json says of its weights."""
    found = {}
    for n, s in _updates(run):
        for name in ("report.json", "weight_health.json"):
            body = read_json(s.folder / name, run.missing, f"round {n} has none to show")
            if "ess_fraction" not in body and name == "report.json":
                continue
            rows = rows_of(body.get("by_length", []), ("from", "to", "ess_fraction"))
            if body and (rows is None or number(body.get("ess_fraction")) is None):
                run.missing.append(f"{name} of {s.name} is of a wrong form: what it lacks is not shown.")
            if body:
                whole = [row for row in rows or [] if None not in (row["from"], row["to"], row["ess_fraction"])]
                found[n] = {"ess_fraction": number(body.get("ess_fraction")), "by_length": whole}
    return found


def filters(run: RunRead) -> dict[int, dict[str, Any]]:
    """filter_report.json by round, where it has the similarities of the chosen sides that figures are drawn of."""
    found = {}
    for n, s in _updates(run):
        body = read_json(s.folder / "filter_report.json", run.missing, f"round {n} has none to show")
        similarity = body.get("similarity")
        if similarity is None:
            continue
        if _is_similarity(similarity):
            found[n] = body
        else:
            run.missing.append(f"filter_report.json of {s.name}: similarity is of a wrong form, and is not shown.")
    return found


def _updates(run: RunRead) -> list[tuple[int, StageRead]]:
    return [(s.round or 0, s) for s in run.of("update")]


def _is_similarity(value: Any) -> bool:
    chosen = value.get("chosen") if isinstance(value, dict) else None
    if not isinstance(chosen, dict) or any(number(chosen.get(name)) is None for name in ("mean_kept", "mean_at_random")):
        return False
    edges, counts = value.get("bin_edges"), chosen.get("histogram_kept")
    if not isinstance(edges, list) or not isinstance(counts, list) or len(edges) != len(counts) + 1:
        return False
    return all(number(x) is not None for x in (*edges, *counts))


def budgets(run: RunRead) -> list[dict[str, Any]]:
    """KL by round: to π_SFT (of the evaluation), to the penalty's reference (of the last rollout), and what the penalty has let pass."""
    references = _policies_named(run, "reference")
    rows = []
    for row in run.rounds[1:]:
        penalty = last_value(run.log, row["round"], "rollout/kl")  # always k1; kl/penalty follows kl_estimator
        rows.append({"round": row["round"], "kl_sft": row.get("kl_sft"), "reference": references.get(row["round"]), "penalty": penalty})
    return [row | spent for row, spent in zip(rows, kl_budget(rows), strict=True)]


def last_value(log: Sequence[dict[str, Any]], round: int, name: str) -> float | None:
    """Of a policy's last line that has it; None where that is no finite number: a diverged run has no KL."""
    values = [line[name] for line in log if line.get("stage") == "policy" and line.get("round") == round and name in line]
    return number(values[-1]) if values else None


def training(run: RunRead, names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """(updates so far, value) of metrics of the policies' training, thinned to what a page can show."""
    lines = [line for line in run.log if line.get("stage") == "policy"]
    offsets, total = {}, 0
    for n in sorted({line.get("round") or 0 for line in lines}):
        offsets[n] = total
        total += max(line.get("step") or 0 for line in lines if (line.get("round") or 0) == n)
    series = {}
    for name in names:
        logged = [(offsets[line.get("round") or 0] + (line.get("step") or 0), number(line.get(name))) for line in lines]
        points = [(x, y) for x, y in logged if y is not None]
        if points:
            series[name] = points[:: max(1, math.ceil(len(points) / CURVES_KEPT))]
    return series


def lineage_lines(run: RunRead) -> list[dict[str, Any]]:
    """One row a model: what it started from, what it was fitted on, whom it is for; from lineage.json where there is one."""
    names = {s.hash: s.name for s in run.stages}
    rows = []
    for s in run.stages:
        if s.record.get("kind") != "model":
            continue
        facts = read_json(s.folder / "lineage.json", run.missing, f"lineage of {s.name} is not shown")
        rows.append(
            {
                "stage": s.name,
                "hash": s.hash[:8],
                "from": ", ".join(f"{key}: {names.get(h, h[:8])}" for key, h in s.inputs.items()),
                "on": _data_of(facts),
                "seconds": s.seconds,
                "finished": s.record.get("finished") or "",
            }
        )
    return rows


def _data_of(facts: dict[str, Any]) -> str:
    data = facts.get("data")
    if not isinstance(data, dict):
        return str(facts.get("update") or "")
    weights = data.get("weights")
    ess = number(weights.get("ess")) if isinstance(weights, dict) else None
    effective = "" if ess is None else f", ESS {ess:.0f}"
    return f"{data.get('pairs')} pairs ({data.get('update') or 'all, weights 1'}{effective})"
