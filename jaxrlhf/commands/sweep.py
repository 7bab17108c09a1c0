"""`jaxrlhf sweep`: run every arm of a recipe with every seed, and print one table."""

import argparse
import sys

from jaxrlhf.commands import EPILOG, add_changing_arguments
from jaxrlhf.commands.recipe_arguments import config_of
from jaxrlhf.distributed.stops import heard


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `jaxrlhf sweep`, without the keys of the config."""
    parser.description = (
        "Run every arm of a recipe with every seed, print one table and write the report. The same command resumes a stopped sweep. "
        "Exit status 1 where a run failed: its error.txt says why; the others are run all the same."
    )
    parser.epilog = f"{EPILOG}; --output FOLDER is where runs go (runs by default)."
    parser.add_argument("--seeds", default="", help="5: the seeds 0 to 4; 3,5,9: these three")
    add_changing_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """Run the sweep, print its table and its failures; 1 where a run failed."""
    config = config_of(options.command, options.recipe, options.overrides)
    from jaxrlhf.commands.report import write_report
    from jaxrlhf.pipeline.foresight import check_read
    from jaxrlhf.sweep.sweep import dry_run, failure_lines, read_sweep, seeds_of, sweep  # here: --help and a wrong recipe need no models
    from jaxrlhf.sweep.table import show

    check_read(options.recipe, config)
    if options.dry_run:
        print(dry_run(config, seeds_of(options.seeds)))
        return 0
    with heard():
        folder = sweep(config, seeds_of(options.seeds), replace=options.replace)
        page = write_report(folder)
    done = read_sweep(folder)
    show(done)
    print(f"sweep folder: {folder}")
    if page:
        print(f"report: {page}")
    for line in failure_lines(done):
        print(f"jaxrlhf: {line}", file=sys.stderr)
    return 1 if failure_lines(done) else 0
