"""What a run's folder says of its reward models and policies: curves, reliability, drift, KL budget, training, lineage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrlhf.evaluation.curves import Curve, curve_of
from jaxrlhf.evaluation.diagnostics import RELIABILITY, VALID_SCORES, drift, kl_budget
from jaxrlhf.evaluation.report_runs import RunRead, StageRead, finite, read_json, sample_columns

CURVES_KEPT = 400  # points of a training curve at most: a page has no more pixels


def curve(run: RunRead) -> Curve:
    """Gold and proxy by round, with the scales that make proxies comparable where the run kept them."""
    by_hash = {s.hash: s.round or 0 for s in run.policies} | {s.hash: 0 for s in run.of("sft")}
    starts = {s.round or 0: by_hash[s.inputs["start"]] for s in run.policies if s.inputs.get("start") in by_hash}
    fitted = set(run.fitted) or {row["round"] for row in run.rounds if row["round"] == 1 or row.get("refit")}
    scales = {}
    for number, members in run.fitted.items():
        scores = [x for s in members if (x := valid_scores(s)) is not None]
        if scores and len(scores) == len(members) and np.std(mean := np.mean(scores, axis=0)) > 0:
            scales[number] = float(np.std(mean))
    return curve_of(run.rounds, starts=starts, fitted=fitted, scales=scales, gold_scale=_gold_scale(run))


def _gold_scale(run: RunRead) -> float | None:
    first = next(iter(run.of("evaluation")), None)
    columns = sample_columns(first.folder) if first and first.round is None else {}
    gold = [x for name in ("gold_1", "gold_2") for x in columns.get(name) or [] if x is not None]
    return float(np.std(gold)) or None if gold else None


def valid_scores(stage: StageRead) -> np.ndarray | None:
    """A reward model's scores of the held-out pairs, float [2, M]; None for folders from before they were kept."""
    try:
        scores = np.load(stage.folder / VALID_SCORES, allow_pickle=False)
    except (OSError, ValueError):
        return None
    return scores if scores.ndim == 2 and len(scores) == 2 and scores.shape[1] and np.isfinite(scores).all() else None


def reliabilities(run: RunRead) -> dict[int, dict[str, Any]]:
    """reliability.json by round."""
    found = {s.round: read_json(s.folder / RELIABILITY, run.missing, "no reliability diagram") for s in run.of("evaluation") if s.round}
    return {number: body for number, body in found.items() if body.get("bins") and body.get("pairs")}


def drifts(run: RunRead) -> dict[int, dict[str, float | None]]:
    """Of every refit, the drift from the reward model before it."""
    found, before = {}, None
    for number, members in sorted(run.fitted.items()):
        scores = [valid_scores(s) for s in members]
        known = [x for x in scores if x is not None]
        now = np.mean(known, axis=0) if known and len(known) == len(scores) else None
        if before is not None and now is not None and before.shape == now.shape:
            found[number] = drift(before, now)
        before = now
    return found


def stage_reports(run: RunRead, name: str) -> dict[int, dict[str, Any]]:
    """`name` (weight_health.json, filter_report.json, report.json) of every reward update, by round."""
    found = {s.round or 0: read_json(s.folder / name, run.missing, f"round {s.round} has none to show") for s in run.of("update")}
    return {number: body for number, body in found.items() if body}


def budgets(run: RunRead) -> list[dict[str, Any]]:
    """KL by round: to π_SFT (of the evaluation and of the last training batch), of the penalty, and what the penalty has let pass."""
    sft = {s.hash for s in run.of("sft")}
    policies = {s.round: s for s in run.policies}
    rows = []
    for row in run.rounds[1:]:
        stage = policies.get(row["round"])
        penalty = last_value(run.log, row["round"], "kl/penalty")
        from_sft = stage is None or stage.inputs.get("reference") in sft
        rows.append({"round": row["round"], "kl_sft": row.get("kl_sft"), "from_sft": from_sft, "penalty": penalty})
        rows[-1]["kl_sft_training"] = last_value(run.log, row["round"], "kl/sft") if not from_sft else penalty
    return [row | spent for row, spent in zip(rows, kl_budget(rows), strict=True)]


def last_value(log: Sequence[dict[str, Any]], round: int, name: str) -> float | None:
    values = [line[name] for line in log if line.get("stage") == "policy" and line.get("round") == round and name in line]
    return finite(values[-1]) if values else None


def training(run: RunRead, names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """(updates so far, value) of metrics of the policies' training, thinned to what a page can show."""
    lines = [line for line in run.log if line.get("stage") == "policy"]
    offsets, total = {}, 0
    for number in sorted({line.get("round") or 0 for line in lines}):
        offsets[number] = total
        total += max(line.get("step") or 0 for line in lines if (line.get("round") or 0) == number)
    series = {}
    for name in names:
        points = [(offsets[line.get("round") or 0] + (line.get("step") or 0), line[name]) for line in lines if name in line]
        points = [(x, y) for x, y in points if isinstance(y, int | float) and math.isfinite(y)]
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
    ess = (data.get("weights") or {}).get("ess")
    effective = f", ESS {ess:.0f}" if isinstance(ess, int | float) else ""
    return f"{data.get('pairs')} pairs ({data.get('update') or 'all, weights 1'}{effective})"
