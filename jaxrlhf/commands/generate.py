"""`jaxrlhf generate`: sample from a policy folder."""

import argparse
import json
import sys

from jaxrlhf.commands.recipe_arguments import add_reading_arguments
from jaxrlhf.files import check_replaceable, write_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `jaxrlhf generate`."""
    parser.description = "Sample responses from a policy folder, one JSON object a line."
    parser.add_argument("folder", help="a Hugging Face model folder, such as a policy stage of a run")
    parser.add_argument("prompts", nargs="*", help="prompts as arguments; none and no --file: one prompt a line from standard input")
    parser.add_argument("--file", help="prompts from JSONL(.gz) or Parquet with a prompt field")
    add_reading_arguments(parser)
    parser.add_argument("--output", help="write JSON lines here instead of printing them")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--max_prompt_length", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--num_samples", type=int, default=1, help="responses to each prompt")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """Sample as the command line says; every response is printed, or written to a file that appears whole."""
    from jaxrlhf.rollouts.texts import generate_texts  # here: --help and a wrong option need no models
    from jaxrlhf.sharding.compile_cache import cache_compilations

    if options.output is not None:
        check_replaceable(options.output, '"finished": ')
    cache_compilations()
    settings = vars(options)
    rows = generate_texts(**{name: settings[name] for name in settings if name != "output"})
    escaped = options.output is None and "utf" not in (sys.stdout.encoding or "").lower()  # JSON stays what it is
    lines = (json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows)
    if options.output is None:
        sys.stdout.writelines(lines)
    else:
        write_lines(options.output, lines)
    return 0
