"""`jaxrlhf nearest`: apply FRFT's filter to files."""

import argparse
from pathlib import Path

from jaxrlhf.algorithms.frft import RANDOM
from jaxrlhf.algorithms.nearest_file import KEPT, nearest_file
from jaxrlhf.commands.embed import add_encoder_arguments, encoder_mesh
from jaxrlhf.commands.recipe_arguments import reading_of
from jaxrlhf.config import FilterConfig
from jaxrlhf.monitoring.progress import shown
from jaxrlhf.offline.select import RULES
from jaxrlhf.sharding.compile_cache import cache_compilations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `jaxrlhf nearest`."""
    parser.description = "Keep the preference pairs that are similar to what a policy writes, and report how the data changed."
    parser.add_argument("data", nargs="+", help="preference pairs: JSONL(.gz), Parquet, a folder of shards or a hub id")
    parser.add_argument("--embeddings", required=True, help="the folder of vectors (jaxrlhf embed); missing ones are embedded")
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
    parser.add_argument("--k", type=int, default=1, help="nearest: mean cosine with the k most similar generations")
    parser.add_argument(
        "--embed", choices=("response", "prompt+response"), default="response", help="what is embedded, of pairs and generations"
    )
    parser.add_argument("--keep_duplicates", action="store_true", help="do not reduce pairs of equal texts to one")
    parser.add_argument("--seed", type=int, default=0, help="of the rule random")
    parser.add_argument("--policy", help="the policy's folder; its hash goes into the columns' header")
    parser.add_argument("--previous", help="output of the round before, for the overlap in the report")
    parser.add_argument("--overwrite", action="store_true", help="replace columns that were made with other settings")
    add_encoder_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """Select as the command line says, show progress, and print what was kept and where it lies."""
    cache_compilations()
    settings = vars(options)
    how = {name: settings.pop(name) for name in ("rule", "n", "threshold", "compare", "k", "embed")}
    section = FilterConfig(**how, dedupe=not settings.pop("keep_duplicates"))
    report = nearest_file(reading=reading_of(settings), **settings, section=section, mesh=encoder_mesh(settings), show=shown)
    means = [f"{side} {report['similarity'][side]['mean_kept']:.3f}" for side in ("chosen", "rejected")]
    drawn = [f"{report['similarity'][side]['mean_at_random']:.3f}" for side in ("chosen", "rejected")]
    print(f"{report['kept']} of {report['pairs']} pairs kept; mean similarity {', '.join(means)} (a random draw: {', '.join(drawn)})")
    print(f"pairs: {Path(options.output) / KEPT}\nreport: {Path(options.output) / 'filter_report.md'}")
    return 0
