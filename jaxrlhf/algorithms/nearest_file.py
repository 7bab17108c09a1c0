"""FRFT's filter outside a run: the pairs of a file that are nearest to given generations."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxrlhf.data.columns import ColumnError, read_header
from jaxrlhf.data.pairs import Pair, dataset_hash, read_pairs, write_pairs
from jaxrlhf.data.read_report import DataError
from jaxrlhf.data.stored_responses import StoredResponse, read_generations
from jaxrlhf.evaluation.filter_report import filter_report, write_filter_report
from jaxrlhf.models.hub import tokenizer_named
from jaxrlhf.models.hub.identity import folder_identity
from jaxrlhf.offline.encoder_identity import encoder_identity
from jaxrlhf.offline.nearest import nearest_index, nearest_similarity, own_similarity
from jaxrlhf.offline.select import keep_flags, random_subset, select, similarity_header, texts_of, write_similarities
from jaxrlhf.offline.vectors import embed_cached
from jaxrlhf.types import Progress

KEPT = "kept.jsonl"
RANDOM = "random"
ENCODER = ("encoder", "backend", "pooling", "max_length", "dtype")
Show = Callable[[str], AbstractContextManager[Progress | None]]  # what is done now → a progress for it


def nearest_file(
    data: str | Sequence[str],
    *,
    embeddings: str | Path,
    generations: str | Sequence[str],
    output: str | Path,
    rule: str = "either",
    n: int | None = None,
    threshold: float | None = None,
    compare: Literal["own", "nearest"] = "own",
    k: int = 1,
    embed: Literal["response", "prompt+response"] = "response",
    dedupe: bool = True,
    seed: int = 0,
    policy: str | None = None,
    previous: str | Path | None = None,
    overwrite: bool = False,
    encoder: str | None = None,
    backend: Any = None,
    pooling: str | None = None,
    max_length: int | None = None,
    dtype: str = "float32",
    batch_size: int = 64,
    mesh: Any = None,
    tokenizer: str | None = None,
    split: str = "train",
    limit: int | None = None,
    show: Show = lambda what: nullcontext(),
) -> dict[str, Any]:
    """Compare every pair with the policy's text, select, and write it all to `output`; the filter report.

    data: pairs, as `read_pairs` takes them. generations: rows of a prompt and a response, as `jaxrlhf generate` writes them.
    embeddings: the folder of vectors of `jaxrlhf embed`; what is missing there is embedded now.
    rule: one of `select`'s, or "random" for the control, drawn by `seed`.
    compare: with the policy's first text for the pair's own prompt, or with the `k` nearest over all.
    policy: its folder, for the header. previous: `output` of the round before, for the report.

    `output` becomes a folder of columns (chosen_similarity, rejected_similarity, keep) with kept.jsonl, the pairs kept, ready to be trained
    on, and the filter report. Raises FileExistsError where `output` holds anything but the same columns, unless `overwrite`; DataError for
    a pair whose prompt has no generation; otherwise what the parts raise.
    """
    pairs, report = read_pairs(data, split=split, limit=limit, tokenizer=tokenizer_named(tokenizer))
    report.say()
    answers = read_generations(generations)
    if compare == "own" and k != 1:
        raise ValueError(f"--k {k} averages over several generations, but --compare own has one a pair; add --compare nearest.")
    own = own_rows(pairs, answers) if compare == "own" else None
    which = {"encoder": encoder, "backend": backend, "pooling": pooling, "max_length": max_length, "dtype": dtype}
    rest: dict[str, Any] = {"rule": rule, "n": n, "threshold": threshold, "compare": compare, "k": k, "dedupe": dedupe, "embed": embed}
    rest |= {"seed": seed} if rule == RANDOM else {}
    header = similarity_header(
        dataset=dataset_hash(pairs),
        policy=None if policy is None else folder_identity(policy),
        generations=fingerprint(answers),
        encoder=encoder_identity(**which).key,
        **rest,
    )
    before = None if previous is None else _kept_ids(Path(previous))
    _check_output(Path(output), header, overwrite)

    def vectors(what: str, rows: Sequence[Any]) -> np.ndarray:
        texts = [prompt + response if embed == "prompt+response" else response for prompt, response in rows]
        with show(f"embed {what}") as progress:
            return embed_cached(texts, folder=embeddings, batch_size=batch_size, mesh=mesh, progress=progress, **which).vectors

    written = vectors("generations", [(a.prompt, a.response) for a in answers])
    sides = {side: vectors(side, [(p.prompt, getattr(p, side)) for p in pairs]) for side in ("chosen", "rejected")}
    columns = {f"{side}_similarity": _compared(x, written, own, k, mesh, show, side) for side, x in sides.items()}
    kept = _selected(pairs, columns, rule=rule, n=n, threshold=threshold, dedupe=dedupe, seed=seed)
    near = own if own is not None else nearest_index(sides["chosen"], written, mesh=mesh)
    figures = filter_report(
        pairs, columns["chosen_similarity"], columns["rejected_similarity"], kept, rule=rule, n=n, threshold=threshold, compare=compare,
        k=k, previous=before, generations=[a.response for a in answers], nearest_N=near,
    )  # fmt: skip
    ids = [p.id for p in pairs]
    write_similarities(output, ids, columns | {"keep": keep_flags(kept, len(pairs))}, header, overwrite=True)
    write_pairs(Path(output) / KEPT, [pairs[i] for i in kept])
    write_filter_report(figures, output)
    return figures


def own_rows(pairs: Sequence[Pair], generations: Sequence[StoredResponse]) -> np.ndarray:
    """Row of the first generation for every pair's own prompt; int64 [N]. Raises DataError for a prompt that has none, naming a pair."""
    first: dict[str, int] = {}
    for row, generation in enumerate(generations):
        first.setdefault(generation.prompt, row)
    lacking = [p for p in pairs if p.prompt not in first]
    if lacking:
        raise DataError(
            f"the prompt of pair id {lacking[0].id!r} ({lacking[0].source}) has no generation, nor have those of {len(lacking) - 1} more "
            f"of {len(pairs)}. Sample one for every prompt (jaxrlhf generate POLICY --file DATA), or compare with all generations "
            "(--compare nearest)."
        )
    return np.array([first[p.prompt] for p in pairs], np.int64)


