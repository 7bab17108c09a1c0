"""Win rates of two lists of scores for the same prompts."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class WinRate(NamedTuple):
    """Share of strict wins with its 95 % Wilson interval; `tie_rate` stands beside it (the papers count a tie as no win)."""

    win_rate: float
    win_rate_low: float
    win_rate_high: float
    tie_rate: float
    n: int


def wilson_interval(wins: int, n: int, *, z: float = 1.959964) -> tuple[float, float]:
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
