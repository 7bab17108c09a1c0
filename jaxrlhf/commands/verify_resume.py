"""`jaxrlhf verify-resume`: whether every training of a recipe that is killed half-way goes on to the same bits."""

import argparse
import io
import signal
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

from jaxrlhf import distributed
from jaxrlhf.commands import EPILOG
from jaxrlhf.commands.recipe_arguments import config_of
from jaxrlhf.distributed.launch import launch
from jaxrlhf.distributed.watchdog import say
from jaxrlhf.files import write_whole
from jaxrlhf.formatting import format_duration
from jaxrlhf.pipeline.run import run
from jaxrlhf.pipeline.verification import Verified, shortened, verdicts
from jaxrlhf.recipe import ConfigError, arms, load_config, to_yaml

START = 15.0  # seconds that a process needs until it trains again, for the estimate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `jaxrlhf verify-resume`, without the keys of the config."""
    parser.description = (
        "Train every model of the recipe for a few steps: once in one go, and once in processes that are killed (SIGKILL) behind a "
        "checkpoint half-way and started again. Parameters, optimizer, controller and metrics must be the same bits."
    )
    parser.epilog = f"{EPILOG}. At most two rounds are run, on fewer pairs and prompts."
    parser.add_argument("--steps", type=int, default=4, help="of each training (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="that work as one")
    parser.add_argument("--devices", type=int, help="of each process: GPUs in order; without GPUs simulated CPU devices")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # a process that trains: the folder it works in


def main(options: argparse.Namespace) -> int:
    """Verify every arm of the recipe, a line for every training; 0 where all are the same, 1 where one is not."""
    if options.part is not None:
        return _train(Path(options.part))
    if options.steps < 2 or options.processes < 1 or (options.devices or 1) < 1:
        raise ConfigError(f"--steps {options.steps} must be at least 2, --processes and --devices at least 1.")
    config = config_of(options.command, options.recipe, options.overrides)
    with tempfile.TemporaryDirectory(prefix="jaxrlhf-verify-") as folder:
        place, began = Path(folder), time.monotonic()
        for part in ("whole", "halves"):
            for n, one in enumerate(arms(config).values()):
                few = shortened(replace(one, output=str(place / part)), options.steps)
                write_whole(place / part / f"{n:03d}.yaml", to_yaml(few))
        say(f"{options.steps} steps of every training, in one go")
        _run(options, place / "whole", (0,))
        trainings, took = len(list((place / "whole").glob("*.json"))), time.monotonic() - began
        more = format_duration(took + START * trainings)
        say(f"{format_duration(took)}; now with {trainings} trainings killed half-way: about {more} more")
        while _run(options, place / "halves", (0, 128 + signal.SIGKILL)):
            say("killed, and started again")
        found = list(verdicts(place, options.steps // 2))
    for _, line in found:
        print(line)
    return 0 if all(same for same, _ in found) else 1


def _run(options: argparse.Namespace, part: Path, expected: tuple[int, ...]) -> int:
    """One attempt; its exit status. Raises RuntimeError with its last words for one that is not `expected`."""
    command = [sys.executable, "-m", "jaxrlhf.cli", "verify-resume", options.recipe, "--part", str(part)]
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        status = launch(command, options.processes, options.devices)
    if status not in expected:
        raise RuntimeError(f"a process that was to train ended with exit status {status}:\n{said.getvalue()[-3000:]}")
    return status


def _train(part: Path) -> int:
    """A process: what is left of every arm's run in `part`."""
    distributed.start()
    for recipe in sorted(part.glob("*.yaml")):
        run(load_config(recipe), context=partial(Verified, part=part))
    distributed.finish()
    return 0
