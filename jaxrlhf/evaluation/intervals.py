"""Intervals of means, proportions and differences, and the one rule by which a difference may be called one."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

Z = 1.959964  # the normal distribution's 95 %, as LEVEL is Student's
LEVEL = 0.975


class Interval(NamedTuple):
    """A figure of n observations with its 95 % interval; nan for ends that the data cannot tell: n below 2, or values that do not vary."""

    value: float
    low: float
    high: float
    n: int

    @property
    def direction(self) -> int:
        """1 or −1 where the whole interval lies above or below zero, else 0. Every sentence that says so, everywhere, asks this."""
        return int(self.low > 0) - int(self.high < 0)

    def scaled(self, factor: float) -> "Interval":
        return Interval(factor * self.value, factor * self.low, factor * self.high, self.n)

    def spelled(self, digits: int = 2) -> str:
        """+0.23 [0.20, 0.26], of a difference; with more digits where an end would look like 0, and which side it is on tells."""
        while digits < 6 and any(0 < abs(end) < 0.5 * 10**-digits for end in (self.low, self.high)):
            digits += 1
        return f"{self.value:+.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def wilson_interval(wins: float, n: int, *, z: float = Z) -> tuple[float, float]:
    """The Wilson score interval of a proportion; (0, 1) where nothing was seen. Wilson (1927).

    `wins` may count ties as halves: they vary less than wins and losses do, so the interval is then wider than need be, never narrower.
    """
    if n == 0:
        return 0.0, 1.0
    p, zz = wins / n, z * z
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    # The ends are exactly 0 and 1 where nothing or everything was won; rounding must not say otherwise.
    return (0.0 if wins == 0 else middle - half), (1.0 if wins == n else middle + half)


def proportion(wins: float, n: int) -> Interval:
    """`wins` of `n` with Wilson's interval; nan where n is 0."""
    return Interval(wins / n, *wilson_interval(wins, n), n) if n else Interval(math.nan, math.nan, math.nan, 0)


def correlation_interval(x_N: np.ndarray, y_N: np.ndarray) -> Interval | None:
    """Pearson's r with the interval of Fisher's transformation, tanh(artanh r ± z / √(n − 3)). Fisher (1921).

    None where it is undefined: fewer than 4 observations, values that are not finite or do not vary.
    """
    x, y = np.asarray(x_N, np.float64), np.asarray(y_N, np.float64)
    n = len(x)
    if n < 4 or not np.isfinite((x, y)).all() or not all(varies(float(one.std()), float(one.mean())) for one in (x, y)):
        return None
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    middle, half = math.atanh(math.copysign(min(abs(r), 1 - 1e-15), r)), Z / math.sqrt(n - 3)
    return Interval(r, math.tanh(middle - half), math.tanh(middle + half), n)


def mean_interval(values_N: np.ndarray) -> Interval:
    """The mean of one value an observation, with Student's t interval: mean ± t(n − 1) · s / √n. Student (1908).

    Raises ValueError for a value that is not finite.
    """
    values = np.asarray(values_N, np.float64)
    if not np.isfinite(values).all():
        raise ValueError("a mean was asked of a value that is not finite; look at the scorer's output first.")
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    if n < 2 or not varies(float(values.std()), mean):
        return Interval(mean, math.nan, math.nan, n)
    half = float(stdtrit(n - 1, LEVEL) * values.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def varies(spread: float, mean: float) -> bool:
    """Whether values of this spread differ by more than rounding: where they do not, nothing tells how far off they are."""
    return spread > 1e-9 * abs(mean)


def equal_bins(values_N: np.ndarray, bins: int) -> list[np.ndarray]:
    """Row numbers by bin, the smallest values first: about equally many in each, equal values always together, no bin empty."""
    edges = np.unique(np.quantile(values_N, np.linspace(0, 1, bins + 1)[1:-1], method="lower"))
    of = np.searchsorted(edges, values_N, side="left")  # (edge before, edge]
    return [np.flatnonzero(of == number) for number in np.unique(of)]


def unpaired_difference(after: Interval, before: Interval) -> Interval:
    """after − before of two independent figures, from their intervals: Newcombe (1998), method 10, where these are Wilson's.

    Of figures of the same prompts it is wider than a paired one would be. n is the smaller of the two.
    """
    value = after.value - before.value
    low = value - math.hypot(after.value - after.low, before.high - before.value)
    high = value + math.hypot(after.high - after.value, before.value - before.low)
    return Interval(value, low, high, min(after.n, before.n))


def chance_beyond(n: int, within: float = 2.0) -> float:
    """P(|t| > within), Student's t with n − 1 degrees of freedom: a mean of n ≥ 2 normal differences around 0 is so far off by chance."""
    return float(2 * stdtr(n - 1, -within))


def as_fields(name: str, found: Interval | None) -> dict[str, Any]:
    """{name, name_low, name_high, name_n}, as rows of JSON hold an interval; null for what is not known."""
    values = (None, None, None, None) if found is None else found
    keys = (name, f"{name}_low", f"{name}_high", f"{name}_n")
    return {key: None if value is None or math.isnan(value) else value for key, value in zip(keys, values, strict=True)}


def from_fields(row: Mapping[str, Any], name: str) -> Interval | None:
    """The interval of such a row, its ends nan where there are none (rows from before they were kept); None where it lacks the figure."""
    value, low, high, n = (row.get(key) for key in (name, f"{name}_low", f"{name}_high", f"{name}_n"))
    if value is None:
        return None
    return Interval(value, math.nan if low is None else low, math.nan if high is None else high, int(n or 0))
