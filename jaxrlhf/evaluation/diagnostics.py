"""Numbers that tell whether a reward model can still be trusted."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.evaluation.intervals import Interval, as_fields, proportion
from jaxrlhf.files import write_whole

RELIABILITY = "reliability.json"  # in the folder of a round's evaluation
VALID_SCORES = "valid_scores.npy"  # in a reward model's folder: float32 [2, M], held-out pairs, chosen and rejected, bias taken off
BINS = 10  # of the reliability diagram


def pair_accuracy(chosen_N: np.ndarray, rejected_N: np.ndarray) -> float | None:
    """Share of pairs whose chosen side scores higher, a tie counting one half; None without pairs."""
    if len(chosen_N) == 0:
        return None
    chosen, rejected = np.asarray(chosen_N), np.asarray(rejected_N)
    return float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean())


def accuracy_interval(accuracy: float | None, gold_2N: tuple[np.ndarray, np.ndarray]) -> Interval | None:
    """Wilson's, of `agreement_with_gold` over the pairs that gold does not tie."""
    n = int((gold_2N[0] != gold_2N[1]).sum())
    return None if accuracy is None else proportion(accuracy * n, n)


def agreement_with_gold(scores_2N: tuple[np.ndarray, np.ndarray], gold_2N: tuple[np.ndarray, np.ndarray]) -> float | None:
    """Accuracy of scores on pairs of responses that gold labels; pairs that gold ties are left out."""
    (a, b), (gold_a, gold_b) = scores_2N, gold_2N
    first = gold_a > gold_b
    keep = gold_a != gold_b
    return pair_accuracy(np.where(first, a, b)[keep], np.where(first, b, a)[keep])


def reliability(scores_2N: tuple[np.ndarray, np.ndarray], gold_2N: tuple[np.ndarray, np.ndarray], *, bins: int = BINS) -> dict[str, Any]:
    """How often a reward model is right where it says it is so sure: the reliability of Bradley–Terry's P = σ(|r₁ − r₂|).

    Of each pair of responses the side that scores higher is predicted with confidence P in [½, 1] and is right where gold agrees; equal
    scores are half right, pairs that gold ties are left out. Folding at ½ makes the figure the same whichever response comes first.
    {"pairs", "ece", "accuracy", "confidence", "bins": [{"low", "high", "pairs", "confidence", "accuracy"}, …]}, where
    ece = Σ_b n_b / N · |accuracy_b − confidence_b| (Guo et al. 2017, eq. 3) over equally wide bins; null where there are no pairs.
    ece_low, ece_high, ece_n: its 95 % interval (`ece_interval`).
    """
    (a, b), (gold_a, gold_b) = [[np.asarray(x, np.float64) for x in side] for side in (scores_2N, gold_2N)]
    keep = gold_a != gold_b
    difference, first = (a - b)[keep], (gold_a > gold_b)[keep]
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    right = np.where(difference == 0, 0.5, (difference > 0) == first)
    edges = np.linspace(0.5, 1, bins + 1)
    index = np.clip(np.digitize(confidence, edges) - 1, 0, bins - 1)
    rows = [{"low": float(edges[i]), "high": float(edges[i + 1]), **_bin(confidence[index == i], right[index == i])} for i in range(bins)]
    gaps = np.zeros((len(right), bins))
    gaps[np.arange(len(right)), index] = right - confidence
    return {**_bin(confidence, right), **as_fields("ece", ece_interval(gaps) if len(right) else None), "bins": rows}


def ece_interval(gaps_NB: np.ndarray, *, draws: int = 2000) -> Interval:
    """ECE of N pairs whose (right − confidence) stands in the column of their bin, with an interval of at least 95 %: ece ± q.

    |ece − truth| is at most Σ_b |gap_b − its truth|, the gaps being sums over N, and q is that sum's .95 quantile where the
    gaps vary as a normal distribution of their covariance. A bootstrap's percentiles would be wrong: chance alone puts bins off the
    diagonal, so few pairs have too high an ECE, and resamples a higher.
    """
    n = len(gaps_NB)
    gaps_B = gaps_NB.sum(axis=0)
    covariance = gaps_NB.T @ gaps_NB - np.outer(gaps_B, gaps_B) / n
    errors = np.random.default_rng(0).multivariate_normal(np.zeros_like(gaps_B), covariance, draws, method="eigh")
    value, q = np.abs(gaps_B).sum() / n, np.quantile(np.abs(errors).sum(axis=1) / n, 0.95)
    return Interval(float(value), max(0.0, float(value - q)), min(1.0, float(value + q)), n)


def _bin(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    n = len(right)
    return {"pairs": n, "confidence": float(confidence.mean()) if n else None, "accuracy": float(right.mean()) if n else None}


def write_reliability(folder: Path, figures: dict[str, Any]) -> None:
    write_whole(folder / RELIABILITY, json.dumps(figures, indent=1, allow_nan=False) + "\n")


def drift(before_2M: np.ndarray, after_2M: np.ndarray) -> dict[str, float | None]:
    """How far a reward model has moved from the one before it, on the same held-out pairs; scores [2, M] of chosen and rejected.

    `agreement`: share of pairs on which both prefer the same side (a tie on either part counts one half); `correlation` of the 2M scores
    (Pearson); `scale`: standard deviation of the scores, after / before. No shift: the zero of a reward model means nothing.
    None where a figure is undefined (no pairs, scores that do not vary). Raises ValueError where the pairs are not the same number.
    """
    before, after = np.asarray(before_2M, np.float64), np.asarray(after_2M, np.float64)
    if before.shape != after.shape or before.ndim != 2 or len(before) != 2:
        raise ValueError(f"scores of shapes {before.shape} and {after.shape}: drift compares two [2, M] arrays of the same pairs.")
    if before.shape[1] == 0:
        return dict.fromkeys(("agreement", "correlation", "scale"))
    old, new = np.sign(before[0] - before[1]), np.sign(after[0] - after[1])
    agreement = np.where((old == 0) | (new == 0), 0.5, old == new).mean()
    spread, spread_after = before.std(), after.std()
    varies = spread > 0 and spread_after > 0
    return {
        "agreement": float(agreement),
        "correlation": float(np.corrcoef(before.ravel(), after.ravel())[0, 1]) if varies else None,
        "scale": float(spread_after / spread) if spread > 0 else None,
    }


def kl_budget(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, float | None]]:
    """KL spent up to the end of each round, nats a response: `penalty` of the round, and `spent` so far.

    Each round gives `round`, its number, `penalty`, its KL to the penalty's reference, and `reference`, the round whose policy that is
    (0: π_SFT; None: not known). A fixed reference makes the round's KL the whole distance already; a moving one makes it one more leg of
    a path that ends at the reference, and legs add up:

        spent_0 = 0,  spent_r = spent_reference(r) + penalty_r

    A round that keeps the reference of the one before contains its leg. The path is what the penalty allowed; the distance
    KL(π ‖ π_SFT) is another number, and may be larger. None where a figure on the path is.
    """
    spent: dict[int | None, float | None] = {0: 0.0}
    for one in rounds:
        before, penalty = spent.get(one["reference"]), one["penalty"]
        spent[one["round"]] = None if before is None or penalty is None else before + penalty
    return [{"penalty": one["penalty"], "spent": spent[one["round"]]} for one in rounds]
