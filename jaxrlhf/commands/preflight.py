"""`jaxrlhf preflight`: what a recipe would run into, on its own model, data and functions."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from jaxrlhf.commands import EPILOG
from jaxrlhf.commands.evaluate import add_judge_arguments, judge_of
from jaxrlhf.commands.recipe_arguments import config_of
from jaxrlhf.files import write_whole
from jaxrlhf.sharding.compile_cache import cache_compilations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `jaxrlhf preflight`, without the keys of the config."""
    parser.description = (
        "Look at a recipe before a long run: every step traced, and real passes, gradients and samples of a few rows, on its own models, "
        "data and functions. Nothing is trained or stored. One line a check: green, yellow, red. The exit status is 1 where one is red."
    )
    parser.epilog = f"{EPILOG}."
    parser.add_argument("--json", metavar="FILE", help="write all checks here, with their seconds")
    add_judge_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """Run the checks, print each as it is done, write the file that was asked for."""
    config, judge = config_of(options.command, options.recipe, options.overrides), judge_of(options)
    if options.json and not Path(options.json).parent.is_dir():
        raise ValueError(f"--json {options.json}: the folder {Path(options.json).parent} does not exist; make it first.")
    from jaxrlhf.preflight.looks import preflight
    from jaxrlhf.preflight.screen import RED, Screen, as_json

    cache_compilations()
    screen = Screen(Console(highlight=False))
    checks = preflight(config, judge=judge, shown=screen.line, console=Console(file=sys.stderr))
    screen.summary(checks)
    if options.json:
        write_whole(Path(options.json), as_json(checks))
    return int(any(one.colour == RED for one in checks))
