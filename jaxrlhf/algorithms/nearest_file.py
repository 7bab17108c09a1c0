"""FRFT's filter outside a run: the pairs of a file that are nearest to given generations."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxrlhf.algorithms.frft import RANDOM, Filter
from jaxrlhf.config import FilterConfig
from jaxrlhf.data.columns import ColumnError, read_header, write_columns
from jaxrlhf.data.pairs import Pair, dataset_hash, read_pairs, write_pairs
from jaxrlhf.data.read_report import DataError
from jaxrlhf.data.stored_responses import StoredResponse, read_generations
from jaxrlhf.files import read_json_lines
from jaxrlhf.models.hub import tokenizer_named
from jaxrlhf.models.hub.identity import folder_identity
from jaxrlhf.offline.encoder_identity import encoder_identity
from jaxrlhf.offline.select import keep_flags, similarity_header
from jaxrlhf.types import Progress

KEPT = "kept.jsonl"
Show = Callable[[str], AbstractContextManager[Progress | None]]  # what is done now → a progress for it


def nearest_file(
    data: str | Sequence[str],
    *,
    embeddings: str | Path,
    generations: str | Sequence[str],
    output: str | Path,
    section: FilterConfig,
    seed: int = 0,
    policy: str | None = None,
    previous: str | Path | None = None,
    overwrite: bool = False,
    batch_size: int = 64,
    mesh: Any = None,
    tokenizer: str | None = None,
    split: str = "train",
    limit: int | None = None,
    reading: Mapping[str, Any] = MappingProxyType({}),
    show: Show = lambda what: nullcontext(),
    **encoder: Any,
) -> dict[str, Any]:
    """Compare every pair with the policy's text, select, and write it all to `output`; the filter report.

    data, reading: as `read_pairs` takes them. generations: rows of a prompt and a response, as `jaxrlhf generate` writes them.
    embeddings: the folder of vectors of `jaxrlhf embed`; what is missing there is embedded now.
    section: how to compare and select; its rule is one of `select`'s, or "random" for the control, drawn by `seed`. With `compare: own` a
    response meets the policy's first text for the pair's own prompt.
    policy: its folder, for the header. previous: `output` of the round before, for the report. encoder: keywords of `encoder_identity`.

    `output` becomes a folder of columns (chosen_similarity, rejected_similarity, keep) with kept.jsonl, the pairs kept, ready to be trained
    on, and the filter report. Raises FileExistsError where `output` holds anything but the same columns, unless `overwrite`; DataError for
    a pair whose prompt has no generation; otherwise what the parts raise.
    """
    pairs, report = read_pairs(data, split=split, limit=limit, tokenizer=tokenizer_named(tokenizer), **reading)
    report.say()
    answers = read_generations(generations)
    if section.compare == "own" and section.k != 1:
        raise ValueError(f"--k {section.k} averages over several generations, but --compare own has one a pair; add --compare nearest.")
    if section.rule == RANDOM and (section.n is None or section.threshold is not None):
        raise ValueError("rule 'random' draws n pairs whatever their similarity; give n, and no threshold.")
    own = own_rows(pairs, answers) if section.compare == "own" else None
    header = similarity_header(
        section,
        dataset=dataset_hash(pairs),
        policy=None if policy is None else folder_identity(policy),
        generations=fingerprint(answers),
        encoder=encoder_identity(**encoder).key,
        **({"seed": seed} if section.rule == RANDOM else {}),
    )
    before = None if previous is None else _kept_ids(Path(previous))
    _check_output(Path(output), header, overwrite)
    embedding = {"folder": embeddings, "batch_size": batch_size, **encoder}
    with ExitStack() as stack:
        asked, written = [a.prompt for a in answers], [a.response for a in answers]
        here = Filter(section, pairs, asked, written, own, embedding, mesh, lambda what: stack.enter_context(show(what)))
        similar = here.similarities()
        kept = here.select_at_random(section.n or 0, seed) if section.rule == RANDOM else here.select_nearest(similar)
        columns = similar | {"keep": keep_flags(kept, len(pairs))}
        write_columns(output, [p.id for p in pairs], columns, header, overwrite=True)
        write_pairs(Path(output) / KEPT, [pairs[i] for i in kept])
        return here.report(similar, kept, output, previous=before)


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


def _kept_ids(folder: Path) -> list[str]:
    path = folder / KEPT
    lines, others = read_json_lines(path, lambda row: isinstance(row.get("id"), str))
    if others or not path.exists():
        said = f"{others} lines are none" if path.exists() else "it is not there"
        raise DataError(f"{path} does not list kept pairs ({said}); previous is the output folder of another `jaxrlhf nearest`.")
    return [line["id"] for line in lines]


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
