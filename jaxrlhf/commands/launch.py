"""`jaxrlhf launch`: several processes of one run on this machine."""

import argparse
import shlex
import shutil
import sys

from jaxrlhf.commands import RUN_COMMANDS
from jaxrlhf.distributed.launch import GRACE, launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `jaxrlhf launch`."""
    parser.allow_abbrev = False
    parser.description = "Start several processes of one run on this machine, show the output of the first, and end them together."
    parser.epilog = "On a cluster its own starter does this (srun, gcloud … --worker=all, a Kubernetes Job): see docs/scaling.md."
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument(
        "--devices_per_process", type=int, help="GPUs of each process, in order; without GPUs the number of simulated CPU devices"
    )
    parser.add_argument("--grace", type=float, default=GRACE, help="seconds that the others have to end by themselves after the first")
    parser.add_argument("command", nargs=argparse.REMAINDER, help=f"{' | '.join(RUN_COMMANDS)} CONFIG.yaml [--section.key value …]")


def main(options: argparse.Namespace) -> int:
    """Launch as the command line says; 0 where all processes end well, else the status of the first that did not."""
    if not options.command or options.command[0] not in RUN_COMMANDS:
        said = options.command[0] if options.command else "nothing"
        raise ValueError(f"jaxrlhf launch … {said}: give one of {', '.join(RUN_COMMANDS)} CONFIG.yaml.")
    if options.processes < 1 or (options.devices_per_process is not None and options.devices_per_process < 1):
        raise ValueError(
            f"--processes {options.processes} and --devices_per_process {options.devices_per_process}: both are at least 1 "
            "(the second may be left out)."
        )
    if options.processes > 1 and options.devices_per_process is None and shutil.which("nvidia-smi"):
        raise ValueError(
            f"--processes {options.processes} on a machine with GPUs: each process would take all of them; give --devices_per_process."
        )
    command = [sys.executable, "-m", "jaxrlhf.cli", *options.command]
    again = shlex.join(["jaxrlhf", *sys.argv[1:]])
    return launch(command, options.processes, options.devices_per_process, grace=options.grace, again=again)
