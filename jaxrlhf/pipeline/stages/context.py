"""What every stage of a run is given, and the driver that logs and checkpoints a training loop."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrlhf import distributed, rng, sharding
from jaxrlhf.algorithms.training import HeldOut
from jaxrlhf.config import Config
from jaxrlhf.data.batches import Table, batches
from jaxrlhf.data.read_report import ReadReport
from jaxrlhf.distributed.stops import Looks, Stopped
from jaxrlhf.evaluation.guards import Guards, line_figures
from jaxrlhf.models.hub import Loaded, load, save
from jaxrlhf.monitoring.recompiles import CompileWatch, ignore_compilations
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.pipeline.stages.divergence import SKIPPED, Diverged, Fed, FiniteWatch, check_result
from jaxrlhf.storage.blocks import NOWHERE, Blocks
from jaxrlhf.storage.checkpoint import Checkpoints
from jaxrlhf.storage.run_folder import publish
from jaxrlhf.storage.stage import Done, Stage
from jaxrlhf.storage.store import Store
from jaxrlhf.types import Metrics, Progress, TrainState

Loop = Callable[[TrainState, Iterator[Any]], Iterator[tuple[TrainState, Metrics]]]  # (state, batches on the host)


class RoundInputs(NamedTuple):
    """The finished stages that a round's policy may be made from."""

    sft: Done
    start: Done  # the policy it starts from
    reference: Done  # the policy that its KL or log-ratio is taken against
    previous: Done  # the policy of the round before, wherever this one starts
    pairs: Done
    rewards: tuple[Done, ...] = ()  # one reward model, or the members of the round's ensemble
    update: Done | None = None  # the reward update that chose or weighted the pairs


