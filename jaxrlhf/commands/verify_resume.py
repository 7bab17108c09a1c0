"""`jaxrlhf verify-resume`: whether every training of a recipe that is killed half-way goes on to the same bits."""

import argparse
import io
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from jaxrlhf import distributed
from jaxrlhf.commands import EPILOG
from jaxrlhf.commands.recipe_arguments import config_of
from jaxrlhf.config import Config
from jaxrlhf.distributed.launch import launch
from jaxrlhf.distributed.stops import Stopped, heard
from jaxrlhf.distributed.watchdog import say
from jaxrlhf.files import write_whole
from jaxrlhf.monitoring.metrics_file import FILE, read
from jaxrlhf.pipeline.run import run
from jaxrlhf.pipeline.stages.context import Loop, RunContext
from jaxrlhf.pipeline.stages.divergence import Fed
from jaxrlhf.recipe import ConfigError, arms, load_config, to_yaml
from jaxrlhf.storage.record import hash_of
from jaxrlhf.types import TrainState

KILLED = 128 + signal.SIGKILL  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `jaxrlhf verify-resume`, without the keys of the config."""
    parser.description = (
        "Train every model of the recipe for a few steps: once in one go, and once in processes that are killed (SIGKILL) behind a "
        "checkpoint half-way and started again. Models and metrics must be the same bits."
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
    try:
        with heard():
            return _verify(config, options)
    except Stopped as stop:
        say(f"{stop.signal}: stopped. Nothing is kept: the same command begins anew")
        return stop.code


def _verify(config: Config, options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="jaxrlhf-verify-") as folder:
        place = Path(folder)
        for part in ("whole", "halves"):
            for n, one in enumerate(arms(config).values()):
                few = shortened(replace(one, output=str(place / part)), options.steps)
                write_whole(place / part / f"{n:03d}.yaml", to_yaml(few))
        say(f"{options.steps} steps of every training, in one go")
        _run(options, place / "whole", (0,))
        say("now with each training killed half-way")
        while _run(options, place / "halves", (0, KILLED)):
            say("killed, and started again")
        found = list(verdicts(place))
    for _, line in found:
        print(line)
    return 0 if all(same for same, _ in found) else 1


def _run(options: argparse.Namespace, part: Path, expected: tuple[int, ...]) -> int:
    """One attempt; its exit status.

    Raises Stopped where it was told to stop, and RuntimeError with its last words for a status that is not `expected`. One that is killed
    leaves a note of it: without a new one something else has killed it, and would again.
    """
    notes = len(list(part.glob("*.killed")))
    command = [sys.executable, "-m", "jaxrlhf.cli", "verify-resume", options.recipe, "--part", str(part)]
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        status = launch(command, options.processes, options.devices)
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Stopped(status - 128)
    if status not in expected or (status == KILLED and len(list(part.glob("*.killed"))) == notes):
        raise RuntimeError(f"a process that was to train ended with exit status {status}:\n{said.getvalue()[-3000:]}")
    return status


def _train(part: Path) -> int:
    """A process: what is left of every arm's run in `part`."""
    distributed.start()
    for recipe in sorted(part.glob("*.yaml")):
        run(load_config(recipe), context=partial(Killed, notes=part) if part.name == "halves" else RunContext)
    distributed.finish()
    return 0


