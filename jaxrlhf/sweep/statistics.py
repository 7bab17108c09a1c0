"""The runs of a sweep and their statistics: means over seeds, standard errors, differences seed by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxrlhf.evaluation.curves import Estimate, estimate
from jaxrlhf.evaluation.findings import difference_to

FIGURES = ("gold", "peak", "win_rate", "proxy", "kl_sft", "reward_accuracy", "ess", "fits", "seconds")


@dataclass(frozen=True)
class Run:
    """One arm at one seed. `rounds` is that of its summary.json; `fits` how many reward models were fitted; `seconds` of all its stages,
    those it shares with other runs included."""

    seed: int
    arm: str
    state: str  # finished, failed or pending
    rounds: Sequence[Mapping[str, Any]] = ()
    notes: tuple[str, ...] = ()
    fits: int | None = None
    seconds: float | None = None
    error: str | None = None
    folder: str | None = None

    @cached_property
    def figures(self) -> dict[str, float | None]:
        """What the table takes of a finished run: the last round's figures, the last ESS there was, and the best round's gold."""
        if self.state != "finished":
            return dict.fromkeys(FIGURES)
        last, trained = self.rounds[-1], self.rounds[1:]
        golds = [row["gold"] for row in trained if row["gold"] is not None]
        ess = [row["ess"] for row in trained if row.get("ess") is not None]
        figures = {name: last.get(name) for name in FIGURES}
        return figures | {
            "peak": max(golds, default=None), "ess": ess[-1] if ess else None, "fits": self.fits, "seconds": self.seconds,
        }  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep; `settings` says what every arm is (`arm_facts`), in the order of the recipe."""

    name: str
    sft_seed: int | None
    settings: Mapping[str, Mapping[str, Any]]
    runs: tuple[Run, ...]

    @property
    def first(self) -> str:
        """The arm the others are compared with."""
        return next(iter(self.settings))

    def finished(self, arm: str) -> list[Run]:
        return [run for run in self.runs if run.arm == arm and run.state == "finished"]

    def values(self, arm: str, figure: str) -> dict[int, float]:
        """seed → value, of the finished runs that have one."""
        found = {run.seed: run.figures[figure] for run in self.finished(arm)}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def estimate(self, arm: str, figure: str) -> Estimate | None:
        return estimate(list(self.values(arm, figure).values()))

    def difference(self, arm: str, figure: str = "gold") -> Estimate | None:
        """To the first arm, seed by seed, over the seeds both have; None for the first arm itself."""
        if arm == self.first:
            return None
        return difference_to(self.values(self.first, figure), self.values(arm, figure))