@dataclass
class RunContext:
    """One run: its config, where finished stages are kept, where it reports, the devices."""

    config: Config
    store: Store
    folder: Path
    log: RunLog
    mesh: Any
    stages: list[Done] = field(default_factory=list)
    logged: set[tuple[str, int | None]] = field(default_factory=set)  # (stage, round) of the lines in metrics.jsonl that are this run's
    skipped: dict[Path, int] = field(default_factory=dict)  # folder of a stage in work → the steps of its training that were left out
    blocks: Blocks = NOWHERE  # where the passes of the stage in work keep what they have computed
    guards: Guards = field(init=False)

    def __post_init__(self) -> None:
        self.guards = Guards(self.config.guards, self.log.note)
        self.log.seen = self._guard

    def _guard(self, line: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl to the guards."""
        figures, where = line_figures(line, self.config.ppo.batch_size), f"{line['stage']}, step {line['step']}"
        self.guards.see(figures, round=line["round"], where=where)

    @property
    def key(self) -> jax.Array:
        return rng.root_key(self.config.seed)

    @property
    def columns(self) -> Path:
        return self.store.root / "columns"

    def build(
        self, stage: Stage, fn: Callable[[Path], dict[str, Any] | None], *, round: int | None = None, keep_state: bool = False
    ) -> Done:
        """The finished stage, built if need be, linked into the run folder in the order of asking.

        With `keep_state` its last checkpoint stays in the folder, for a method that carries optimizer or critic into the next round;
        else the checkpoints go when all else is done: until then a stage that dies need not train again.
        """

        def whole(folder: Path) -> dict[str, Any] | None:
            result = fn(folder)
            check_result(stage.name, result)
            if skipped := self.skipped.pop(folder, 0):
                result = {**(result or {}), SKIPPED[0]: skipped}
            if keep_state:
                with Checkpoints(self.store.state(folder)) as checkpoints:
                    checkpoints.prune()
            return result

        name = stage.name.removeprefix(f"r{round}-")  # what it logs under
        self.logged.add((name, round))
        self.blocks = self.store.blocks(stage)
        done = self.store.build(stage, whole, keep_state=keep_state)
        self.blocks.remove()
        if done.cached:
            self.log.note(f"{stage.name}: finished before ({done.record['seconds']:.0f} s), taken from {done.place}")
            if done.metrics is not None:
                self.log.replay(done.metrics, name, round=round)
        if (said := kept_look(done)) is not None:
            self.log.note(f"note: {said}")
        self.store.link(done, self.folder, len(self.stages), standalone=self.config.standalone)
        self.stages.append(done)
        if distributed.is_leader():
            publish(self.folder)
        return done

    def saving(self, folder: Path) -> None:
        """What lies beside the training state that is about to be saved is as safe as that."""
        if distributed.is_leader():
            self.store.saving(folder)
            publish(self.folder)

    def watch(self) -> CompileWatch | None:
        """What notices compilations in the middle of a loop (log.recompiles)."""
        return None if self.config.log.recompiles == "off" else CompileWatch(self.config.log.recompiles, widths=self.config.data.bucket)

    def kept(self, what: str, *, round: int | None = None, tokens: int = 0) -> dict[str, Any]:
        """The blocks and the progress of a pass of the stage in work, as the passes over tables take them; `what` names it in the stage."""
        return {"blocks": self.blocks.of(what), "progress": self.progress(what, round=round, tokens=tokens)}

    def progress(self, what: str, *, round: int | None = None, tokens: int = 0) -> Progress:
        """What a pass over a table reports its batches (of so many `tokens`) to, from (0, total) on: shown, and not kept."""
        return self.log.progress(what, round=round, tokens=tokens, watch=self.watch)

    def report_rows(self, folder: Path, what: str, *reports: ReadReport) -> None:
        """Say what was dropped on the way, and write every dropped row beside the stage."""
        for kind, report in zip(("read", "tokenised"), reports, strict=False):
            file = f"dropped-{what}-{kind}.jsonl"
            if report.dropped or any(report.counts.values()):
                self.log.note(f"{what} {kind}: {report.summary(rest=f'{file} in the folder of the stage lists them all')}")
            if report.dropped:
                report.write(folder / file)

    def tidy(self, *, metrics: bool) -> None:
        """Remove what an earlier config of this name left in the run folder: links, and lines of metrics.jsonl. The leader does."""
        if not distributed.is_leader():
            return
        if metrics:
            self.log.keep_only(self.logged)
        current = {f"{number:02d}-{done.name}" for number, done in enumerate(self.stages)}
        for link in (self.folder / "stages").iterdir():
            if link.is_symlink() and link.name not in current:
                link.unlink()

    @property
    def model_options(self) -> dict[str, Any]:
        """How every model of the run computes and where it lies, as `hub.load` and `hub.initialise` take it."""
        names = ("dtype", "matmul_precision", "remat", "logits_chunk")
        return {name: getattr(self.config.model, name) for name in names} | {"mesh": self.mesh}

    def load(self, done: Done, *, head: str, key: jax.Array | None = None) -> Loaded:
        return load(done.folder, head=head, key=key, **self.model_options)

    def train(
        self,
        folder: Path,
        name: str,
        state: TrainState,
        loop: Loop,
        fed: Fed,
        *,
        steps: int,
        tokens: int,
        round: int | None = None,
        held_out: HeldOut | None = None,
    ) -> TrainState:
        """Run `loop` on what it is fed, to `steps`, from its last checkpoint where the stage was stopped before. `state` is used up.

        `tokens` is how many a step works on. The state is saved as the config's `checkpoint` says, at the last step (what the stage does
        after its training may be stopped as well), and where the run is told to stop: then Stopped is raised. A step whose loss or
        gradient is not finite stops it too, or is left out (`divergence`).
        With `held_out` it is watched, at the last step in any case, and may return the parameters of its best look, with that `step`.
        """
        if steps == 0:
            return state
        checkpoint, place = self.config.checkpoint, self.store.state(folder)
        best = Checkpoints(f"{place}/best", keep=1, whole=place) if held_out is not None and held_out.best else nullcontext()
        looks = Looks(checkpoint.minutes, checkpoint.every, steps)
        with looks, Checkpoints(place, keep=checkpoint.keep) as checkpoints, best as kept:
            state, meta = restored(state, checkpoints, self.mesh)
            self.store.goes_on(folder, meta)
            if start := int(state.step):
                self.log.note(f"{name}: goes on from step {start} of {steps}")
            title = name if round is None else f"round {round} {name}"
            finite = FiniteWatch(checkpoint, folder, place, fed, title, steps, start, meta)
            with self.log.stage(name, round=round, total_steps=steps, start=start, folder=folder, watch=self.watch()) as stage:
                if start < steps:
                    stage.phase("compiling")
                logged = start
                for n, (new, metrics) in enumerate(loop(state, fed.batches(start)), start=start + 1):
                    state = new
                    stage.dispatched(n)
                    save, stop = looks.at(n)
                    watched = None if held_out is None or (n % held_out.every and n != steps) else held_out
                    metrics = finite.see(n, metrics, now=save or watched is not None)
                    if watched is not None:
                        stage.phase("held-out rows")
                        metrics = metrics | look(watched, n, state, kept)
                    if watched is not None or n % self.config.log.every == 0 or n == steps:
                        stage.step(n, metrics, tokens=tokens * (n - logged))
                        logged = n
                    if save:
                        stage.flush()  # a run that goes on from here will not take this step again
                        if kept is not None:
                            kept.wait()  # nor look at it
                        self.saving(folder)
                        checkpoints.save(n, state, self.store.spent(folder) | finite.saving(n))
                        looks.saved()
                    if stop is not None:
                        checkpoints.wait()
                        raise Stopped(stop, f"{title} is saved at step {n} of {steps}")
            self.skipped[folder] = finite.skipped
            return with_best(state, kept, self.mesh)


def restored(state: TrainState, checkpoints: Checkpoints, mesh: Any) -> tuple[TrainState, dict[str, Any]]:
    """(the state, meta) of the newest checkpoint; (`state`, {}) where there is none."""
    found = checkpoints.restore(sharding.template(state, mesh))
    if found is None:
        return state, {}
    jax.tree.map(lambda x: x.delete(), state)  # as the first step would: going on needs no more memory than starting
    return sharding.uncommitted(found[0], mesh), found[1]


def look(held_out: HeldOut, n: int, state: TrainState, kept: Checkpoints | None) -> dict[str, float]:
    """Metrics of the held-out rows at step `n`. The parameters of the best look so far are kept on disk: no copy more in memory.

    A run that goes on from an earlier step finds the best of a later one: it takes that step again, to the same bits, and so do its looks.
    """
    with ignore_compilations():  # the first look is not the first step
        seen = held_out.look(state.params)
    if kept is not None:
        value = seen["accuracy"] if held_out.best == "accuracy" else -seen["loss"]
        best = kept.newest()
        if value > (-math.inf if best is None else best["value"]):  # NaN is not
            kept.save(n, TrainState(state.step, state.params, {}), {"value": value})
    return {f"eval_{name}": value for name, value in seen.items()}


def with_best(state: TrainState, kept: Checkpoints | None, mesh: Any) -> TrainState:
    """The state with the parameters and the step of the best look, if one is kept. Raises Diverged where no look was finite."""
    if kept is None:
        return state
    if kept.newest() is None:
        raise Diverged(
            "no look at the held-out rows gave a finite figure, so none is the best; lower the learning rate, or look at those rows."
        )
    like = sharding.template(TrainState(state.step, state.params, {}), mesh)
    jax.tree.map(lambda x: x.delete(), state.params)  # one copy at a time
    found = kept.restore(like)
    assert found is not None
    best = sharding.uncommitted(found[0], mesh)
    return replace(state, step=best.step, params=best.params)


def kept_look(done: Done) -> str | None:
    """Which step `load_best_model_at_end` went on with, where that is not the last."""
    result = done.record["result"] or {}
    step, steps = result.get("kept_step"), result.get("steps")
    return None if step in (None, steps) else f"{done.name} goes on with step {step} of {steps}, its best look (load_best_model_at_end)."


def add_model(loaded: Loaded, folder: Path) -> None:
    """Write the model into a stage's folder, beside its metrics, its list of dropped rows and its checkpoint (`save` replaces folders)."""
    fresh = folder / ".model"
    save(loaded, fresh)
    if fresh.is_dir():  # of several processes one writes
        for path in fresh.iterdir():
            os.replace(path, folder / path.name)
        fresh.rmdir()


def epochs(run: RunContext, table: Table, ids: Sequence[str], batch_size: int, steps: int, **order: Any) -> Fed:
    """A table's rows, called `ids`, for `steps` steps, in the order of `seed` and `name`."""
    return Fed(lambda done: islice(batches(table, batch_size, bucket=run.config.data.bucket, start=done, **order), steps - done), ids)


def placed(run: RunContext, stream: Iterator) -> Iterator:
    return (sharding.place_batch(batch, run.mesh) for batch in stream)
