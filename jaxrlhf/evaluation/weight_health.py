"""Can a reward model be fitted on these weights? Effective sample size, concentration, and which lengths of response carry the weight.

A log ratio of sequences is a sum over tokens, so weights spread with length: long pairs are where the largest and the smallest ones are
found, and a fit that looks healthy on the whole may rest on the short responses alone. Hence everything by length too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.evaluation.intervals import equal_bins
from jaxrlhf.evaluation.plotting import BLUE, VERMILION, style, svg_of
from jaxrlhf.files import write_whole

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
BINS = 5  # of length
DATA, FIGURE = "weight_health.json", "weight_health.svg"
GREY = "#666666"
POINTS = 400  # of a curve: more cannot be seen


def weight_health(weights_N: np.ndarray, lengths_N: np.ndarray, *, bins: int = BINS) -> dict[str, Any]:
    """What the weights of N pairs are like; plain JSON, every number finite (None where there is none).

    `lengths_N` is the mean length of a pair's two responses, tokens. Keys: `pairs`; `zeros`, pairs that count nothing; `ess` (pairs),
    `ess_fraction`; `mean`; `largest_share` max w / Σw; `quantiles` {"0": …, "0.5": …, "1": …}; `length_correlation` of log w with length
    (Pearson, over the pairs with w > 0; None where either is the same for all); `by_length`: at most `bins` bins between quantiles of
    length, shortest first, each {"from", "to" (tokens, both included), "pairs", "mean", "share" of Σw, "ess", "ess_fraction"}.
    ESS: (Σw)² / Σw², Kish (1965), 0 where all weights are 0. Raises ValueError for no pairs, weights that are not finite or below 0,
    and arrays of different shapes.
    """
    weights, lengths = np.asarray(weights_N, np.float64), np.asarray(lengths_N, np.float64)
    if weights.ndim != 1 or weights.shape != lengths.shape:
        raise ValueError(f"weights of shape {weights.shape} and lengths of shape {lengths.shape}; give one of each a pair.")
    if len(weights) == 0:
        raise ValueError("there are no pairs, so their weights cannot be judged.")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(f"weight {weights[~np.isfinite(weights) | (weights < 0)][0]} is not a finite number ≥ 0; look at eta and alpha.")
    quantiles = np.quantile(weights, QUANTILES)
    return {
        "pairs": len(weights),
        "zeros": int((weights == 0).sum()),
        "ess": ess(weights),
        "ess_fraction": ess(weights) / len(weights),
        "mean": float(weights.mean()),
        "largest_share": float(shares(weights).max()),
        "quantiles": {f"{q:g}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        "length_correlation": log_correlation(weights, lengths),
        "by_length": [_bin(weights, lengths, index) for index in equal_bins(lengths, bins)],
    }


def shares(weights_N: np.ndarray) -> np.ndarray:
    """w / Σw; zeros where all weights are 0."""
    scaled = weights_N / (weights_N.max() or 1.0)  # a sum of the largest floats would overflow
    return scaled / (scaled.sum() or 1.0)


def ess(weights_N: np.ndarray) -> float:
    """(Σw)² / Σw² = 1 / Σ share²."""
    squares = float(np.square(shares(weights_N)).sum())
    return 1.0 / squares if squares else 0.0


def log_correlation(weights_N: np.ndarray, lengths_N: np.ndarray) -> float | None:
    """Pearson's correlation of log w with length over the pairs that count; None where one of the two does not vary."""
    counts = weights_N > 0
    logs, lengths = np.log(weights_N[counts]), lengths_N[counts]
    if len(logs) < 2 or np.ptp(logs) == 0 or np.ptp(lengths) == 0:
        return None
    return float(np.clip(np.corrcoef(logs, lengths)[0, 1], -1, 1))


def _bin(weights: np.ndarray, lengths: np.ndarray, index: np.ndarray) -> dict[str, Any]:
    own = weights[index]
    return {
        "from": float(lengths[index].min()),
        "to": float(lengths[index].max()),
        "pairs": len(index),
        "mean": float(own.mean()),
        "share": float(shares(weights)[index].sum()),
        "ess": ess(own),
        "ess_fraction": ess(own) / len(own),
    }


def cumulative_share(weights_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x, y): the heaviest share x of the pairs carries the share y of Σw, from (0, 0) to (1, 1)."""
    heaviest = np.sort(shares(weights_N))[::-1]
    x, y = np.arange(len(heaviest) + 1) / len(heaviest), np.concatenate([[0.0], np.cumsum(heaviest)])
    kept = np.unique(np.linspace(0, len(heaviest), min(len(heaviest) + 1, POINTS)).astype(int))
    return x[kept], y[kept]


def write_weight_health(folder: Path, weights_N: np.ndarray, lengths_N: np.ndarray) -> dict[str, Any]:
    """Write weight_health.json and weight_health.svg into `folder`; the former's content."""
    health = weight_health(weights_N, lengths_N)
    write_whole(folder / DATA, json.dumps(health, indent=1, allow_nan=False) + "\n")
    write_whole(folder / FIGURE, draw(np.asarray(weights_N, np.float64), np.asarray(lengths_N, np.float64), health))
    return health


def draw(weights_N: np.ndarray, lengths_N: np.ndarray, health: dict[str, Any]) -> str:
    """SVG of two panels: how few pairs carry how much of the weight, and the weights by length of response."""
    from matplotlib.figure import Figure

    with style("weights", **{"font.size": 9}):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_shares(left, weights_N, health)
        _draw_lengths(right, weights_N, lengths_N)
        return svg_of(figure)


def _draw_shares(axes: Any, weights_N: np.ndarray, health: dict[str, Any]) -> None:
    x, y = cumulative_share(weights_N)
    axes.plot(100 * x, 100 * y, color=BLUE, linewidth=1.8, label="these weights")
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1, linestyle=":", label="equal weights")
    fraction = 100 * health["ess_fraction"]
    label = f"ESS {health['ess']:.4g} of {health['pairs']:,} ({fraction:.3g} %)"
    axes.axvline(fraction, color=VERMILION, linewidth=1.2, linestyle="--", label=label)
    axes.set(xlabel="pairs, heaviest first (% of all)", ylabel="their part of the total weight (%)", xlim=(0, 100), ylim=(0, 101))
    axes.legend(loc="lower right", facecolor="white", edgecolor="none", framealpha=0.9)


def _draw_lengths(axes: Any, weights_N: np.ndarray, lengths_N: np.ndarray) -> None:
    """Mean, median and middle 90 % of the weights in a bin, at the bin's mean length."""
    index = equal_bins(lengths_N, BINS)
    middle, mean = (np.array([values[i].mean() for i in index]) for values in (lengths_N, weights_N))
    low, median, high = (np.array([np.quantile(weights_N[i], q) for i in index]) for q in (0.05, 0.5, 0.95))
    bars = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.2}
    axes.errorbar(middle, median, yerr=(median - low, high - median), color=BLUE, label="median, 5–95 %", **bars)
    axes.plot(middle, mean, color=VERMILION, marker="s", markersize=4, linestyle="--", label="mean")
    if low.min() > 0 and high.max() > 10 * low.min():
        axes.set_yscale("log")
    axes.set(xlabel="mean length of a pair's responses (tokens)", ylabel="weight of a pair")
    axes.legend(facecolor="white", edgecolor="none", framealpha=0.9)
