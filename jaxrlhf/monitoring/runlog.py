"""Log a run: metrics to metrics.jsonl, TensorBoard and W&B, and progress to the terminal.

Metrics are written one step late: `step` keeps the device arrays and fetches them after the next step is dispatched, so that logging never
makes the device wait. In `metrics.jsonl` numbers that JSON lacks are the strings "NaN", "Infinity" and "-Infinity", which `float()` reads.
Logging is not thread-safe and happens in one process: use `RunLog(None)` in the others.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console

from jaxrlhf.monitoring.metrics_file import FILE, RESERVED, keep_only, put, read, repair, scalars, to_line
from jaxrlhf.monitoring.output import Shown
from jaxrlhf.monitoring.recompiles import CompileWatch
from jaxrlhf.monitoring.writers import brief, open_bar, open_tensorboard, open_wandb, title_of
from jaxrlhf.types import Progress


class RunLog:
    """The log of one run folder; with `folder` None nothing is written or shown.

        with RunLog(folder, tensorboard=True) as log:
            with log.stage("reward", round=1, total_steps=200, start=resumed_at) as stage:
                stage.phase("compiling")
                for n, (state, metrics) in enumerate(train(...), start=resumed_at + 1):
                    stage.step(n, metrics, tokens=4096)

    `wandb`: keyword arguments of `wandb.init`, or None. `plain`: lines instead of a progress bar; the default where the output is not a
    terminal. `every`: seconds between two plain lines. `file`: where progress is shown (default: standard error).
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        tensorboard: bool = False,
        wandb: Mapping[str, Any] | None = None,
        plain: bool | None = None,
        every: float = 10.0,
        file: TextIO | None = None,
    ):
        self.folder = None if folder is None else Path(folder)
        shown: Any = Shown(sys.stderr if file is None else file)
        self._console = Console(file=shown, quiet=folder is None, soft_wrap=True, highlight=False)
        self._plain = not self._console.is_terminal if plain is None else plain
        self._every = every
        self._tensorboard = tensorboard and self.folder is not None
        self._wandb = None
        self._stage: StageLog | None = None
        self.seen: Callable[[dict[str, Any]], None] = lambda line: None  # told every line: new, of before a stop, or replayed
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            repair(self.folder / FILE)
            if wandb is not None:
                self._wandb = open_wandb(self.folder, dict(wandb))

    def stage(
        self,
        name: str,
        *,
        round: int | None = None,
        total_steps: int | None = None,
        start: int = 0,
        folder: str | Path | None = None,
        watch: CompileWatch | None = None,
    ) -> "StageLog":
        """Begin a stage, and close the one before it. `start` is the step it resumes from: later lines of this stage are removed, and
        those up to it are behind the lines of all other stages.

        With `folder` the lines are also written to metrics.jsonl there, from where `replay` copies them into the log of a run that finds
        the stage finished. `watch` is called after every step, and its messages are shown here, until the stage is closed.
        """
        if self._stage:
            self._stage.close()
        self._stage = StageLog(self, name, round, total_steps, start, None if folder is None else Path(folder), watch)
        return self._stage

    def progress(
        self, what: str, *, round: int | None = None, tokens: int = 0, watch: Callable[[], Any] = lambda: None, first: str = "compiling"
    ) -> Progress:
        """What a pass reports its batches (of so many `tokens`) to, from (0, total) on: shown as a stage of its own, and not kept."""
        stage: StageLog | None = None

        def report(done: int, total: int) -> None:
            nonlocal stage
            if stage is None:
                stage = self.stage(what, round=round, total_steps=total, watch=watch())
                stage.phase(first)
            if done:
                stage.step(done, {}, tokens=tokens)
            if done == total:
                stage.close()

        return report

    def replay(self, path: str | Path, stage: str, *, round: int | None = None) -> int:
        """Copy the lines of a finished stage's metrics.jsonl, in place of those this run has of it; the number of lines."""
        lines = [{**line, "stage": stage, "round": round} for line in read(path)]
        if self.folder is not None:
            put(self.folder / FILE, stage, round, lines)
        for line in lines:
            self.seen(line)
        return len(lines)

    def keep_only(self, stages: Collection[tuple[str, int | None]]) -> None:
        """Remove the lines of every (stage, round) that is not in `stages`: an earlier run of this name wrote them."""
        if self.folder is not None:
            keep_only(self.folder / FILE, stages)

    def note(self, text: str) -> None:
        """Show a line of text."""
        if self._stage and self._stage.bar:
            self._stage.bar.console.print(text, markup=False)
        else:
            self._console.print(text, markup=False)

    def close(self, *, tell: bool = True) -> None:
        """Write the pending metrics and close the writers."""
        if self._stage:
            self._stage.close(tell=tell)
        if self._wandb:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close(tell=error[0] is None)


