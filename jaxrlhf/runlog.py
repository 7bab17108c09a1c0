"""What a run says about itself: metrics to JSONL, TensorBoard and W&B, and its progress to whoever watches.

Metrics are written one step late: `step` keeps the device arrays it is given, and they are fetched when the next step has been dispatched,
so that logging never makes the device wait. In `metrics.jsonl` numbers that JSON lacks are the strings "NaN", "Infinity" and "-Infinity",
which `float()` reads. Logging is not thread-safe and belongs to one process: pass `RunLog(None)` in the others.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxrlhf.compilation import Watch

FILE = "metrics.jsonl"
RESERVED = ("stage", "round", "step")


class RunLog:
    """The log of one run folder; `folder` None writes and shows nothing.

        with RunLog(folder, tensorboard=True) as log:
            with log.stage("reward", round=1, total_steps=200, start=resumed_at) as stage:
                stage.phase("compiling")
                for n, (state, metrics) in enumerate(train(...), start=resumed_at + 1):
                    stage.step(n, metrics, tokens=4096)

    `wandb`: keyword arguments of `wandb.init`, or None. `plain`: lines instead of a progress bar; by default where the output is no
    terminal. `every`: seconds between two plain lines. `file`: where progress goes (default: standard error).
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
        self._console = Console(file=file, stderr=file is None, quiet=folder is None, soft_wrap=True, highlight=False)
        self._plain = not self._console.is_terminal if plain is None else plain
        self._every = every
        self._tensorboard = tensorboard and self.folder is not None
        self._wandb = None
        self._stage: StageLog | None = None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            repair(self.folder / FILE)
            if wandb is not None:
                self._wandb = _open_wandb(self.folder, dict(wandb))

    def stage(
        self,
        name: str,
        *,
        round: int | None = None,
        total_steps: int | None = None,
        start: int = 0,
        folder: str | Path | None = None,
        watch: Watch | None = None,
    ) -> "StageLog":
        """Begin a stage; the one before it is closed. `start` is the step it resumes from: later lines of this stage are forgotten.

        With `folder` the stage's lines are also written to its own metrics.jsonl, from where `replay` copies them into the log of a run
        that finds the stage finished. `watch` is told of every step and says here what it has to say, until the stage is closed.
        """
        if self._stage:
            self._stage.close()
        self._stage = StageLog(self, name, round, total_steps, start, None if folder is None else Path(folder), watch)
        return self._stage

    def replay(self, path: str | Path, stage: str, *, round: int | None = None) -> int:
        """Copy the lines of a finished stage's metrics.jsonl under this run's names, in place of what it had; the number of lines."""
        lines = [{**line, "stage": stage, "round": round} for line in read(path)]
        if self.folder is not None:
            forget(self.folder / FILE, stage, round, after=-1)
            _append(self.folder / FILE, lines)
        return len(lines)

    def keep_only(self, stages: Collection[tuple[str, int | None]]) -> None:
        """Drop the lines of every (stage, round) that is not among `stages`: an earlier run under this name took them."""
        if self.folder is not None:
            _rewrite(self.folder / FILE, lambda line: (line["stage"], line["round"]) in stages)

    def note(self, text: str) -> None:
        """Say something to whoever watches."""
        if self._stage and self._stage.bar:
            self._stage.bar.console.print(text, markup=False)
        else:
            self._console.print(text, markup=False)

    def close(self) -> None:
        """Write what is pending and close the writers."""
        if self._stage:
            self._stage.close()
        if self._wandb:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class StageLog:
    """The log of one stage of a run; made by `RunLog.stage`."""

    def __init__(
        self, log: RunLog, name: str, round: int | None, total: int | None, start: int, folder: Path | None, watch: Watch | None = None
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
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            repair(path)
            forget(path, name, round, after=start)
        self._files = [open(path, "a", encoding="utf-8") for path in paths]  # noqa: SIM115 (closed in close)
        self._board: Any = None
        self._plots = False  # whether the plots know of this stage: with its first metrics
        self.bar, self._task = (None, None) if log._plain or log.folder is None else _bar(log._console, self._title, total, start)
        self._watch = watch
        if watch is not None:
            watch.say = self.note
            watch.start()

    def phase(self, name: str) -> None:
        """What is going on until the next step, like "compiling"; plain output prints it the first time, and then at its usual pace."""
        self._phase = name
        self._show(force=name not in self._phases)
        self._phases.add(name)

    def dispatched(self, n: int) -> None:
        """Step `n` has been dispatched, whether or not it is logged: what it compiled is looked at. Raises RecompileError."""
        if self._watch is not None:
            self._watch.step(n)

    def step(self, n: int, metrics: Mapping[str, Any], *, tokens: int | None = None) -> None:
        """Step `n` (1 is the first) has been dispatched and gave `metrics`, name → scalar.

        `tokens` is how many were worked on since the last call; not every step has to be logged. Writes the
        step before it; a step without metrics moves the progress alone. Raises ValueError for metrics that are no scalars.
        """
        if any(name in RESERVED for name in metrics):
            raise ValueError(f"metrics of stage {self._name} may not be called {', '.join(RESERVED)}; rename them.")
        self.dispatched(n)
        self.flush()
        self._pending = (n, metrics)
        first = not self._times
        self._times.append((time.monotonic(), n, tokens or 0))
        self._step, self._phase = n, ""
        self._show(force=first or n == self._total)

    def note(self, text: str) -> None:
        """Say something to whoever watches, under the stage's name."""
        self._log.note(f"{self._title}: {text}")

    def close(self) -> None:
        """Write the last step and close the stage's files."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
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
        self.close()

    def flush(self) -> None:
        """Write the last step now, waiting for the device: before a checkpoint, or a death right after it would lose the step's line."""
        if self._pending is None:
            return
        (n, metrics), self._pending = self._pending, None
        if not metrics:  # a pass that only shows how far it is
            return
        numbers = scalars(metrics)
        self._last = numbers
        line = _line({"stage": self._name, "round": self._round, "step": n, **numbers})
        for file in self._files:
            file.write(line)
            file.flush()
        self._plot(n, {name: value for name, value in numbers.items() if isinstance(value, int | float)})

    def _plot(self, n: int, plottable: Mapping[str, int | float]) -> None:
        title = _title(self._name, self._round)
        if not self._plots:
            self._plots = True
            if self._log._wandb:
                self._log._wandb.define_metric(f"{title}/*", step_metric=f"{title}/step")
            if self._log._tensorboard:
                self._board = _open_tensorboard(self._log.folder, self._name, self._round, self._start)
        if self._board:
            for name, value in plottable.items():
                self._board.add_scalar(name, value, n)
        if self._log._wandb:
            self._log._wandb.log({f"{title}/{name}": value for name, value in plottable.items()} | {f"{title}/step": n})

    def _show(self, *, force: bool = False) -> None:
        if self.bar is not None and self._task is not None:
            self.bar.update(self._task, completed=self._step, phase=self._phase, speed=self._speed(), metrics=_brief(self._last))
        elif force or time.monotonic() - self._said >= self._log._every:
            self._said = time.monotonic()
            of = "" if self._total is None else f"/{self._total}"
            parts = [f"{self._title}: step {self._step}{of}", self._phase, self._left(), self._speed(), _brief(self._last)]
            self._log.note("  ".join(part for part in parts if part))

    def _rate(self) -> tuple[float, float] | None:
        """(steps, tokens) a second over the recent steps; the first one, which compiles, does not count."""
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


def scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Python numbers of device scalars, fetched together. Strings, bools and None stay. Raises ValueError for longer arrays."""
    out = {}
    for name, value in jax.device_get(dict(metrics)).items():
        if isinstance(value, np.ndarray | np.generic):
            if value.size != 1:
                raise ValueError(f"metric {name} has shape {list(value.shape)}; log a scalar, its mean for example.")
            value = value.item() if value.dtype.kind in "biu" else float(value.item())
        out[name] = value
    return out


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a half-written last one (the process was killed) is left out. No file: no lines."""
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error}); delete that line to go on.") from error
    return lines


