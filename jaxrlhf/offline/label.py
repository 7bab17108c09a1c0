"""Preference pairs that π_SFT wrote and gold judged, as the OCRM paper makes them."""

from typing import Literal

import numpy as np

from jaxrlhf.data.pairs import Pair, Prompt, text_id


def label_pairs(
    prompts: list[Prompt],
    first: list[str],
    second: list[str],
    gold_first_N: np.ndarray,
    gold_second_N: np.ndarray,
    *,
    rule: Literal["argmax", "strict", "bradley_terry"],
    label_flip: float,
    seed: int,
) -> tuple[list[Pair], np.ndarray, np.ndarray]:
    """(pairs, first_is_chosen, kept row numbers). Two equal texts are no preference and are left out.

    argmax: the higher gold score, a tie to the first (methods of the paper). strict: the higher gold score, a tie is no
    pair. bradley_terry: the first with probability σ(gold₁ − gold₂). Then a share `label_flip` of the labels is turned
    round. Both draws come from (seed, row), so a row's label does not depend on how many rows there are.
    """
    if not 0 <= label_flip < 0.5:
        raise ValueError(f"pairs.label_flip is {label_flip}; it must lie in [0, 0.5), beyond that labels say the opposite.")
    draw, flip = (_uniforms(seed, stream, len(prompts)) for stream in (0, 1))
    if rule == "bradley_terry":
        wins = draw < 1.0 / (1.0 + np.exp(-(gold_first_N - gold_second_N).astype(np.float64)))
    else:
        wins = gold_first_N >= gold_second_N
    wins = wins ^ (flip < label_flip)
    different = np.array([a != b for a, b in zip(first, second, strict=True)], bool)
    kept = np.flatnonzero(different & (gold_first_N != gold_second_N) if rule == "strict" else different)
    pairs = []
    seen: dict[str, int] = {}
    for i in kept:
        chosen, rejected = (first[i], second[i]) if wins[i] else (second[i], first[i])
        row_id = text_id(prompts[i].prompt, chosen, rejected)
        seen[row_id] = seen.get(row_id, -1) + 1
        suffix = f"-{seen[row_id]}" if seen[row_id] else ""
        pairs.append(Pair(row_id + suffix, prompts[i].prompt, chosen, rejected, prompts[i].source, templated=prompts[i].templated))
    return pairs, wins[kept], kept


def _uniforms(seed: int, stream: int, n: int) -> np.ndarray:
    bits = np.random.Philox(np.random.SeedSequence([seed, 77, stream])).random_raw(n)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
