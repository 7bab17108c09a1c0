"""Every arm of a recipe at every seed, one after the other, and one table of them all."""

import json
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace as changed
from pathlib import Path
from typing import NamedTuple

from jaxrlhf import distributed
from jaxrlhf.config import Config
from jaxrlhf.evaluation.guards import stopping
from jaxrlhf.files import DamagedFile, read_json, write_whole
from jaxrlhf.formatting import format_duration, with_numbers
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.pipeline.checks import check
from jaxrlhf.pipeline.foresight import check_ours, check_read, finished_here, forecast, foresee, prepare
from jaxrlhf.pipeline.run import run
from jaxrlhf.recipe import ConfigError, arms, load_config, to_yaml
from jaxrlhf.report.costs import seconds_of
from jaxrlhf.storage.remote import is_url
from jaxrlhf.storage.run_folder import folder_of
from jaxrlhf.sweep.arms import arm_facts
from jaxrlhf.sweep.statistics import Run, Sweep
from jaxrlhf.sweep.table import as_json, as_markdown

TABLE, PAGE, ERROR = "sweep.json", "sweep.md", "error.txt"


class Job(NamedTuple):
    """One run of a sweep."""

    seed: int
    arm: str
    config: Config


def seeds_of(text: str) -> tuple[int, ...]:
    """`5` means the seeds 0 … 4; `3,5,9` means these, and `7,` means 7 alone. Raises ConfigError for anything else."""
    if not text:
        raise ConfigError("a sweep needs its seeds: --seeds 5 (the seeds 0 to 4) or --seeds 3,5,9 (these).")
    words = [word.strip() for word in text.split(",")]
    listed = len(words) > 1
    words = [word for word in words if word] if listed else words
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"--seeds {text!r} is neither how many (5: the seeds 0 to 4) nor a list of whole numbers (3,5,9).")
    numbers = tuple(int(word) for word in words)
    if listed and len(set(numbers)) < len(numbers):
        raise ConfigError(f"--seeds {text!r} names a seed twice.")
    if not listed and numbers[0] < 1:
        raise ConfigError("--seeds 0 runs nothing; give how many (5: the seeds 0 to 4), or `0,` for seed 0 alone.")
    return numbers if listed else tuple(range(numbers[0]))


def jobs_of(config: Config, seeds: Iterable[int]) -> list[Job]:
    """Every arm at every seed, seed by seed: whole comparisons are there early. A recipe without arms is one arm, named by its method."""
    jobs = []
    for seed in seeds:
        one = of_seed(config, seed)
        if config.arms:
            jobs += [Job(seed, name, arm) for name, arm in arms(one).items()]
        else:
            jobs.append(Job(seed, config.method, changed(one, name=f"{one.name}/{config.method.replace(':', '.')}")))
    return jobs


def of_seed(config: Config, seed: int) -> Config:
    return changed(config, seed=seed, name=f"{config.name}/seed-{seed}")


def sweep(config: Config | str | Path, seeds: Sequence[int], *, log: RunLog | None = None, replace: bool = False) -> Path:
    """Run every arm of a config (or of the recipe at a path) at every seed; the folder with sweep.json, sweep.md and figures/.

    All configs are checked before anything starts. Stages are shared by what they depend on, so what arms and seeds have in common is built
    once. A run that fails is recorded and the others go on: see "runs" of sweep.json. The table is rewritten after every run, and a sweep
    that was stopped goes on when it is called again: finished runs are recognised by their stages, without reading a model. One that would
    replace results of another recipe is refused, unless it is told to `replace` them.
    """
    config, jobs = checked(config, seeds)
    prepare({job.config.name: job.config for job in jobs}, replace=replace)
    folder = folder_of(config)
    write_whole(folder / "config.yaml", to_yaml(config))
    for seed in seeds if config.arms else ():
        write_whole(folder / f"seed-{seed}" / "config.yaml", to_yaml(of_seed(config, seed)))
    _run_all(config, jobs, folder, log)
    return folder


def dry_run(config: Config, seeds: Sequence[int]) -> str:
    """What `sweep` would do: of each run which stages are there, and which it would build if it ran alone. Nothing is written."""
    return "\n".join(forecast(job.config) for job in checked(config, seeds)[1])


def checked(config: Config | str | Path, seeds: Sequence[int]) -> tuple[Config, list[Job]]:
    """The config of a sweep and its runs. ConfigError and the like where one of them cannot work, or would write over foreign files."""
    if not isinstance(config, Config):
        path, config = config, load_config(config)
        check_read(path, config)
    if distributed.count() > 1:
        raise ConfigError(f"a sweep is one process, and this is one of {distributed.count()}; let them share its runs instead.")
    jobs = jobs_of(config, tuple(seeds))
    if not jobs:
        raise ConfigError("a sweep needs at least one seed.")
    for name, place in (("output", config.output), ("store", config.store)):
        if is_url(place):
            raise ConfigError(f"{name} is {place}: a sweep keeps its runs on this machine; give a folder, or run the arms one by one.")
    own = [name for name, changes in config.arms.items() if "seed" in changes]
    if own:
        raise ConfigError(f"arms.{own[0]} sets seed, so the seeds of a sweep would not reach it; take it out of the arm.")
    for job in jobs:
        check(job.config)
    for one in (config, *(job.config for job in jobs)):
        check_ours(one)
    return config, jobs


