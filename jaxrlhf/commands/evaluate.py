"""`jaxrlhf evaluate`: compare two candidates on the same prompts, by a gold reward or a judge."""

import argparse
import json
from pathlib import Path

from jaxrlhf.commands.recipe_arguments import add_reading_arguments
from jaxrlhf.comparison.candidates import REFERENCE
from jaxrlhf.comparison.compare import evaluate, show
from jaxrlhf.comparison.figures import MEASURES, TABLE
from jaxrlhf.comparison.judge_client import TEMPLATE, Judge
from jaxrlhf.comparison.responses import GenerationSettings
from jaxrlhf.sharding.compile_cache import cache_compilations

# Options that are arguments of `evaluate`, and with --judge_ before them fields of Judge.
COMPARISON_OPTIONS = ("gold", "prompts", "limit", "max_new_tokens", "max_prompt_length", "temperature", "batch_size", "dtype", "seed",
                      "length", "bins", "tokenizer", "implicit_prompt", "template_date", "overwrite")  # fmt: skip
JUDGE_OPTIONS = ("base_url", "concurrency", "timeout", "attempts", "asks", "keep_going", "price_in", "price_out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `jaxrlhf evaluate`."""
    parser.description = (
        "Compare two policies, or a policy with reference or stored responses, on the same prompts: win rates by gold, a judge or both."
    )
    side = "a policy folder or hub id; a file or evaluation stage of stored responses; or the word reference"
    parser.add_argument("a", help=side)
    parser.add_argument("b", nargs="?", default=REFERENCE, help=f"{side} (default)")
    parser.add_argument("--output", help="folder for the comparison (default: comparisons/A-against-B)")
    parser.add_argument("--overwrite", action="store_true", help="replace a comparison that was made with other settings")
    group = parser.add_argument_group("prompts", "default: those of the stored responses")
    group.add_argument("--prompts", help="JSONL(.gz) or Parquet with a prompt field, or an evaluation stage of a run")
    group.add_argument("--toy", type=int, metavar="N", help="N evaluation prompts of the built-in task")
    group.add_argument("--limit", type=int, help="read at most this many prompts")
    group.add_argument("--tokenizer", help="a folder whose chat template renders conversations (default: that of the first policy)")
    add_reading_arguments(group)
    group = parser.add_argument_group("policies")
    group.add_argument("--max_new_tokens", type=int, help="for both sides (default: what their stages say, else 128)")
    group.add_argument("--max_prompt_length", type=int, default=GenerationSettings.max_prompt_length)
    group.add_argument("--temperature", type=float, default=GenerationSettings.temperature, help="0 is greedy")
    group.add_argument("--batch_size", type=int, default=GenerationSettings.batch_size)
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="of policies and gold (default: the policies' own; gold float32)")
    group.add_argument("--seed", type=int, default=0, help="of toy prompts and of sampling")
    group = parser.add_argument_group("figures")
    group.add_argument("--gold", help="toy, a reward model's folder, or module:attribute")
    group.add_argument("--length", choices=tuple(MEASURES), default="characters", help="what the length of a response counts")
    group.add_argument("--bins", type=int, default=5, help="of the breakdown by length")
    add_judge_arguments(parser)


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("judge", "any endpoint of OpenAI's chat completions; the key comes from the environment only")
    group.add_argument("--judge", metavar="MODEL", help="the judge's name at its endpoint")
    group.add_argument("--judge_base_url", help="its address, such as http://localhost:8000/v1 (default: OpenAI's)")
    group.add_argument("--api_key_env", default=Judge.api_key_env, help="the variable that holds the key (default: %(default)s)")
    group.add_argument("--judge_template", help="the question: a file, or text with {prompt}, {first} and {second}")
    group.add_argument("--judge_request", default="{}", metavar="JSON", help="fields of a request to add, or with null to leave out")
    group.add_argument("--judge_concurrency", type=int, default=Judge.concurrency, help="requests at a time")
    group.add_argument("--judge_timeout", type=float, default=Judge.timeout, help="seconds a request may take")
    group.add_argument("--judge_attempts", type=int, default=Judge.attempts, help="of one request, while the endpoint is busy or broken")
    group.add_argument("--judge_asks", type=int, default=Judge.asks, help="of one question, while the answer is none of A, B and tie")
    group.add_argument("--judge_keep_going", action="store_true", help="go on however many questions get no answer")
    group.add_argument("--judge_price_in", type=float, help="price of a million tokens; with --judge_price_out the cost is printed")
    group.add_argument("--judge_price_out", type=float)


def judge_of(options: argparse.Namespace) -> Judge | None:
    """The judge that the command line names. Raises ValueError for a request that is no JSON object."""
    if options.judge is None:
        return None
    try:
        request = json.loads(options.judge_request)
        json.dumps(request, allow_nan=False)  # which NaN and Infinity are not, though Python reads them
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--judge_request is not JSON ({error}); write it as '{{\"max_tokens\": 64}}'.") from error
    if not isinstance(request, dict):
        raise ValueError("--judge_request must be a JSON object, such as '{\"max_tokens\": 64}'.")
    given = options.judge_template
    template = TEMPLATE if given is None else given
    if given is not None and "{prompt}" not in given:
        template = Path(given).expanduser().read_text(encoding="utf-8")
    return Judge(
        model=options.judge,
        api_key_env=options.api_key_env,
        template=template,
        request=request,
        **{name: getattr(options, f"judge_{name}") for name in JUDGE_OPTIONS},
    )


def default_output(a: str, b: str) -> Path:
    """comparisons/A-against-B, by the last two parts of either name: a run and its stage."""
    names = ["-".join(part for part in Path(side).parts[-3:] if part not in ("stages", "/", ".", "..")) for side in (a, b)]
    return Path("comparisons") / "-against-".join(names)


def main(options: argparse.Namespace) -> int:
    """Compare as the command line says, show progress, and print the tables and where they lie."""
    cache_compilations()
    folder = Path(options.output) if options.output else default_output(options.a, options.b)
    same = {name: getattr(options, name) for name in COMPARISON_OPTIONS}
    done = evaluate(options.a, options.b, output=folder, judge=judge_of(options), toy_prompts=options.toy, **same)
    show(done.figures)
    print(f"comparison: {folder / TABLE}")
    return 0
