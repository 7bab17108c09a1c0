"""`jaxrlhf run`, `sft`, `reward` and `ppo`: a run, or its first stages."""

import argparse
import logging

from jaxrlhf import distributed
from jaxrlhf.commands import add_changing_arguments
from jaxrlhf.distributed.cluster import requested_group
from jaxrlhf.distributed.launch import watched
from jaxrlhf.distributed.stops import heard


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How the processes of a run reach each other, and what a run may do; all other arguments, `--help` too, belong to the recipe."""
    parser.add_argument("--coordinator")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    add_changing_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """Run the recipe; print its table and the paths of its folder and report."""
    group = {name: getattr(options, name) for name in ("coordinator", "num_processes", "process_id")}
    if requested_group(**group) and (status := watched()) is not None:
        return status
    from jaxrlhf.commands.recipe_arguments import config_of

    config = config_of(options.command, options.recipe, options.overrides)
    distributed.start(**group)
    from jaxrlhf.commands.report import write_report
    from jaxrlhf.pipeline.foresight import check_read
    from jaxrlhf.pipeline.run import dry_run, run
    from jaxrlhf.pipeline.table import read_summaries, show
    from jaxrlhf.storage.remote import is_url, join

    if not distributed.is_leader():
        logging.getLogger().setLevel(logging.ERROR)  # the leader logs it
    until = None if options.command == "run" else options.command
    check_read(options.recipe, config)
    if options.dry_run:
        forecast = dry_run(config, until)
        if distributed.is_leader():
            print(forecast)
        distributed.finish()
        return 0
    with heard():
        folder = run(config, until=until, replace=options.replace)
        page = write_report(folder) if options.command == "run" and distributed.is_leader() else None
    if not distributed.is_leader():
        pass
    elif options.command == "run":
        show(read_summaries(folder))
        where = join(config.output, config.name) if is_url(config.output) else folder
        print(f"run folder: {where}")
        if page:
            print(f"report: {join(where, page.name) if is_url(where) else page}")
    else:
        for stage in sorted((folder / "stages").glob("*")) if not config.arms else sorted(folder.glob("*/stages/*")):
            print(stage)
    distributed.finish()
    return 0