def fingerprint(generations: Sequence[StoredResponse]) -> str:
    """Hash of the texts and their order, which decides between several for one prompt."""
    digest = hashlib.sha256()
    for generation in generations:
        digest.update(json.dumps((generation.prompt, generation.response), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:32]


def _compared(
    responses_ND: np.ndarray, generations_MD: np.ndarray, own: np.ndarray | None, k: int, mesh: Any, show: Show, side: str
) -> np.ndarray:
    if own is not None:
        return own_similarity(responses_ND, generations_MD[own])
    with show(f"compare {side}") as progress:
        return nearest_similarity(responses_ND, generations_MD, k=k, mesh=mesh, progress=progress)


def _selected(
    pairs: Sequence[Pair],
    columns: dict[str, np.ndarray],
    *,
    rule: str,
    n: int | None,
    threshold: float | None,
    dedupe: bool,
    seed: int,
) -> np.ndarray:
    ids, keys = [p.id for p in pairs], texts_of(pairs) if dedupe else None
    if rule != RANDOM:
        return select(columns["chosen_similarity"], columns["rejected_similarity"], ids, rule=rule, n=n, threshold=threshold, keys=keys)
    if n is None or threshold is not None:
        raise ValueError("rule 'random' draws n pairs whatever their similarity; give n, and no threshold.")
    return random_subset(ids, n, seed=seed, keys=keys)


def _kept_ids(folder: Path) -> list[str]:
    path = folder / KEPT
    try:
        return [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} does not list kept pairs ({error}); previous is the output folder of another `jaxrlhf nearest`."
        ) from error


def _check_output(folder: Path, header: dict[str, Any], overwrite: bool) -> None:
    """Only what this command would write again as it is may be replaced unasked: no wrong path costs a user a folder."""
    if not folder.exists() or (folder.is_dir() and not os.listdir(folder)):
        return
    try:
        found = read_header(folder)
    except ColumnError:
        raise FileExistsError(f"{folder} exists and holds no columns; give another output.") from None
    if "keep" not in found["columns"]:
        raise FileExistsError(f"{folder} holds other columns ({', '.join(sorted(found['columns']))}); give another output.")
    if found["header"] != header and not overwrite:
        changed = sorted(name for name in header if found["header"].get(name) != header[name])
        raise FileExistsError(f"{folder} was made with another {', '.join(changed)}; give another output, or --overwrite.")
