"""Do reward models learn real preferences from scratch? Three sets, three seeds, beside two baselines on the same rows.

    JAXRLHF_DATA=FOLDER python benchmarks/real_preferences.py [--sets polite persona ukp] [--seeds 0 1 2] [--output runs/real-preferences]

FOLDER holds polite_style, persona_yesno and ukp_convarg, each with train.jsonl.gz and valid.jsonl.gz (prompt, chosen, rejected). A reward
model goes through the library's own stages (`jaxrlhf.run.run.run` until "reward"): a tokenizer trained on the set's own text, SFT on its
chosen responses, Bradley–Terry on its pairs, accuracy on the valid file. The baselines see the same rows: the longer (or the shorter,
whichever is more often right on train) response in characters, and a Bradley–Terry model on counts of words.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from jaxrlhf.data.pairs import Pair, read_pairs, split_by_prompt
from jaxrlhf.evaluation.diagnostics import pair_accuracy
from jaxrlhf.evaluation.winrate import wilson_interval


class PreferenceSet(NamedTuple):
    """A folder of pairs, the recipe that learns it, and the accuracy it should reach."""

    folder: str
    recipe: str
    threshold: float


SETS = {
    "polite": PreferenceSet("polite_style", "real_rm_polite.yaml", 0.85),
    "persona": PreferenceSet("persona_yesno", "real_rm_persona.yaml", 0.90),
    "ukp": PreferenceSet("ukp_convarg", "real_rm_ukp.yaml", 0.75),
}
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # L2, on the sum of the log-losses
INNER_FRACTION = 0.2  # share of train, by prompt, on which the penalty is chosen
FEW_RESPONSES = 8  # with at most so many different responses a word of the prompt counts once for each of them


def length_baseline(train: Sequence[Pair], valid: Sequence[Pair]) -> tuple[float, str]:
    """(accuracy, direction): the longer or the shorter response in characters, a tie counting one half; the direction is train's."""

    def lengths(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([len(p.chosen) for p in pairs]), np.array([len(p.rejected) for p in pairs])

    sign = 1 if (pair_accuracy(*lengths(train)) or 0.0) >= 0.5 else -1
    chosen, rejected = lengths(valid)
    return pair_accuracy(sign * chosen, sign * rejected) or 0.0, "longer" if sign > 0 else "shorter"


def words(text: str) -> list[str]:
    """Lower-case words and single marks of punctuation, and neighbouring pairs of them."""
    single = re.findall(r"\w+|[^\w\s]", text.lower())
    return single + [f"{a} {b}" for a, b in zip(single, single[1:], strict=False)]


def differences(pairs: Iterable[Pair], vocabulary: dict[str, int] | None, *, crossed: bool) -> tuple[csr_matrix, dict[str, int]]:
    """([N, V] counts of the chosen less those of the rejected response, vocabulary): what a linear Bradley–Terry model sees.

    The vocabulary is collected where None is given; else unknown words are left out. Counts are log(1 + n). `crossed`: words are those of
    the prompt, each joined to the response (a linear model of the response alone knows nothing of the prompt).
    """
    known = {} if vocabulary is None else vocabulary
    rows: list[Counter[int]] = []
    for pair in pairs:
        row: Counter[int] = Counter()
        for side, sign in ((pair.chosen, 1.0), (pair.rejected, -1.0)):
            names = [f"{side}|{word}" for word in words(pair.prompt)] if crossed else words(side)
            for name, count in Counter(names).items():
                number = known.setdefault(name, len(known)) if vocabulary is None else known.get(name)
                if number is not None:
                    row[number] += sign * np.log1p(count)
        rows.append(row)
    pointer = np.cumsum([0, *(len(row) for row in rows)])
    columns = np.array([c for row in rows for c in row], np.int64)
    values = np.array([v for row in rows for v in row.values()], np.float64)
    return csr_matrix((values, columns, pointer), shape=(len(rows), len(known))), known


def fit_bradley_terry(differences_NV: csr_matrix, penalty: float) -> np.ndarray:
    """w_V that minimises Σ −log σ(d·w) + penalty/2 · |w|²."""

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        margins = differences_NV @ w
        slope = -1.0 / (1.0 + np.exp(np.clip(margins, -500, 500)))
        return float(np.logaddexp(0.0, -margins).sum() + 0.5 * penalty * w @ w), differences_NV.T @ slope + penalty * w

    found = minimize(objective, np.zeros(differences_NV.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return found.x


def word_baseline(train: Sequence[Pair], valid: Sequence[Pair]) -> tuple[float, float]:
    """(accuracy, penalty): Bradley–Terry on counts of words; the penalty is chosen on pairs of train held out by prompt."""
    crossed = len({side for pair in train for side in (pair.chosen, pair.rejected)}) <= FEW_RESPONSES

    def accuracy(fit: Sequence[Pair], test: Sequence[Pair], penalty: float) -> float:
        seen, vocabulary = differences(fit, None, crossed=crossed)
        unseen, _ = differences(test, vocabulary, crossed=crossed)
        margins = unseen @ fit_bradley_terry(seen, penalty)
        return pair_accuracy(margins, np.zeros_like(margins)) or 0.0

    inner, held = split_by_prompt(train, INNER_FRACTION, seed=0)
    best = max(PENALTIES, key=lambda penalty: accuracy(inner, held, penalty))
    return accuracy(train, valid, best), best
