"""Which offline pairs to keep for the next reward model: the rules of FRFT, and its control.

    either      max(s⁺, s⁻)                        chosen      s⁺
    both        by n: s⁺ + s⁻; by threshold: min   rejected    s⁻
    half-half   half of them by s⁺, half by s⁻

s⁺ and s⁻ are the similarities of a pair's chosen and rejected response to what the policy writes. A pair is kept or dropped whole. The
paper's public code calls `both`, `half-half`, `rejected` and `chosen` Type 1 to 4 and streams `either`. Every decision is a function of
the similarities and the ids: the order of the rows changes nothing.
"""

import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxrlhf.config import FilterConfig
from jaxrlhf.data.columns import column_header
from jaxrlhf.data.pairs import Pair, text_id

RULES = ("either", "both", "chosen", "rejected", "half-half")
NAMES = ("chosen_similarity", "rejected_similarity", "keep")

_log = logging.getLogger(__name__)


class SelectionError(ValueError):
    """A selection that cannot be made, or keeps nothing; the message names the value, the rule and the way out."""


def score_of(rule: str, chosen_N: np.ndarray, rejected_N: np.ndarray) -> np.ndarray:
    """What `rule` ranks pairs by, float64 [N]. For `half-half`, which ranks twice, the larger of the two."""
    if rule not in RULES:
        raise SelectionError(f"filter.rule is {rule!r}; it must be one of {', '.join(RULES)}.")
    chosen, rejected = np.asarray(chosen_N, np.float64), np.asarray(rejected_N, np.float64)
    by_rule = {"both": chosen + rejected, "chosen": chosen, "rejected": rejected}
    return by_rule.get(rule, np.maximum(chosen, rejected))


def select(
    chosen_N: np.ndarray,
    rejected_N: np.ndarray,
    ids: Sequence[str],
    *,
    rule: str,
    n: int | None = None,
    threshold: float | None = None,
    keys: Sequence[Hashable] | None = None,
) -> np.ndarray:
    """Row numbers of the pairs to keep, ascending, int64: those that pass `threshold`, of them the `n` best, or both in this order.

    threshold: cosine that `rule`'s similarity must reach (≥): of either side, of both, of the chosen, of the rejected; under `half-half` a
        side ranks only the pairs whose own similarity reaches it.
    half-half: the two sides take turns, chosen first, each taking the best pair that is not yet taken, until `n` are. Without overlap
        these are the n/2 best by either side. Where the halves overlap the public code keeps the pair twice; here the next best follows,
        so that n distinct pairs are kept.
    keys: one for each pair; of pairs with equal keys only that with the smallest id is looked at (`texts_of` makes them from texts).

    Ties are broken by pair id, the smaller first. Fewer than `n` are kept where no more pass, and that is logged. Raises SelectionError
    for similarities that are not finite, repeated ids, a rule or number out of range, and where no pair is left.
    """
    chosen, rejected = _checked(chosen_N, rejected_N, ids)
    score = score_of(rule, chosen, rejected)
    _check_limits(n, threshold)
    order = np.array(sorted(_first_of_equals(ids, keys), key=lambda i: ids[i]), np.int64)
    passing = np.minimum(chosen, rejected) if rule == "both" else score
    # As float32, like the similarities: 0.9 is a little more than the float32 next to it, which would not reach it.
    level = -np.inf if threshold is None else np.float64(np.float32(threshold))
    if rule == "half-half":
        sides = [_best_first(order[side[order] >= level], side) for side in (chosen, rejected)]
        kept = _in_turn(sides, len(ids) if n is None else n)
    else:
        kept = _best_first(order[passing[order] >= level], score)[:n]
    if not len(kept):
        raise SelectionError(
            f"no pair reaches filter.threshold {threshold} under rule {rule!r}: the highest similarity is {passing.max():.4f}. Lower it, "
            "or set filter.n and no threshold."
        )
    _say_if_short(len(kept), n, len(ids))
    return np.sort(kept)


def random_subset(ids: Sequence[str], n: int, *, seed: int, keys: Sequence[Hashable] | None = None) -> np.ndarray:
    """Row numbers of `n` pairs drawn without regard to similarity, ascending, int64: the control with the same budget.

    Whether a pair is drawn depends on the seed and the set of ids alone: the n smallest hashes of (seed, id). `keys` as in `select`: a
    filter that keeps one of equal texts is compared with a draw that does. All are kept, and that is logged, where there are not `n`.
    """
    _check_ids(ids)
    _check_limits(n, None)
    drawn = sorted(_first_of_equals(ids, keys), key=lambda i: (text_id("random-subset", str(seed), ids[i]), ids[i]))
    kept = np.array(drawn[:n], np.int64)
    _say_if_short(len(kept), n, len(ids))
    return np.sort(kept)