def shortened(config: Config, steps: int) -> Config:
    """The recipe with so few steps of each training, at most two rounds, and no more pairs and prompts than those need."""

    def fewer(section: Any) -> Any:
        most = steps if section.max_steps is None else min(steps, section.max_steps)
        looks = None if section.eval_steps is None else min(section.eval_steps, steps // 2)
        return replace(section, max_steps=most, warmup_steps=min(section.warmup_steps, max(most - 1, 0)), eval_steps=looks)

    ppo, pairs, sampled = config.ppo, config.pairs, config.pairs.source == "sample"
    critic = min(ppo.critic_warmup_updates, steps - 1)
    warmup = min(ppo.warmup_steps, (steps - critic) * ppo.num_ppo_epochs * ppo.num_mini_batches - 1)
    num_pairs = min(pairs.num_pairs, max(256, steps * max(config.reward.batch_size, config.dpo.batch_size)))
    return replace(
        config,
        rounds=min(config.rounds, 2),
        store=None,
        standalone=False,
        sft=fewer(config.sft),
        reward=replace(fewer(config.reward), num_reference_rows=min(config.reward.num_reference_rows or 64, 64)),
        dpo=fewer(config.dpo),
        ppo=replace(ppo, total_episodes=steps * ppo.batch_size, critic_warmup_updates=critic, warmup_steps=warmup),
        pairs=replace(pairs, num_pairs=num_pairs, num_valid=min(pairs.num_valid, 64)),
        filter=replace(config.filter, n=min(config.filter.n, num_pairs // 2)) if sampled and config.filter.n else config.filter,
        evaluation=replace(config.evaluation, num_prompts=min(config.evaluation.num_prompts, 32)),
        checkpoint=replace(config.checkpoint, minutes=None, every=steps // 2),
        log=replace(config.log, tensorboard=False, wandb=None),
    )


@dataclass
class Killed(RunContext):
    """A run of which every training is killed once, behind its first checkpoint; `notes` is a folder that says which were."""

    notes: Path = Path()

    def train(self, folder: Path, name: str, state: TrainState, loop: Loop, fed: Fed, *, steps: int, **how: Any) -> TrainState:
        half, note = self.config.checkpoint.every or 0, self.notes / f"{self.store.shared(folder).name}.killed"

        def killed(state: TrainState, batches: Iterator) -> Iterator:
            start = int(state.step)
            if note.exists() and start < half:
                raise RuntimeError(f"{name} went on from step {start}, not from its checkpoint of step {half}")
            for n, one in enumerate(loop(state, batches), start=start + 1):
                yield one  # where the loop comes back, its checkpoint is on the way to the disk
                if n == half < steps and not note.exists():
                    die(Path(self.store.state(folder), str(n)), note)

        return super().train(folder, name, state, killed, fed, steps=steps, **how)


def die(checkpoint: Path, note: Path) -> None:
    """End the leader as a power cut would, once the checkpoint is there; the others of its group end with it."""
    while not checkpoint.exists():
        time.sleep(0.05)
    if distributed.is_leader():
        note.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def verdicts(place: Path) -> Iterator[tuple[bool, str]]:
    """(the same, in words) for every model of the runs in `place`/whole against that of `place`/halves, whose training was killed."""
    stages = {
        hash_of(path): path for path in sorted((place / "whole").glob("*/stages/*"), reverse=True)
    }  # the first of those that arms share
    for whole in sorted(path for path in stages.values() if list(path.glob("*.safetensors"))):
        halves = place / "halves" / whole.relative_to(place / "whole")
        a, b = ({name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()} for folder in (whole, halves))
        lines, others = ([without_times(line) for line in read(folder / FILE)] for folder in (whole, halves))
        found = first_difference(a, b)
        if found is None and lines != others:
            found = "metrics {} against {}".format(*next(pair for pair in zip_longest(lines, others) if pair[0] != pair[1]))
        said = "equal" if found is None else f"DIFFERENT: {found}"
        title = f"{whole.parents[1].name}, {whole.name.partition('-')[2]}"
        yield found is None, f"{title}: {lines[-1]['step'] if lines else 0} steps, {len(a)} tensors, {said}"


def without_times(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith("time/")}


def first_difference(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> str | None:
    """The first tensor that is not the same bits, and how far apart the two are; None where all are equal."""
    for name in sorted({*a, *b}):
        if name not in a or name not in b or a[name].dtype != b[name].dtype or a[name].shape != b[name].shape:
            return f"{name} has another shape or type, or is in one of them only"
        if a[name].tobytes() != b[name].tobytes():
            return f"{name}: largest difference {np.abs(a[name].astype(np.float64) - b[name].astype(np.float64)).max():.3g}"
    return None
