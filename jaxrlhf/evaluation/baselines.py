"""What a reward model has to beat on held-out pairs: the longer response, and a bag of words."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrlhf.evaluation.diagnostics import pair_accuracy
from jaxrlhf.evaluation.intervals import proportion, wilson_interval

_WORD = re.compile(r"\w+|[^\w\s]")
Texts = Sequence[tuple[str, str]]  # (chosen, rejected) of every pair


def pair_baselines(train: Texts, valid: Texts, lengths_2M: Sequence[np.ndarray]) -> dict[str, dict[str, Any]]:
    """How often each is right on the held-out pairs: {"longer": {"accuracy", "low", "high", "pairs"}, "bag_of_words": …}.

    `lengths_2M`: tokens of the held-out responses, chosen and rejected. A tie is half right; the interval is Wilson's, at 95 %.
    """
    scores = bag_of_words(train, [text for pair in valid for text in pair])
    right = {"longer": pair_accuracy(*lengths_2M), "bag_of_words": pair_accuracy(scores[::2], scores[1::2])}
    ends = {name: wilson_interval((accuracy or 0.0) * len(valid), len(valid)) for name, accuracy in right.items()}
    return {name: {"accuracy": right[name], "low": low, "high": high, "pairs": len(valid)} for name, (low, high) in ends.items()}


def bag_of_words(train: Texts, texts: Sequence[str]) -> np.ndarray:
    """Scores of `texts` by a logistic regression on word counts, fitted to pairs as Bradley–Terry has it; float64 [N].

        min_w  Σ_i −log σ(w · (count(chosen_i) − count(rejected_i))) + ½ |w|²

    The penalty is scikit-learn's default (C = 1) and is not tuned. A word is a run of letters and digits, in lower case, or a mark.
    """
    from scipy.optimize import minimize  # here: a report reads figures and fits nothing

    words = {word: n for n, word in enumerate(sorted({word for pair in train for text in pair for word in _words(text)}))}
    sides = [_counts([pair[side] for pair in train], words) for side in (0, 1)]
    difference = sides[0] - sides[1]

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        gap = difference @ weights
        wrong = np.exp(-np.logaddexp(0, gap))  # σ(−gap)
        return np.logaddexp(0, -gap).sum() + weights @ weights / 2, weights - difference.T @ wrong

    weights = minimize(objective, np.zeros(len(words)), jac=True, method="L-BFGS-B").x
    return _counts(texts, words) @ weights


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _counts(texts: Sequence[str], words: Mapping[str, int]) -> Any:
    """How often each text has each of `words`: sparse [N, W]."""
    from scipy.sparse import csr_array

    known = [[words[word] for word in _words(text) if word in words] for text in texts]
    rows = np.repeat(np.arange(len(texts)), [len(found) for found in known])
    columns = np.fromiter((n for found in known for n in found), np.int64, len(rows))
    return csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(texts), len(words)))


def beside(runs: Mapping[str, tuple[Sequence[Mapping[str, Any]], Mapping[str, Any] | None]]) -> list[str]:
    """Name → (rounds, baselines) of summary.json, to sentences: its last reward model on the held-out pairs, and what that has to beat.

    Names of which the same is true share one.
    """
    said: dict[str, list[str]] = {}
    for name, (rounds, baselines) in runs.items():
        known = [row["reward_accuracy_valid"] for row in rounds if row.get("reward_accuracy_valid") is not None]
        if known and baselines:
            pairs = baselines["longer"]["pairs"]
            shares = [proportion(known[-1] * pairs, pairs)[:3]]
            shares += [(one["accuracy"], one["low"], one["high"]) for one in (baselines["longer"], baselines["bag_of_words"])]
            text = "of {} held-out pairs the last reward model orders {} right, the longer response {}, a bag of words {}"
            said.setdefault(text.format(pairs, *(f"{share:.3f} [{low:.3f}, {high:.3f}]" for share, low, high in shares)), []).append(name)
    return [f"{', '.join(names)}: {text}." for text, names in said.items()]