def texts_of(pairs: Iterable[Pair]) -> list[str]:
    """The key under which two pairs say the same: a hash of prompt, chosen and rejected, whatever their ids."""
    return [text_id(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]


def similarity_header(
    section: FilterConfig, *, dataset: str, policy: str | None, generations: str, encoder: Any, **more: Any
) -> dict[str, Any]:
    """What similarities and keep flags depend on: hashes of pairs, policy and generations, the encoder's identity, and the rule.

    k says nothing where a response is compared with its own prompt's generation, and is left out there.
    """
    facts = {name: getattr(section, name) for name in ("rule", "n", "threshold", "compare", "embed", "dedupe")}
    facts |= {"generations": generations, "encoder": encoder, "k": section.k if section.compare == "nearest" else None}
    return column_header(dataset=dataset, model=policy, **facts, **more)


def keep_flags(kept: np.ndarray, total: int) -> np.ndarray:
    """Booleans [total], True at the row numbers `kept`."""
    flags = np.zeros(total, bool)
    flags[kept] = True
    return flags


def _best_first(rows_by_id: np.ndarray, score_N: np.ndarray) -> np.ndarray:
    """Rows by falling score; the sort is stable, so equals stay in the order of their ids."""
    return rows_by_id[np.argsort(-score_N[rows_by_id], kind="stable")]


def _in_turn(sides: list[np.ndarray], n: int) -> np.ndarray:
    """The first `n` distinct rows when two rankings take turns; where one has run out the other goes on."""
    queues, taken = [iter(side.tolist()) for side in sides], {}
    while queues and len(taken) < n:
        queue = queues.pop(0)
        row = next((row for row in queue if row not in taken), None)
        if row is not None:
            taken[row] = None
            queues.append(queue)
    return np.array(list(taken), np.int64)


def _first_of_equals(ids: Sequence[str], keys: Sequence[Hashable] | None) -> list[int]:
    """Rows to look at: all, or of those with equal keys the one with the smallest id."""
    if keys is None:
        return list(range(len(ids)))
    if len(keys) != len(ids):
        raise SelectionError(f"{len(keys)} keys for {len(ids)} pairs; there must be one for each.")
    first: dict[Hashable, int] = {}
    for row, key in enumerate(keys):
        if key not in first or ids[row] < ids[first[key]]:
            first[key] = row
    return list(first.values())


def _checked(chosen_N: np.ndarray, rejected_N: np.ndarray, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    _check_ids(ids)
    sides = np.asarray(chosen_N, np.float32).astype(np.float64), np.asarray(rejected_N, np.float32).astype(np.float64)
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if side.shape != (len(ids),):
            raise SelectionError(f"{name} similarities have shape {side.shape} for {len(ids)} pairs; there must be one for each.")
        bad = np.flatnonzero(~np.isfinite(side))
        if len(bad):
            raise SelectionError(
                f"the {name} similarity of pair {ids[bad[0]]!r} is {side[bad[0]]} ({len(bad)} in all); it must be finite. Embed again."
            )
    return sides


def _check_ids(ids: Sequence[str]) -> None:
    if not len(ids):
        raise SelectionError("there are no pairs to select from; look at the reader's report.")
    if len(set(ids)) != len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise SelectionError(f"pair id {twice!r} occurs twice; ids must be unique, ties are broken by them (read_pairs makes them so).")


def _check_limits(n: int | None, threshold: float | None) -> None:
    if n is None and threshold is None:
        raise SelectionError("neither filter.n nor filter.threshold is set, which would keep every pair; set one of them or both.")
    if n is not None and n < 1:
        raise SelectionError(f"filter.n is {n}; at least one pair must be kept. Leave it out to keep all that reach filter.threshold.")
    if threshold is not None and not -1 <= threshold <= 1:
        raise SelectionError(f"filter.threshold is {threshold}; it is a cosine and lies in [-1, 1].")


def _say_if_short(kept: int, n: int | None, total: int) -> None:
    if n is not None and kept < n:
        _log.warning("filter.n asks for %d pairs and only %d of %d pass; these are kept.", n, kept, total)
