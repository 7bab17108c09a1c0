"""What a filter kept and what it dropped: one dict of figures, and its page for people.

    report = filter_report(pairs, chosen_N, rejected_N, kept, rule="either", n=2000)
    write_filter_report(report, folder)        # filter_report.json, filter_report.md, filter_report.svg

The similarity that a filter selects by rises with whatever it selects, so no figure here says that the filter helps; the report says what
else came along: how many prompts are left, whether longer or shorter text was preferred, how often the same pair was kept, and what a
random draw of the same size would look like.
"""

import json
import math
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.data.pairs import Pair
from jaxrlhf.evaluation.filter_page import SIDES, to_markdown, to_svg
from jaxrlhf.files import write_whole
from jaxrlhf.offline.select import RULES, keep_flags, score_of, texts_of

FILES = ("filter_report.json", "filter_report.md", "filter_report.svg")
TEXT_LIMIT = 400  # characters of a text that are shown
_BINS = 40


def filter_report(
    pairs: Sequence[Pair],
    chosen_N: np.ndarray,
    rejected_N: np.ndarray,
    kept: np.ndarray,
    *,
    rule: str,
    n: int | None = None,
    threshold: float | None = None,
    compare: str = "own",
    k: int = 1,
    round: int | None = None,
    previous: Collection[str] | None = None,
    generations: Sequence[str] | None = None,
    nearest_N: np.ndarray | None = None,
    examples: int = 3,
) -> dict[str, Any]:
    """Everything about one selection as plain JSON: finite numbers, None where there is nothing to take a mean of.

    chosen_N, rejected_N: similarity of each pair's sides (cosine, no unit). kept: row numbers. rule: one of `select`'s, or a word for what
    else selected ("random"), which is then shown as if ranked by the larger side. previous: ids kept by the round before. generations: the
    policy's texts; nearest_N: row of that which each chosen response was compared with, or is nearest to.
    Raises ValueError for lengths that do not fit and for no kept row.
    """
    count = len(pairs)
    chosen, rejected = np.asarray(chosen_N, np.float64), np.asarray(rejected_N, np.float64)
    if chosen.shape != (count,) or rejected.shape != (count,) or (nearest_N is not None and np.shape(nearest_N) != (count,)):
        raise ValueError(f"a report on {count} pairs needs as many similarities; shapes are {chosen.shape} and {rejected.shape}.")
    kept = np.unique(np.asarray(kept, np.int64))
    if not len(kept) or kept[0] < 0 or kept[-1] >= count:
        raise ValueError(f"kept holds {len(kept)} row numbers for {count} pairs; at least one is needed, each from 0 to {count - 1}.")
    keep, similarity = keep_flags(kept, count), {"chosen": chosen, "rejected": rejected}
    score = score_of(rule if rule in RULES else "either", chosen, rejected)
    used = None if nearest_N is None else np.asarray(nearest_N)
    return {
        "round": round,
        "rule": rule,
        "n": n,
        "threshold": threshold,
        "compare": compare,
        "k": k if compare == "nearest" else None,
        "pairs": count,
        "kept": len(kept),
        "short_of_n": 0 if n is None else max(0, n - len(kept)),
        "prompts": _prompts(pairs, keep),
        "generations": None if generations is None else _generations(len(generations), used, keep),
        "similarity": _similarity(similarity, keep),
        "length": _length(pairs, keep),
        "duplicates": _duplicates(pairs, kept),
        "previous": None if previous is None else _overlap([pairs[i].id for i in kept], set(previous), count),
        "examples": _examples(pairs, similarity, score, keep, generations, used, examples),
    }


