"""Numbers that tell whether a reward model can still be trusted."""

from __future__ import annotations

import numpy as np


def pair_accuracy(chosen_N: np.ndarray, rejected_N: np.ndarray) -> float | None:
    """Share of pairs whose chosen side scores higher, a tie counting one half; None without pairs."""
    if len(chosen_N) == 0:
        return None
    chosen, rejected = np.asarray(chosen_N), np.asarray(rejected_N)
    return float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean())


def agreement_with_gold(scores_2N: tuple[np.ndarray, np.ndarray], gold_2N: tuple[np.ndarray, np.ndarray]) -> float | None:
    """Accuracy of scores on pairs of responses that gold labels; pairs that gold ties are left out."""
    (a, b), (gold_a, gold_b) = scores_2N, gold_2N
    first = gold_a > gold_b
    keep = gold_a != gold_b
    return pair_accuracy(np.where(first, a, b)[keep], np.where(first, b, a)[keep])