class StageLog:
    """The log of one stage of a run; made by `RunLog.stage`."""

    def __init__(
        self,
        log: RunLog,
        name: str,
        round: int | None,
        total: int | None,
        start: int,
        folder: Path | None,
        watch: CompileWatch | None,
    ):
        self._log, self._name, self._round, self._total, self._start = log, name, round, total, start
        self._title = name if round is None else f"round {round} {name}"
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._step, self._phase, self._said = start, "", 0.0
        self._phases: set[str] = set()
        self._times: deque[tuple[float, int, int]] = deque(maxlen=50)  # (clock, step, tokens) of the recent calls of `step`
        self._last: dict[str, Any] = {}
        self._closed = False
        paths = [folder / FILE for folder in (log.folder, folder) if log.folder is not None and folder is not None]
        before: dict[int, dict[str, Any]] = {}  # the lines up to `start`, by step: either file may have lost some
        for path in reversed(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            repair(path)
            found = {line["step"]: line for line in read(path) if (line["stage"], line["round"]) == (name, round)}
            if all(found[step] == before[step] for step in before.keys() & found.keys()):  # else of an earlier config's stage
                before |= found
        for path in paths:
            put(path, name, round, [before[step] for step in sorted(before) if step <= start])
        for step in sorted(before):
            if step <= start:
                log.seen(before[step])
        self._files = [open(path, "a", encoding="utf-8") for path in paths]  # noqa: SIM115 (closed in close)
        self._board: Any = None
        self._plots = False  # whether TensorBoard and W&B are set up for this stage
        self.bar, self._task = (None, None) if log._plain or log.folder is None else open_bar(log._console, self._title, total, start)
        self._watch = watch
        if watch is not None:
            watch.say = self.note
            watch.start()

    def phase(self, name: str) -> None:
        """Show what happens until the next step, like "compiling"; plain output prints a new phase at once."""
        self._phase = name
        self._show(force=name not in self._phases)
        self._phases.add(name)

    def dispatched(self, n: int) -> None:
        """Step `n` is on its way, logged or not: a phase from here on is its own. Raises RecompileError for what it compiled."""
        self._step = n
        if self._watch is not None:
            self._watch.step(n)

    def step(self, n: int, metrics: Mapping[str, Any], *, tokens: int | None = None) -> None:
        """Log `metrics`, name → scalar, of step `n` (the first is 1), which was just dispatched.

        `tokens`: how many were processed since the last call; not every step has to be logged. Writes the step before; a step without
        metrics only moves the progress. What is shown beside a step are the last figures written, and beside the last step its own.
        Raises ValueError for metrics that are not scalars.
        """
        if any(name in RESERVED for name in metrics):
            raise ValueError(f"metrics of stage {self._name} may not be called {', '.join(RESERVED)}; rename them.")
        self.dispatched(n)
        self.flush()
        self._pending = (n, metrics)
        first = not self._times
        self._times.append((time.monotonic(), n, tokens or 0))
        self._phase = ""
        if n == self._total:
            self.flush()
        self._show(force=first or n == self._total)

    def note(self, text: str) -> None:
        """Show a line of text with the stage's name."""
        self._log.note(f"{self._title}: {text}")

    def close(self, *, tell: bool = True) -> None:
        """Write the last step and close the stage's files. `tell`: `seen` is told, which may raise; not where an error is on its way."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush(tell=tell)
        finally:
            if self._watch is not None:
                self._watch.stop()
            for file in self._files:
                file.close()
            if self._board:
                self._board.close()
            if self.bar:
                self.bar.stop()
            if self._log._stage is self:
                self._log._stage = None

    def __enter__(self) -> "StageLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(tell=error is None)

    def flush(self, *, tell: bool = True) -> None:
        """Write the last step now, waiting for the device. Call it before a checkpoint: a resumed run does not repeat the step."""
        if self._pending is None:
            return
        (n, metrics), self._pending = self._pending, None
        if not metrics:  # a pass that only shows its progress
            return
        numbers = scalars(metrics)
        self._last = numbers
        line = {"stage": self._name, "round": self._round, "step": n, **numbers}
        for file in self._files:
            file.write(to_line(line))
            file.flush()
        self._plot(n, {name: value for name, value in numbers.items() if isinstance(value, int | float)})
        if tell:
            self._log.seen(line)

    def _plot(self, n: int, plottable: Mapping[str, int | float]) -> None:
        title = title_of(self._name, self._round)
        if not self._plots:
            self._plots = True
            if self._log._wandb:
                self._log._wandb.define_metric(f"{title}/*", step_metric=f"{title}/step")
            if self._log._tensorboard:
                self._board = open_tensorboard(self._log.folder, self._name, self._round, self._start)
        if self._board:
            for name, value in plottable.items():
                self._board.add_scalar(name, value, n)
        if self._log._wandb:
            self._log._wandb.log({f"{title}/{name}": value for name, value in plottable.items()} | {f"{title}/step": n})

    def _show(self, *, force: bool = False) -> None:
        if self.bar is not None and self._task is not None:
            self.bar.update(self._task, completed=self._step, phase=self._phase, speed=self._speed(), metrics=brief(self._last))
        elif force or time.monotonic() - self._said >= self._log._every:
            self._said = time.monotonic()
            of = "" if self._total is None else f"/{self._total}"
            parts = [f"{self._title}: step {self._step}{of}", self._phase, self._left(), self._speed(), brief(self._last)]
            self._log.note("  ".join(part for part in parts if part))

    def _rate(self) -> tuple[float, float] | None:
        """(steps, tokens) per second over the recent steps, without the first one, which compiles."""
        if len(self._times) < 2:
            return None
        seconds = max(self._times[-1][0] - self._times[0][0], 1e-9)
        steps = self._times[-1][1] - self._times[0][1]
        return steps / seconds, sum(tokens for _, _, tokens in list(self._times)[1:]) / seconds

    def _speed(self) -> str:
        rate = self._rate()
        return f"{rate[1]:,.0f} tokens/s" if rate and rate[1] else ""

    def _left(self) -> str:
        rate = self._rate()
        if rate is None or not rate[0] or self._total is None or self._step >= self._total:
            return ""
        seconds = round((self._total - self._step) / rate[0])
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