def write_filter_report(report: dict[str, Any], folder: str | Path) -> list[Path]:
    """`report` as filter_report.json, .md and .svg in `folder`, which is made if need be; the same report gives the same bytes."""
    contents = (json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", to_markdown(report), to_svg(report))
    paths = [Path(folder) / name for name in FILES]
    for path, content in zip(paths, contents, strict=True):
        write_whole(path, content)
    return paths


def _prompts(pairs: Sequence[Pair], keep: np.ndarray) -> dict[str, Any]:
    everything, kept = {p.prompt for p in pairs}, {p.prompt for p, k in zip(pairs, keep, strict=True) if k}
    return {"all": len(everything), "kept": len(kept), "share": len(kept) / len(everything)}


def _generations(count: int, used: np.ndarray | None, keep: np.ndarray) -> dict[str, Any]:
    """How many of the policy's texts the kept pairs are near to: few means that the filter has seen a corner of what the policy writes."""
    near = None if used is None else {"all": len(np.unique(used)), "kept": len(np.unique(used[keep]))}
    return {"rows": count, "nearest_to_some_pair": near and near["all"], "nearest_to_some_kept_pair": near and near["kept"]}


def _similarity(similarity: dict[str, np.ndarray], keep: np.ndarray) -> dict[str, Any]:
    """Means and histograms with common edges. The mean over all pairs is what a random draw would have on average."""
    values = np.concatenate(list(similarity.values()))
    low, high = math.floor(values.min() * 20) / 20, math.ceil(values.max() * 20) / 20
    edges = np.linspace(low, high if high > low else low + 0.05, _BINS + 1)
    result: dict[str, Any] = {"bin_edges": edges.tolist()}
    for side, x in similarity.items():
        result[side] = {
            "mean_kept": _mean(x[keep]),
            "mean_dropped": _mean(x[~keep]),
            "mean_at_random": _mean(x),
            "lowest_kept": float(x[keep].min()),
            "highest_dropped": float(x[~keep].max()) if (~keep).any() else None,
            "histogram_kept": np.histogram(x[keep], edges)[0].tolist(),
            "histogram_dropped": np.histogram(x[~keep], edges)[0].tolist(),
        }
    return result


def _length(pairs: Sequence[Pair], keep: np.ndarray) -> dict[str, Any]:
    """Mean lengths of what was kept and dropped, per side, and of the gap chosen − rejected.

    `shift` is (mean kept − mean dropped) in standard deviations over all pairs: how far length alone would tell kept from dropped.
    """
    result = {}
    for unit, measure in (("characters", len), ("words", lambda text: len(text.split()))):
        sides = {side: np.array([measure(getattr(p, side)) for p in pairs], np.float64) for side in SIDES}
        sides["gap"] = sides["chosen"] - sides["rejected"]
        result[unit] = {}
        for name, x in sides.items():
            kept, dropped, spread = _mean(x[keep]), _mean(x[~keep]), float(x.std())
            shift = (kept - dropped) / spread if kept is not None and dropped is not None and spread > 0 else None
            result[unit][name] = {"kept": kept, "dropped": dropped, "at_random": _mean(x), "shift": shift}
    return result


def _duplicates(pairs: Sequence[Pair], kept: np.ndarray) -> dict[str, int]:
    """Further copies, beyond the first: of a pair's three texts, in all and among the kept, and of a response among the kept."""

    def copies(items: list[str]) -> int:
        return len(items) - len(set(items))

    texts = texts_of(pairs)
    responses = {f"{side}_kept": copies([getattr(pairs[i], side) for i in kept]) for side in SIDES}
    return {"pairs": copies(texts), "pairs_kept": copies([texts[i] for i in kept]), **responses}


def _overlap(ids: list[str], previous: set[str], count: int) -> dict[str, Any]:
    """Jaccard index with the ids kept before; `both_at_random` is what two independent draws of these sizes would share on average."""
    both = len(previous & set(ids))
    return {
        "kept": len(previous),
        "both": both,
        "jaccard": both / len(previous | set(ids)),
        "both_at_random": min(1.0, len(previous) / count) * len(ids),
    }


def _examples(
    pairs: Sequence[Pair],
    similarity: dict[str, np.ndarray],
    score: np.ndarray,
    keep: np.ndarray,
    generations: Sequence[str] | None,
    used: np.ndarray | None,
    n: int,
) -> dict[str, list[dict[str, Any]]]:
    """Pairs to look at, by what the rule ranks by: the best kept, the last kept, the best dropped and the last dropped."""
    order = np.array(sorted(range(len(pairs)), key=lambda i: (-score[i], pairs[i].id)))

    def shown(i: int) -> dict[str, Any]:
        text = None if generations is None or used is None else shorten(generations[int(used[i])])
        return {
            "id": pairs[i].id,
            "source": pairs[i].source,
            "score": float(score[i]),
            **{f"{side}_similarity": float(similarity[side][i]) for side in SIDES},
            "prompt": shorten(pairs[i].prompt, end=True),
            **{side: shorten(getattr(pairs[i], side)) for side in SIDES},
            "generation": text,
        }

    groups = {"kept": [int(i) for i in order if keep[i]], "dropped": [int(i) for i in order if not keep[i]]}
    return {f"{name}_{end}": [shown(i) for i in _end(rows, end, n)] for name, rows in groups.items() for end in ("best", "last")}


def _end(rows: list[int], end: str, n: int) -> list[int]:
    """The first `n` rows, or the last `n`, the very last of them first."""
    return rows[:n] if end == "best" else rows[::-1][:n]


def _mean(x: np.ndarray) -> float | None:
    return float(x.mean()) if len(x) else None


def shorten(text: str, limit: int = TEXT_LIMIT, *, end: bool = False) -> str:
    """At most `limit` characters, the first (or, of a dialogue's prompt, the last), with "…" where something is missing.

    No accent or joined emoji is cut from the character it belongs to, and a lone half of a surrogate pair, which no file could hold, is
    replaced.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    if len(text) <= limit:
        return text
    cut = len(text) - limit if end else limit
    while 0 < cut < len(text) and (_belongs_before(text[cut]) or text[cut - 1] == "\u200d"):
        cut += 1 if end else -1
    return f"…{text[cut:]}" if end else f"{text[:cut]}…"


def _belongs_before(character: str) -> bool:
    return unicodedata.category(character) in ("Mn", "Me", "Mc") or character == "\u200d" or 0x1F3FB <= ord(character) <= 0x1F3FF
