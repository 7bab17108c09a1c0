"""Win rates of two lists of scores for the same prompts."""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from jaxrlhf.evaluation.intervals import Interval, Z, chance_beyond, equal_bins, mean_interval, proportion, wilson_interval

RIDGE = 0.01  # of `length_controlled`


class WinRate(NamedTuple):
    """Share of strict wins with its 95 % Wilson interval; `tie_rate` stands beside it (the papers count a tie as no win)."""

    win_rate: float
    win_rate_low: float
    win_rate_high: float
    tie_rate: float
    n: int


def win_rate(scores_N: np.ndarray, reference_N: np.ndarray) -> WinRate:
    """How often a score is strictly above its reference's."""
    scores, reference = np.asarray(scores_N), np.asarray(reference_N)
    if scores.shape != reference.shape or scores.ndim != 1:
        raise ValueError(f"win_rate compares two lists of equal length, not shapes {scores.shape} and {reference.shape}.")
    if not (np.isfinite(scores).all() and np.isfinite(reference).all()):
        raise ValueError("win_rate was given a score that is not finite; look at the scorer's output first.")
    n, wins, ties = len(scores), int((scores > reference).sum()), int((scores == reference).sum())
    low, high = wilson_interval(wins, n)
    return WinRate(wins / n if n else 0.0, low, high, ties / n if n else 0.0, n)


class Difference(NamedTuple):
    """A paired difference over n prompts, its 95 % interval, and the `p` of the t-test; no ends where no difference varies."""

    difference: float
    low: float
    high: float
    p: float
    n: int


class LengthControlled(NamedTuple):
    """The score at equal lengths, its 95 % interval, and the log-odds that one standard deviation of length is worth."""

    score: float
    low: float
    high: float
    length_effect: float
    n: int


class LengthBin(NamedTuple):
    """Rows whose response is between `low` and `high` longer than the other one, and what they won."""

    low: float
    high: float
    n: int
    mean_difference: float
    score: float
    win_rate: float


def outcomes(scores_N: np.ndarray, other_N: np.ndarray) -> np.ndarray:
    """1 for a win, ½ for a tie, 0 for a loss; float64 [N]. Raises ValueError as `win_rate` does."""
    scores, other = np.asarray(scores_N), np.asarray(other_N)
    win_rate(scores, other)
    return (scores > other) + 0.5 * (scores == other)


def rate_of(outcomes_N: np.ndarray) -> WinRate:
    """The win rate of outcomes in {1, ½, 0}."""
    won = _checked(outcomes_N)
    return win_rate(won, np.full(len(won), 0.5))


def score(outcomes_N: np.ndarray) -> Interval:
    """(wins + ½ ties) / n, with Wilson's interval; nan where n is 0."""
    won = _checked(outcomes_N)
    return proportion(float(won.sum()), len(won))


def paired_difference(values_N: np.ndarray, other_N: np.ndarray) -> Difference:
    """Mean of `values` − `other`, two methods on the same prompts, by Student's paired t-test. Student (1908)."""
    values, other = np.asarray(values_N, np.float64), np.asarray(other_N, np.float64)
    if values.shape != other.shape or values.ndim != 1:
        raise ValueError(f"a paired difference needs two lists of equal length, not shapes {values.shape} and {other.shape}.")
    found = mean_interval(values - other)
    if math.isnan(found.low):
        agreed = 2.0 ** (1 - found.n) if found.value else 1.0  # all n differences are the same: the sign test
        return Difference(found.value, found.low, found.high, min(1.0, agreed), found.n)
    t = found.value / (values - other).std(ddof=1) * math.sqrt(found.n)
    return Difference(found.value, found.low, found.high, chance_beyond(found.n, abs(t)), found.n)


