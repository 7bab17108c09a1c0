"""A step whose loss or gradient is not finite: it is noticed at once, written down, and stops its training or is left out."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf import distributed
from jaxrlhf.config import CheckpointConfig
from jaxrlhf.data.tables import unpadded
from jaxrlhf.files import write_whole
from jaxrlhf.formatting import as_strict_json
from jaxrlhf.monitoring.metrics_file import scalars
from jaxrlhf.types import Metrics

_log = logging.getLogger(__name__)
SKIPPED = ("skipped_steps", "skipped_in_a_row")  # what a checkpoint says of them; the first stands in the stage's result too
_SHOWN = 8  # row ids in a message


class Diverged(RuntimeError):
    """A training or a stage whose numbers are not finite; the message says where and what to do."""


class Fed(NamedTuple):
    """What a training is fed with, by which the rows of any of its steps can be found again: nothing has to be kept for that."""

    batches: Callable[[int], Iterator[Any]]  # done → the batches (numpy) of steps done + 1, done + 2, …
    ids: Sequence[str]  # of the table's rows, by their number
    samples: int = 1  # responses to a prompt: neighbouring rows, numbered on

    def rows(self, n: int) -> list[dict[str, Any]]:
        """The rows of step `n` as JSON: id, tokens under their masks, and whatever else the batch holds of each."""
        batch = vars(next(self.batches(n - 1)))
        masks = {name.replace("_mask", ""): name for name in batch if "_mask_" in name and name != "row_mask_B"}
        numbers = np.asarray(batch["index_B"])
        columns: dict[str, Any] = {"id": [self.ids[i // self.samples % len(self.ids)] for i in numbers], "number": numbers.tolist()}
        columns |= {name.split("_")[0]: unpadded(batch[name], batch[mask]) for name, mask in masks.items()}
        columns |= {"weight": np.asarray(batch["weights_B"]).tolist()} if "weights_B" in batch else {}
        columns |= {name: np.asarray(values).tolist() for name, values in batch.get("columns", {}).items()}
        return [{name: values[i] for name, values in columns.items()} for i in np.flatnonzero(batch["row_mask_B"])]


class FiniteWatch:
    """Looks at every step of one training, a step late: fetching what the last one said, once the next is dispatched, waits for nothing.

    `title` and `steps` are for messages, `state` is where the checkpoints are, `meta` what the one it goes on from says of skipped steps.
    """

    def __init__(
        self, config: CheckpointConfig, folder: Path, state: Any, fed: Fed, title: str, steps: int, start: int, meta: Mapping[str, int]
    ):
        self._config, self._folder, self._state, self._fed, self._title, self._steps = config, folder, state, fed, title, steps
        self._last: tuple[int, Metrics] | None = None  # dispatched and not looked at
        self._saved = start
        self.skipped, self._in_a_row = (meta.get(name, 0) for name in SKIPPED)

    def see(self, n: int, metrics: Metrics, *, now: bool = False) -> Metrics:
        """Take the metrics of step `n`, just dispatched, and look at the step before; `now`: at this one too, which waits for it.

        What is to be logged: where the first such step stops, their count is always 0 and left out. Raises Diverged.
        """
        if self._last is not None:
            self._look(*self._last)
        self._last = None if now else (n, metrics)
        if now:
            self._look(n, metrics)
        return metrics if self._config.on_nonfinite == "skip" else {name: x for name, x in metrics.items() if name != "nonfinite"}

    def saving(self, n: int) -> dict[str, int]:
        """What the checkpoint of step `n`, which `see` has looked at, says of skipped steps."""
        self._saved = n
        return dict(zip(SKIPPED, (self.skipped, self._in_a_row), strict=True)) if self.skipped else {}

    def _look(self, n: int, metrics: Metrics) -> None:
        if not int(jax.device_get(metrics["nonfinite"])):
            self._in_a_row = 0
            return
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        figures = {name: value for name, value in scalars(metrics).items() if not name.startswith("time/")}
        rows, file = self._fed.rows(n), self._folder / f"nonfinite-step-{n}.json"
        body = {"training": self._title, "step": n, "steps": self._steps, "metrics": figures, "rows": rows}
        if distributed.is_leader():
            write_whole(file, json.dumps(as_strict_json(body), ensure_ascii=False, indent=1) + "\n", errors="surrogatepass")
        distributed.barrier(f"{file.name} is written")  # the first process that ends ends the others
        said = ", ".join(f"{name} {x:.3g}" for name, x in figures.items() if name.startswith("loss/") or name.endswith("grad_norm"))
        rate = f" at learning rate {figures['learning_rate']:.3g}" if "learning_rate" in figures else ""
        some = ", ".join(dict.fromkeys(row["id"] for row in rows[:_SHOWN]))
        found = f"{self._title}, step {n} of {self._steps}: loss or gradient is not finite ({said}){rate}, on rows {some}; {file} holds all"
        if self._config.on_nonfinite == "skip" and self._in_a_row < self._config.max_nonfinite:
            _log.warning("%s; the step is left out.", found)
            return
        kept = f"checkpoint {self._saved} in {self._state} is kept" if self._saved else "there is no checkpoint yet"
        leave = "leave such steps out by the same command with --checkpoint.on_nonfinite skip"
        way_out = leave if self._config.on_nonfinite == "stop" else f"{self._in_a_row} in a row are checkpoint.max_nonfinite, raise that"
        raise Diverged(f"{found}; {kept}. Look at these rows and at a loss of your own, lower the learning rate, or go on: {way_out}.")


def check_result(name: str, result: Mapping[str, Any] | None) -> None:
    """Raise Diverged where a figure of a stage's result is not finite: it would stand in no stage.json."""
    bad = {key: value for key, value in (result or {}).items() if isinstance(value, float) and not math.isfinite(value)}
    if bad:
        said = ", ".join(f"{key} is {value}" for key, value in bad.items())
        raise Diverged(f"{name}: {said}, so its model has diverged and the stage is not finished; lower its learning rate.")
