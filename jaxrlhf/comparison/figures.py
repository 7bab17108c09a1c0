"""Two lists of responses to the same prompts, side by side: what gold and a judge say of them, and what of it is length."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.comparison.judge import Judged
from jaxrlhf.evaluation.intervals import mean_interval
from jaxrlhf.evaluation.winrate import by_length, length_controlled, outcomes, paired_difference, rate_of, score
from jaxrlhf.scorers import Scorer

FIGURES, TABLE, ROWS = "comparison.json", "comparison.md", "comparison.jsonl"
MEASURES: dict[str, Callable[[str], int]] = {"characters": len, "words": lambda text: len(text.split())}


class Texts(NamedTuple):
    """One response of each side to each of N prompts; a reference is None where the data has none."""

    ids: list[str]
    prompts: list[str]
    a: list[str]
    b: list[str]
    references: list[str | None]


class Comparison(NamedTuple):
    """`figures` is what comparison.json holds, `rows` are the lines of comparison.jsonl, in the order of the prompts."""

    figures: dict[str, Any]
    rows: list[dict[str, Any]]


class GoldScores(NamedTuple):
    """Gold of both sides, float32 [N], and of the references, float32 [R], which are those of the prompts `rows`."""

    a: np.ndarray
    b: np.ndarray
    references: np.ndarray
    rows: list[int]


def gold_scores(texts: Texts, gold: Scorer) -> GoldScores:
    """What `gold` says of every response and reference."""
    rows = [i for i, reference in enumerate(texts.references) if reference is not None]
    references = [texts.prompts[i] for i in rows], [texts.references[i] or "" for i in rows]
    a, b, scores = score_once(gold, (texts.prompts, texts.a), (texts.prompts, texts.b), references)
    return GoldScores(a, b, scores, rows)


def score_once(scorer: Scorer, *sides: tuple[Sequence[str], Sequence[str]]) -> list[np.ndarray]:
    """Scores of several (prompts, responses). Each distinct pair of texts is scored once, so that no rounding tells equal texts apart."""
    distinct = dict.fromkeys(pair for prompts, responses in sides for pair in zip(prompts, responses, strict=True))
    if not distinct:
        return [np.zeros(0, np.float32) for _ in sides]
    scores = dict(zip(distinct, scorer([p for p, _ in distinct], [r for _, r in distinct]), strict=True))
    return [np.array([scores[pair] for pair in zip(*side, strict=True)], np.float32) for side in sides]


def compare(
    texts: Texts,
    names: tuple[str, str],
    *,
    gold: GoldScores | None = None,
    judged: Judged | None = None,
    measure: str = "characters",
    bins: int = 5,
) -> Comparison:
    """Every figure of a against b.

    `judged` are the verdicts on (a, b) in the order of the texts. `measure` is what a length counts, a key of MEASURES. Where there are
    references other than b, both sides are also measured against them, and the difference is a paired one. Intervals are 95 %.
    """
    if measure not in MEASURES:
        raise ValueError(f"length {measure!r} is none of {', '.join(MEASURES)}.")
    lengths = tuple(np.array([MEASURES[measure](text) for text in side], np.float64) for side in (texts.a, texts.b))
    difference = lengths[0] - lengths[1]
    rows = [
        {"id": i, "prompt": p, "a": x, "b": y, "reference": r, "length_a": int(m), "length_b": int(n)}
        for i, p, x, y, r, m, n in zip(*texts[:4], texts.references, *lengths, strict=True)
    ]
    sides = [{"name": name, "length": float(length.mean()) if len(length) else None} for name, length in zip(names, lengths, strict=True)]
    figures: dict[str, Any] = {"prompts": len(rows), "length_unit": measure, "a": sides[0], "b": sides[1], "gold": None, "judge": None}
    figures |= {"against_references": None, "agreement": None}
    if gold is not None:
        _gold(texts, gold, figures, rows, difference, bins)
    if judged is not None:
        _judge(judged, figures, rows, difference, bins)
    if gold is not None and judged is not None:
        figures["agreement"] = _agreement(rows)
    return Comparison(figures, rows)


def _gold(
    texts: Texts,
    gold: GoldScores,
    figures: dict[str, Any],
    rows: list[dict[str, Any]],
    difference: np.ndarray,
    bins: int,
) -> None:
    won = outcomes(gold.a, gold.b)
    figures["gold"] = figures_of(won, difference, bins=bins) | {"difference": _named(paired_difference(gold.a, gold.b))}
    for side, scores in (("a", gold.a), ("b", gold.b)):
        figures[side] |= {"gold": _named(mean_interval(scores))}
        for row, value in zip(rows, scores, strict=True):
            row[f"gold_{side}"] = float(value)
    for row, outcome in zip(rows, won, strict=True):
        row["gold_outcome"] = float(outcome)
    for i, value in zip(gold.rows, gold.references, strict=True):
        rows[i]["gold_reference"] = float(value)
    if gold.rows and any(texts.b[i] != texts.references[i] for i in gold.rows):
        against = [outcomes(side[gold.rows], gold.references) for side in (gold.a, gold.b)]
        figures["against_references"] = {
            "a": figures_of(against[0], None),
            "b": figures_of(against[1], None),
            "difference": _named(paired_difference(against[0], against[1])),
        }


def _judge(judged: Judged, figures: dict[str, Any], rows: list[dict[str, Any]], difference: np.ndarray, bins: int) -> None:
    for row, verdict in zip(rows, judged.verdicts, strict=True):
        row |= {"judge_outcome": verdict.outcome, "judge_orders": verdict.orders, "judge_answers": verdict.keys}
    kept = [i for i, verdict in enumerate(judged.verdicts) if verdict.outcome is not None]
    won = np.array([judged.verdicts[i].outcome for i in kept], np.float64)
    figures["judge"] = figures_of(won, difference[kept], bins=bins) | {"usage": judged.usage}


def figures_of(outcomes_N: np.ndarray, difference_N: np.ndarray | None, *, bins: int = 5) -> dict[str, Any]:
    """Win rate, tie rate, score and, with differences in length, what is left of the score without them; None throughout where n is 0."""
    won, n = rate_of(outcomes_N), len(outcomes_N)
    found: dict[str, Any] = {"n": n} | {name: getattr(won, name) if n else None for name in won._fields if name != "n"}
    whole = score(outcomes_N)
    found |= {"score": _number(whole.value), "score_low": _number(whole.low), "score_high": _number(whole.high)}
    if difference_N is not None:
        controlled = length_controlled(outcomes_N, difference_N)
        found["length_controlled"] = None if controlled is None else _named(controlled)
        found["by_length"] = [_named(one) for one in by_length(outcomes_N, difference_N, bins=bins)]
    return found


def _agreement(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often judge and gold prefer the same response, among the prompts on which neither ties."""
    decided = [row for row in rows if row["gold_outcome"] != 0.5 and row["judge_outcome"] not in (None, 0.5)]
    same = sum(row["gold_outcome"] == row["judge_outcome"] for row in decided)
    return {"n": len(decided), "rate": same / len(decided) if decided else None}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _named(one: Any) -> dict[str, Any]:
    """A named tuple of numbers as JSON has it."""
    return {name: int(value) if name == "n" else _number(value) for name, value in one._asdict().items()}