def length_controlled(outcomes_N: np.ndarray, difference_N: np.ndarray) -> LengthControlled | None:
    """What the score would be if both responses were equally long; None where the lengths say nothing about it.

        P(win_i) = σ(θ + φ · d_i / sd(d))        score at d = 0: σ(θ̂)

    a logistic regression of the outcomes (a tie is half a win and half a loss) on the difference in length d, scaled by its standard
    deviation and not centred, so that 0 stays "equally long". The idea is AlpacaEval's length-controlled win rate, Dubois et al. (2024),
    §4, whose model also has a term for the instruction and squashes the difference by tanh; neither is here.
    RIDGE · (θ² + φ²) / 2 is added to the negative log-likelihood: it keeps θ and φ finite where all is won or length decides everything,
    and moves nothing visible elsewhere. The interval is σ(θ̂ ± Z · se), se from the curvature at the optimum: a tie is taken to vary as
    a win does, so with many ties it is too wide rather than too narrow, and it is wide where length decides everything.
    Where all responses are longer, or all are shorter, equal lengths lie outside the data: None, for a fit says nothing there.
    """
    won, difference = _checked(outcomes_N), np.asarray(difference_N, np.float64)
    if won.shape != difference.shape:
        raise ValueError(f"{len(won)} outcomes but lengths of shape {difference.shape}; give one difference an outcome.")
    spread = difference.std() if len(won) else 0.0
    if not len(won) or difference.min() > 0 or difference.max() < 0:
        return None
    design = np.stack([np.ones(len(won)), difference / (spread or 1.0)], axis=1)
    weights, curvature = _logistic(design, won)
    error = math.sqrt(np.linalg.inv(curvature)[0, 0])
    ends = expit(weights[0] + Z * error * np.array((0, -1, 1))).tolist()
    return LengthControlled(ends[0], ends[1], ends[2], float(weights[1]), len(won))


def _logistic(design_NK: np.ndarray, target_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(weights [K], curvature [K, K]) of the penalised logistic regression."""
    from scipy.optimize import minimize  # here: most of what reads win rates fits nothing

    def loss(weights_K: np.ndarray) -> float:
        logits = design_NK @ weights_K
        return float((np.logaddexp(0, logits) - target_N * logits).sum() + RIDGE / 2 * (weights_K**2).sum())

    def gradient(weights_K: np.ndarray) -> np.ndarray:
        return design_NK.T @ (expit(design_NK @ weights_K) - target_N) + RIDGE * weights_K

    def curvature(weights_K: np.ndarray) -> np.ndarray:
        p = expit(design_NK @ weights_K)
        return design_NK.T @ (design_NK * (p * (1 - p))[:, None]) + RIDGE * np.eye(len(weights_K))

    found = minimize(loss, np.zeros(design_NK.shape[1]), jac=gradient, hess=curvature, method="trust-exact", options={"gtol": 1e-9})
    return found.x, curvature(found.x)


def by_length(outcomes_N: np.ndarray, difference_N: np.ndarray, *, bins: int = 5) -> list[LengthBin]:
    """Score and win rate in at most `bins` groups of equally many rows, from much shorter to much longer than the other response.

    Rows of equal difference are never parted, so there are fewer groups where many are equal.
    """
    won, difference = _checked(outcomes_N), np.asarray(difference_N, np.float64)
    if won.shape != difference.shape:
        raise ValueError(f"{len(won)} outcomes but lengths of shape {difference.shape}; give one difference an outcome.")
    if not len(won):
        return []
    found = []
    for rows in equal_bins(difference, bins):
        d, w = difference[rows], won[rows]
        found.append(LengthBin(float(d.min()), float(d.max()), len(rows), float(d.mean()), float(w.mean()), float((w == 1).mean())))
    return found


def _checked(outcomes_N: np.ndarray) -> np.ndarray:
    won = np.asarray(outcomes_N, np.float64)
    if won.ndim != 1 or not np.isin(won, (0.0, 0.5, 1.0)).all():
        raise ValueError("an outcome is 1 (won), 0.5 (tied) or 0 (lost), in a list.")
    return won
