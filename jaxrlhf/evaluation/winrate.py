"""Win rates of two lists of scores for the same prompts."""

import math
import zlib
from typing import NamedTuple

import numpy as np


class WinRate(NamedTuple):
    """Share of strict wins with its 95 % Wilson interval; `tie_rate` stands beside it (the papers count a tie as no win)."""

    win_rate: float
    win_rate_low: float
    win_rate_high: float
    tie_rate: float
    n: int


def wilson_interval(wins: float, n: int, *, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion; (0, 1) where nothing was seen. Wilson (1927)."""
    if n == 0:
        return 0.0, 1.0
    p, zz = wins / n, z * z
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    # The ends are exactly 0 and 1 where nothing or everything was won; rounding must not say otherwise.
    return (0.0 if wins == 0 else middle - half), (1.0 if wins == n else middle + half)


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


class Interval(NamedTuple):
    """A figure over n prompts with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int


class Difference(NamedTuple):
    """A paired difference over n prompts, its 95 % bootstrap interval, and `p`: twice the share of resamples on the other side of zero."""

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


def score(outcomes_N: np.ndarray, *, seed: int = 0, resamples: int = 10_000) -> Interval:
    """(wins + ½ ties) / n, with the percentile interval of a bootstrap over prompts. Efron (1979); nan where n is 0."""
    return mean_interval(_checked(outcomes_N), seed=seed, resamples=resamples)


def mean_interval(values_N: np.ndarray, *, seed: int = 0, resamples: int = 10_000) -> Interval:
    """The mean of one value a prompt, with the percentile interval of a bootstrap over prompts.

    Where all values are equal the interval has no width, as with every bootstrap: look at the Wilson interval of the win rate then.
    """
    values = np.asarray(values_N, np.float64)
    if not len(values):
        return Interval(math.nan, math.nan, math.nan, 0)
    means = bootstrap_means(values, seed=seed, resamples=resamples)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def paired_difference(values_N: np.ndarray, other_N: np.ndarray, *, seed: int = 0, resamples: int = 10_000) -> Difference:
    """Mean of `values` − `other`, two methods on the same prompts, by a bootstrap over prompts that keeps the pairs together.

    `p` is min(1, 2 · min(share of resamples ≤ 0, share ≥ 0)), with one resample added to either count, so that it is never 0. It reads
    like a two-sided p-value; it inverts the percentile interval and is no exact test. Efron and Tibshirani (1993), §13 and §15.
    """
    values, other = np.asarray(values_N, np.float64), np.asarray(other_N, np.float64)
    if values.shape != other.shape or values.ndim != 1:
        raise ValueError(f"a paired difference needs two lists of equal length, not shapes {values.shape} and {other.shape}.")
    if not len(values):
        return Difference(math.nan, math.nan, math.nan, 1.0, 0)
    means = bootstrap_means(values - other, seed=seed, resamples=resamples)
    below, above = ((means <= 0).sum() + 1) / (resamples + 1), ((means >= 0).sum() + 1) / (resamples + 1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float((values - other).mean()), float(low), float(high), float(min(1.0, 2 * min(below, above))), len(values))


def bootstrap_means(values_N: np.ndarray, *, seed: int, resamples: int) -> np.ndarray:
    """Means of `resamples` draws of N values with replacement; float64 [resamples].

    Equal values are drawn together, by multinomial counts: the same distribution, and a thousand times less work for wins and ties.
    """
    if not np.isfinite(values_N).all():
        raise ValueError("a bootstrap was given a value that is not finite; look at the scorer's output first.")
    values, counts = np.unique(values_N, return_counts=True)
    n = len(values_N)
    random = np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(b"evaluation/bootstrap")]))
    if len(values) == 1:
        return np.full(resamples, values[0])
    if len(values) <= 16:
        return random.multinomial(n, counts / n, resamples) @ values / n
    rows = max(1, 2_000_000 // n)  # so many resamples at a time: memory
    parts = [values_N[random.integers(0, n, (min(rows, resamples - at), n))].mean(axis=1) for at in range(0, resamples, rows)]
    return np.concatenate(parts)


def length_controlled(
    outcomes_N: np.ndarray, difference_N: np.ndarray, *, ridge: float = 0.01, z: float = 1.959964
) -> LengthControlled | None:
    """What the score would be if both responses were equally long; None where the lengths say nothing about it.

        P(win_i) = σ(θ + φ · d_i / sd(d))        score at d = 0: σ(θ̂)

    a logistic regression of the outcomes (a tie is half a win and half a loss) on the difference in length d, scaled by its standard
    deviation and not centred, so that 0 stays "equally long". The idea is AlpacaEval's length-controlled win rate, Dubois et al. (2024),
    §4, whose model also has a term for the instruction and squashes the difference by tanh; neither is here.
    `ridge` · (θ² + φ²) / 2 is added to the negative log-likelihood: it keeps θ and φ finite where all is won or length decides everything,
    and moves nothing visible elsewhere. The interval is σ(θ̂ ± z · se), se from the curvature at the optimum: a tie is taken to vary as
    a win does, so with many ties it is too wide rather than too narrow, and it is wide where length decides everything.
    Every difference the same and not 0: equal lengths were never seen, None.
    """
    won, difference = _checked(outcomes_N), np.asarray(difference_N, np.float64)
    if won.shape != difference.shape:
        raise ValueError(f"{len(won)} outcomes but lengths of shape {difference.shape}; give one difference an outcome.")
    spread = difference.std() if len(won) else 0.0
    if not len(won) or (spread == 0 and difference[0] != 0):
        return None
    design = np.stack([np.ones(len(won)), difference / (spread or 1.0)], axis=1)
    weights, curvature = _logistic(design, won, ridge)
    error = math.sqrt(np.linalg.inv(curvature)[0, 0])
    ends = (_sigmoid(np.array([weights[0] + sign * z * error for sign in (0, -1, 1)]))).tolist()
    return LengthControlled(ends[0], ends[1], ends[2], float(weights[1]), len(won))


def _logistic(design_NK: np.ndarray, target_N: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """(weights [K], curvature [K, K]) of the penalised logistic regression: Newton's method, its steps halved until the loss falls."""
    weights = np.zeros(design_NK.shape[1])
    loss = _logistic_loss(weights, design_NK, target_N, ridge)
    for _ in range(100):
        p = _sigmoid(design_NK @ weights)
        gradient = design_NK.T @ (p - target_N) + ridge * weights
        step = np.linalg.solve(_curvature(design_NK, p, ridge), gradient)
        while (lower := _logistic_loss(weights - step, design_NK, target_N, ridge)) > loss + 1e-9 * abs(loss):
            step = step / 2
        weights, loss = weights - step, lower
        if np.abs(step).max() < 1e-10:
            break
    return weights, _curvature(design_NK, _sigmoid(design_NK @ weights), ridge)


def _logistic_loss(weights_K: np.ndarray, design_NK: np.ndarray, target_N: np.ndarray, ridge: float) -> float:
    logits = design_NK @ weights_K
    return float((np.logaddexp(0, logits) - target_N * logits).sum() + ridge / 2 * (weights_K**2).sum())


def _curvature(design_NK: np.ndarray, p_N: np.ndarray, ridge: float) -> np.ndarray:
    return design_NK.T @ (design_NK * (p_N * (1 - p_N))[:, None]) + ridge * np.eye(design_NK.shape[1])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def by_length(outcomes_N: np.ndarray, difference_N: np.ndarray, *, bins: int = 5) -> list[LengthBin]:
    """Score and win rate in at most `bins` groups of equally many rows, from much shorter to much longer than the other response.

    Rows of equal difference are never parted, so there are fewer groups where many are equal.
    """
    won, difference = _checked(outcomes_N), np.asarray(difference_N, np.float64)
    if won.shape != difference.shape:
        raise ValueError(f"{len(won)} outcomes but lengths of shape {difference.shape}; give one difference an outcome.")
    if not len(won):
        return []
    inner = np.unique(np.quantile(difference, np.arange(1, bins) / bins, method="lower"))
    group = np.searchsorted(inner, difference, side="left")  # an edge belongs to the group below it
    found = []
    for number in np.unique(group):
        rows = group == number
        d, w = difference[rows], won[rows]
        found.append(LengthBin(float(d.min()), float(d.max()), int(rows.sum()), float(d.mean()), float(w.mean()), float((w == 1).mean())))
    return found


def _checked(outcomes_N: np.ndarray) -> np.ndarray:
    won = np.asarray(outcomes_N, np.float64)
    if won.ndim != 1 or not np.isin(won, (0.0, 0.5, 1.0)).all():
        raise ValueError("an outcome is 1 (won), 0.5 (tied) or 0 (lost), in a list.")
    return won