def _run_all(config: Config, jobs: list[Job], folder: Path, log: RunLog | None) -> None:
    say = (log or RunLog(folder)).note
    runs = {(job.seed, job.arm): read_finished(job) or Run(job.seed, job.arm, "pending") for job in jobs}
    todo = [job for job in jobs if runs[job.seed, job.arm].state == "pending"]
    names = list(dict.fromkeys(job.arm for job in jobs))
    before = f", {len(jobs) - len(todo)} of them finished before" if len(todo) < len(jobs) else ""
    say(f"sweep {config.name}: runs {len(jobs)} (arms {len(names)} × seeds {len(jobs) // len(names)}){before}, in {folder}")
    settings = {name: arm_facts(next(job.config for job in jobs if job.arm == name)) for name in names}

    def rewrite() -> None:
        write_table(Sweep(config.name, config.sft_seed, settings, tuple(runs.values())), folder)

    rewrite()
    taken: list[tuple[str, float]] = []
    for n, job in enumerate(todo, start=1):
        left = seconds_left(taken, [one.arm for one in todo[n - 1 :]])
        say(f"sweep: run {n} of {len(todo)}, seed {job.seed}, {job.arm}{'' if left is None else f'; about {format_duration(left)} left'}")
        started = time.monotonic()
        done = runs[job.seed, job.arm] = run_one(job, log)
        taken.append((job.arm, time.monotonic() - started))
        if done.error:
            say(f"sweep: seed {job.seed}, {job.arm} failed: {done.error}\nsweep: the other runs go on")
        rewrite()


def run_one(job: Job, log: RunLog | None) -> Run:
    """The run, and what came of it. An exception is kept with its traceback in error.txt of the run's folder."""
    folder = folder_of(job.config)
    try:
        run(job.config, log=log)
        (folder / ERROR).unlink(missing_ok=True)
        done = read_finished(job)
        if done is None:
            raise RuntimeError(f"a stage of {folder} vanished right after it was finished; is something else cleaning up?")
        return done
    except Exception as error:
        write_whole(folder / ERROR, "".join(traceback.format_exception(error)))
        return Run(job.seed, job.arm, "failed", error=f"{type(error).__name__}: {error}", folder=str(folder))


def read_finished(job: Job) -> Run | None:
    """What a run came to, if all its stages are finished: found by going through them as the run does, building none and loading no model.

    A marker in the run's folder would be quicker and could lie: data, plug-ins and models named by the config may have changed.
    """
    folder = folder_of(job.config)
    written = folder / "config.yaml"
    if not written.exists() or written.read_bytes() != to_yaml(job.config).encode():
        return None
    found = foresee(job.config)
    linked = {name: hash for name, (hash, _) in finished_here(job.config).items()}
    try:
        summary = read_json(folder / "summary.json", "it is written again")
        rounds, notes, spoke, finished = (summary[name] for name in ("rounds", "notes", "guards", "finished"))
    except (FileNotFoundError, DamagedFile, KeyError):
        return None
    whole = found.undecided is None and all(done.cached for done in found.stages) and finished and not stopping(job.config.guards, spoke)
    if not whole or linked != {done.name: done.hash for done in found.stages}:
        return None
    fits = sum(done.record["function"] == "reward" for done in found.stages)
    seconds = seconds_of(done.record for done in found.stages)
    notes = (*notes, *(f"guard {one['name']} spoke; summary.json of the run says why." for one in spoke))
    return Run(job.seed, job.arm, "finished", rounds, notes, fits, seconds, folder=str(folder))


def read_sweep(folder: Path) -> Sweep:
    """The sweep of a folder, as its sweep.json has it."""
    body = json.loads((folder / TABLE).read_text(encoding="utf-8"), object_hook=with_numbers)
    runs = tuple(Run(**{name: run[name] for name in Run.__dataclass_fields__}) for run in body["runs"])
    return Sweep(body["name"], body["sft_seed"], {arm: facts["setting"] for arm, facts in body["arms"].items()}, runs)


def failure_lines(done: Sweep) -> list[str]:
    """What failed, and what to do; nothing where all runs are finished."""
    failed = [run for run in done.runs if run.state == "failed"]
    if not failed:
        return []
    lines = [f"seed {run.seed}, {run.arm}: {run.error} (traceback: {run.folder}/{ERROR})" for run in failed]
    said = f"runs that failed: {len(failed)} of {len(done.runs)}; when the cause is removed, the same command runs these and no others:"
    return [said, *lines]


def write_table(state: Sweep, folder: Path) -> None:
    """sweep.json and sweep.md, each whole or as it was."""
    write_whole(folder / TABLE, json.dumps(as_json(state), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(folder / PAGE, as_markdown(state))


def seconds_left(taken: Sequence[tuple[str, float]], arms_left: Sequence[str]) -> float | None:
    """How long the rest will take, from the (arm, seconds) of the runs before; None before the second run has ended.

    A run takes as long as its arm did before, else the mean of all runs but the first, which trains what the others share and compiles.
    """
    if len(taken) < 2:
        return None
    known = dict(taken)
    usual = sum(seconds for _, seconds in taken[1:]) / (len(taken) - 1)
    return sum(known.get(arm, usual) for arm in arms_left)