def repair(path: Path) -> None:
    """Cut off a half-written last line, so that the next one starts on its own."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)


def forget(path: Path, stage: str, round: int | None, *, after: int) -> None:
    """Drop the lines of `stage` in `round` whose step is past `after`: a resumed run takes those steps again."""
    _rewrite(path, lambda line: (line["stage"], line["round"]) != (stage, round) or line["step"] <= after)


def _rewrite(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    lines = read(path)
    kept = [line for line in lines if wanted(line)]
    if len(kept) < len(lines):
        fresh = path.with_suffix(".jsonl.new")
        fresh.unlink(missing_ok=True)
        _append(fresh, kept)
        os.replace(fresh, path)


def _append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(_line(line) for line in lines)


def _line(fields: Mapping[str, Any]) -> str:
    spelled = {k: _spell(v) if isinstance(v, float) else v for k, v in fields.items()}
    return json.dumps(spelled, allow_nan=False, ensure_ascii=False) + "\n"


def _spell(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _brief(numbers: Mapping[str, Any]) -> str:
    """The few numbers worth a place on the screen: losses, scores, KL, the first three."""
    chosen = [name for name in numbers if name.startswith(("loss/", "rollout/score", "rollout/kl"))] or list(numbers)
    shown = [f"{name} {numbers[name]:.4g}" for name in chosen if isinstance(numbers[name], int | float)]
    return "  ".join(shown[:3])


def _title(name: str, round: int | None) -> str:
    return name if round is None else f"{name}-r{round}"


def _bar(console: Console, title: str, total: int | None, start: int) -> tuple[Progress, Any]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    fields = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("phase", "speed", "metrics")]
    bar = Progress(*columns, *fields, console=console, refresh_per_second=4)
    bar.start()
    return bar, bar.add_task(title, total=total, completed=start, phase="", speed="", metrics="")


def _open_tensorboard(folder: Path | None, name: str, round: int | None, start: int) -> Any:
    """A TensorBoard run a stage, so that the rounds of one metric lie over each other; what lies past `start` is purged."""
    from tensorboardX import SummaryWriter

    assert folder is not None
    return SummaryWriter(str(folder / "tensorboard" / _title(name, round)), purge_step=start + 1)


def _open_wandb(folder: Path, arguments: dict[str, Any]) -> Any:
    """A W&B run that a resumed run continues: its id is kept in the run folder. Every stage has its own step axis."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("logging to W&B needs the package wandb: pip install 'jaxrlhf[wandb]', or leave log.wandb out.") from error
    kept = folder / "wandb_id"
    if kept.exists():
        arguments = {"id": kept.read_text().strip(), "resume": "allow", **arguments}
    run = wandb.init(dir=str(folder), **arguments)
    kept.write_text(f"{run.id}\n")
    return run
