"""Do reward models learn real preferences from scratch? Three sets, three seeds, beside two baselines on the same rows.

    JAXRLHF_DATA=FOLDER python benchmarks/real_preferences.py [--sets polite persona ukp] [--seeds 0 1 2] [--output runs/real-preferences]

FOLDER holds polite_style, persona_yesno and ukp_convarg, each with train.jsonl.gz and valid.jsonl.gz (prompt, chosen, rejected). A reward
model goes through the library's own stages (`jaxrlhf.run` until "reward"): a tokenizer trained on the set's own text, SFT on its
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
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from jaxrlhf.data.pairs import Pair, read_pairs, split_by_prompt
from jaxrlhf.evaluation.diagnostics import pair_accuracy
from jaxrlhf.evaluation.intervals import wilson_interval
from jaxrlhf.pipeline.run import run
from jaxrlhf.recipe import load_config


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
PENALTIES = (300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3)  # L2, on the sum of the log-losses; from strong to weak, each from the last's weights
MIN_PAIRS = 2  # a word that tells fewer pairs of train apart is left out
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
    return single + [f"{a} {b}" for a, b in pairwise(single)]


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


def fit_bradley_terry(differences_NV: csr_matrix, penalty: float, start_V: np.ndarray) -> np.ndarray:
    """w_V that minimises Σ −log σ(d·w) + penalty/2 · |w|², searched from `start_V`."""

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        margins = differences_NV @ w
        slope = -1.0 / (1.0 + np.exp(np.clip(margins, -500, 500)))
        return float(np.logaddexp(0.0, -margins).sum() + 0.5 * penalty * w @ w), differences_NV.T @ slope + penalty * w

    return minimize(objective, start_V, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x


def word_baseline(train: Sequence[Pair], valid: Sequence[Pair]) -> tuple[float, float]:
    """(accuracy, penalty): Bradley–Terry on counts of words; the penalty is chosen on pairs of train held out by prompt."""
    crossed = len({side for pair in train for side in (pair.chosen, pair.rejected)}) <= FEW_RESPONSES

    def accuracies(fit: Sequence[Pair], test: Sequence[Pair], penalties: Sequence[float]) -> list[float]:
        seen, vocabulary = differences(fit, None, crossed=crossed)
        unseen, _ = differences(test, vocabulary, crossed=crossed)
        kept = np.bincount(seen.indices[seen.data != 0], minlength=len(vocabulary)) >= MIN_PAIRS
        seen, unseen, w, found = seen[:, kept], unseen[:, kept], np.zeros(int(kept.sum())), []
        for penalty in penalties:
            w = fit_bradley_terry(seen, penalty, w)
            margins = unseen @ w
            found.append(pair_accuracy(margins, np.zeros_like(margins)) or 0.0)
        return found

    inner, held = split_by_prompt(train, INNER_FRACTION, seed=0)
    best = PENALTIES[int(np.argmax(accuracies(inner, held, PENALTIES)))]
    return accuracies(train, valid, [best])[0], best


def paths(one: PreferenceSet) -> dict[str, str]:
    """train and valid of a set under JAXRLHF_DATA."""
    folder = Path(os.environ["JAXRLHF_DATA"]) / one.folder
    return {split: str(folder / f"{split}.jsonl.gz") for split in ("train", "valid")}


def baselines(one: PreferenceSet) -> dict[str, Any]:
    """Both baselines of a set, with the number of rows they were taken on."""
    train, valid = (read_pairs(path)[0] for path in paths(one).values())
    length, direction = length_baseline(train, valid)
    bag, penalty = word_baseline(train, valid)
    return {"rows": len(valid), "length": length, "direction": direction, "words": bag, "penalty": penalty}


def reward_model(name: str, one: PreferenceSet, seed: int, output: str) -> dict[str, Any]:
    """The result of the reward stage of one seed, with the seconds of this call and of the stages when they were built."""
    start = time.perf_counter()
    config = load_config(one.recipe)
    config = replace(config, name=f"{name}-{seed}", seed=seed, output=output, data=replace(config.data, **paths(one)))
    stages = sorted((run(config, until="reward") / "stages").iterdir())
    records = [json.loads((stage / "stage.json").read_text()) for stage in stages]
    reward = next(r for r in reversed(records) if "accuracy_valid" in (r.get("result") or {}))
    return {"accuracy": reward["result"]["accuracy_valid"], "steps": reward["result"]["steps"], "pairs": reward["result"]["pairs"],
            "call_seconds": time.perf_counter() - start, "seconds": sum(r["seconds"] for r in records)}  # fmt: skip


def row_of(name: str, one: PreferenceSet, plain: dict[str, Any], accuracies: Sequence[float]) -> str:
    """A line of the table. The interval is Wilson's for the mean accuracy on the rows of one valid file: seeds share their rows, so
    pooling them as if they were independent would make it too narrow."""
    n, mean = plain["rows"], float(np.mean(accuracies))
    low, high = wilson_interval(round(mean * n), n)
    seeds = " ".join(f"{a:.3f}" for a in accuracies)
    met = "met" if mean >= one.threshold else "NOT MET"
    return (
        f"| {name} | {n} | {mean:.3f} [{low:.3f}, {high:.3f}] | {seeds} | {plain['length']:.3f} ({plain['direction']}) "
        f"| {plain['words']:.3f} (L2 {plain['penalty']:g}) | {one.threshold:.2f} {met} |"
    )


HEADER = """| set | valid rows | reward model, mean of seeds [95 % Wilson, n = rows] | seeds | length only | words | threshold |
|---|---|---|---|---|---|---|"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--output", default="runs/real-preferences", help="run folders and results.jsonl; finished stages are not run again"
    )
    options = parser.parse_args()
    if "JAXRLHF_DATA" not in os.environ:
        parser.error("set JAXRLHF_DATA to the folder that holds polite_style, persona_yesno and ukp_convarg.")
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    table = [HEADER]
    for name in options.sets:
        one, found = SETS[name], []
        for seed in options.seeds:
            found.append({"set": name, "seed": seed, **reward_model(name, one, seed, str(output))})
            print(json.dumps(found[-1]), flush=True)
        plain = baselines(one)
        print(json.dumps({"set": name, **plain}), flush=True)
        with (output / "results.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in [*found, {"set": name, **plain}])
        table.append(row_of(name, one, plain, [row["accuracy"] for row in found]))
    print("\n".join(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
