"""Gold and proxy against the distance from π_SFT (Gao et al. 2023): the peak of gold, and how far the proxy has run away from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.evaluation.intervals import Interval, varies


@dataclass(frozen=True)
class Point:
    """The end of a round (0: π_SFT). KL in nats a response, proxies in nats of preference, each under the round's own reward model.

    `start` is the round whose policy this one started from; `refit` whether its reward model is a new one. `proxy_scale` is the standard
    deviation of that reward model's scores on the run's held-out pairs: a fixed set, so rounds are comparable in it.
    """

    round: int
    kl: float | None
    gold: float | None
    proxy_start: float | None = None
    proxy: float | None = None
    proxy_scale: float | None = None
    start: int = 0
    refit: bool = False

    @property
    def root_kl(self) -> float | None:
        """√KL; a k1 estimate just under 0 is 0."""
        return None if self.kl is None else math.sqrt(max(self.kl, 0.0))


@dataclass(frozen=True)
class Curve:
    """The points of one run in order, and what they say. `gold_scale`: deviation of gold over π_SFT's responses."""

    points: tuple[Point, ...]
    gold_scale: float | None = None

    @property
    def gold_gain(self) -> list[float | None]:
        """Gold above π_SFT's, in `gold_scale`."""
        first = self.points[0].gold if self.points else None
        if first is None or not self.gold_scale:
            return [None] * len(self.points)
        return [None if p.gold is None else (p.gold - first) / self.gold_scale for p in self.points]

    @property
    def proxy_gain(self) -> list[float | None]:
        """What the reward models believed was gained since π_SFT, in deviations of each one's scores on the held-out pairs.

            gain_r = gain_start(r) + (proxy_r − proxy_start_r) / scale_r

        A proxy's value means nothing under another reward model; what its own saw change in a round does. Where the reward model is
        kept, the sum is just proxy_r − proxy_start_1.
        """
        gains: dict[int, float | None] = {}
        for p in self.points:
            before = 0.0 if p.start == 0 or p.round == 0 else gains.get(p.start)
            if p.round == 0:
                gains[0] = 0.0
            elif p.proxy is None or p.proxy_start is None or not p.proxy_scale or before is None:
                gains[p.round] = None
            else:
                gains[p.round] = before + (p.proxy - p.proxy_start) / p.proxy_scale
        return [gains[p.round] for p in self.points]

    @property
    def peak(self) -> Point | None:
        """Where gold is highest, the earliest of equals; π_SFT counts: a run may only have lost."""
        known = [p for p in self.points if p.gold is not None]
        return max(known, key=lambda p: (p.gold, -p.round)) if known else None

    @property
    def lost(self) -> float | None:
        """Gold at the peak less gold at the end, ≥ 0."""
        known = [p.gold for p in self.points if p.gold is not None]
        return max(known) - known[-1] if known else None

    @property
    def gap(self) -> float | None:
        """Proxy gain less gold gain at the end, in deviations: 0 where gold rose as much as the reward models said."""
        proxy, gold = (gains[-1] if gains else None for gains in (self.proxy_gain, self.gold_gain))
        return None if proxy is None or gold is None or len(self.points) < 2 else proxy - gold


NO_ERROR = "Without ±: one seed, or seeds that are all alike, which does not make the figure exact."


class Estimate(NamedTuple):
    """Mean over n seeds, its standard error (None for one seed) and the least of them."""

    n: int
    mean: float
    se: float | None
    least: float

    @property
    def error(self) -> float | None:
        """`se` where it says something: of seeds that do not vary it is 0, and their mean is not exact."""
        return self.se if self.se is not None and varies(self.se, self.mean) else None

    @property
    def interval(self) -> Interval:
        """± two standard errors, within which nothing is called a difference; no ends of one seed, or where seeds do not vary."""
        reach = math.nan if self.error is None else 2 * self.error
        return Interval(self.mean, self.mean - reach, self.mean + reach, self.n)

    def spelled(self, digits: int, *, sign: bool = False) -> str:
        """1.84 ± 0.05, one standard error; without ± where there is one seed, or none differs."""
        return f"{self.mean:{'+' if sign else ''},.{digits}f}" + ("" if self.error is None else f" ± {self.error:,.{digits}f}")


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Of one value a seed, those that are there: se = s/√n with the sample deviation s (n − 1). None where there is no value."""
    x = np.array([value for value in values if value is not None], np.float64)
    if not len(x):
        return None
    se = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
    return Estimate(len(x), float(x.mean()), se, float(x.min()))


def over_seeds(series: Sequence[Sequence[float | None]]) -> list[Estimate | None]:
    """Round by round over runs of one arm that have come equally far (`Arm.compared`); n is less where one lacks a round's figure."""
    return [estimate([one[i] for one in series if i < len(one)]) for i in range(max(map(len, series), default=0))]


def curve_of(
    rounds: Sequence[dict[str, Any]], *, starts: dict[int, int], fitted: set[int], scales: dict[int, float], gold_scale: float | None
) -> Curve:
    """The curve of a summary's rows.

    starts: round → the round whose policy it started from (default: the one before); fitted: rounds that fitted a reward model; scales:
    round → the deviation on held-out pairs of the reward model fitted in it, which holds until the next is fitted.
    """
    points, scale = [], None
    for row in rounds:
        number = row["round"]
        if number in fitted:
            scale = scales.get(number)
        points.append(
            Point(
                number, row.get("kl_sft"), row.get("gold"), row.get("proxy_start"), row.get("proxy"),
                scale, starts[number] if number in starts else max(number - 1, 0), number > 1 and number in fitted,
            )
        )  # fmt: skip
    return Curve(tuple(points), gold_scale)
