"""All stages of a run, in order, into a run folder."""

from collections.abc import Callable
from pathlib import Path

from jaxrlhf import distributed, sharding
from jaxrlhf.config import Config
from jaxrlhf.files import write_whole
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.pipeline.checks import check, check_same
from jaxrlhf.pipeline.foresight import check_ours, check_read, forecast, is_kept, prepare
from jaxrlhf.pipeline.loop import walk_through
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.recipe import arms, load_config, to_yaml
from jaxrlhf.sharding.compile_cache import cache_compilations
from jaxrlhf.storage.remote_store import store_of
from jaxrlhf.storage.run_folder import check_places, folder_of, open_run, publish

UNTIL = ("sft", "reward", "ppo")  # where a single-stage command stops; the latter two in round 1


def run(
    config: Config | str | Path,
    *,
    until: str | None = None,
    log: RunLog | None = None,
    replace: bool = False,
    context: Callable[..., RunContext] = RunContext,
) -> Path:
    """Run a config (or the recipe at a path), or all its arms one after the other; the run folder.

    Finished stages are found again by what they depend on: a run that was stopped goes on from its last finished stage, inside that
    stage from its last checkpoint, and arms share what they have in common. `until`: stop after "sft", or after "reward" or "ppo" of
    round 1. `context` makes what the stages are given. Raises ConfigError, DataError and the like before anything is compiled where the
    config or the data cannot work, and where the run folder holds files of another origin, or results of another recipe that are not to be
    replaced (`replace`).

    Of several processes that work as one (`jaxrlhf.distributed.group.start`) all call it with the same arguments; one writes and logs.
    """
    if not isinstance(config, Config):
        path, config = config, load_config(config)
        check_read(path, config)
    cache_compilations()
    if until is not None and until not in UNTIL:
        raise ValueError(f"until {until!r} is none of {', '.join(UNTIL)}.")
    for one in arms(config).values():
        check(one)
    check_same(config)
    check_places(config)
    folder, leads = folder_of(config), distributed.is_leader()
    for one in (config, *arms(config).values()) if leads else ():
        check_ours(one)
    notes = prepare(arms(config), replace=replace, until=until) if leads else {}
    if config.arms:
        open_run(config)
        if leads:
            write_whole(folder / "config.yaml", to_yaml(config))
    for name, one in arms(config).items():
        _run_one(one, until, log, notes.get(name, []), context)
    return folder


def dry_run(config: Config, until: str | None = None) -> str:
    """What `run` would do, checked as it checks: for each arm which stages are there and which are to be built. Nothing is written.

    Of several processes all call it, for they try a gold function together; the text is the leader's.
    """
    for one in arms(config).values():
        check(one)
    if not distributed.is_leader():
        return ""
    for one in (config, *arms(config).values()):
        check_ours(one)
    return "\n".join(forecast(one, until) for one in arms(config).values())


def _run_one(config: Config, until: str | None, log: RunLog | None, notes: list[str], context: Callable[..., RunContext]) -> None:
    folder, leads = folder_of(config), distributed.is_leader()
    open_run(config)
    if leads and not is_kept(config, until):
        write_whole(folder / "config.yaml", to_yaml(config))
    store = store_of(config)
    mesh = sharding.mesh_of(config.mesh)
    wandb = {"project": config.log.wandb, "name": config.name} if config.log.wandb else None
    own = log or RunLog(folder if leads else None, tensorboard=config.log.tensorboard, wandb=wandb)
    for note in notes:
        own.note(note)
    try:
        run = context(config, store, folder, own, mesh)
        walk_through(run, until)
        if until is None:
            run.tidy(metrics=log is None)  # a log that was given may hold other runs
    finally:
        if log is None:
            own.close()
    if leads:
        publish(folder)
