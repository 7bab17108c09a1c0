"""`jaxrlhf preflight`: what a recipe would run into, on its own model, data and functions."""

import argparse

from rich.console import Console

from jaxrlhf.commands import EPILOG
from jaxrlhf.commands.evaluate import add_judge_arguments, judge_of
from jaxrlhf.commands.recipe_arguments import config_of
from jaxrlhf.sharding.compile_cache import cache_compilations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `jaxrlhf preflight`, without the keys of the config."""
    parser.description = (
        "Look at a recipe before a long run: every step traced, and real passes, gradients and samples of a few rows, on its own models, "
        "data and functions. Nothing is trained or stored. One line a check: green, yellow, red. The exit status is 1 where one is red."
    )
    parser.epilog = f"{EPILOG}."
    add_judge_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """Run the checks and print each as it is done."""
    config, judge = config_of(options.command, options.recipe, options.overrides), judge_of(options)
    from jaxrlhf.preflight.looks import preflight
    from jaxrlhf.preflight.screen import RED, shown

    cache_compilations()
    return int(any(one.colour == RED for one in shown(preflight(config, judge), Console(highlight=False))))
