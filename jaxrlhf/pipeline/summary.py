"""summary.json: a row a round."""

import json
from collections.abc import Sequence
from typing import Any

from jaxrlhf import distributed
from jaxrlhf.algorithms.rounds import Round
from jaxrlhf.data.tables import read_table
from jaxrlhf.evaluation.guards import Figures, sample_figures
from jaxrlhf.evaluation.intervals import as_fields, from_fields
from jaxrlhf.evaluation.samples import SAMPLES
from jaxrlhf.files import write_whole
from jaxrlhf.pipeline.stages.context import RunContext, kept_look
from jaxrlhf.pipeline.stages.reward_update import report_of
from jaxrlhf.storage.stage import Done

# Each stands in a row with its 95 % interval over prompts (name_low, name_high) and their number (name_n); a change is that of the round,
# on the same prompts.
INTERVALS = ("gold", "gold_change", "proxy_start", "proxy", "proxy_change", "kl_sft", "reward_accuracy", "ece", "win_rate")


class Summary:
    """summary.json, rewritten after every round so that a stopped run has one too; `finished` after the last of `rounds`."""

    def __init__(self, run: RunContext, rounds: int):
        self._run, self._of = run, rounds
        self.baselines: dict[str, Any] = {}  # what a reward model has to beat: evaluation/baselines.py
        self.notes: list[str] = []
        self._rounds: list[dict[str, Any]] = []
        self._counted = 0  # stages whose seconds stand in a round already
        run.guards.keep = self.write

    def note(self, text: str) -> None:
        """Something the reader of the figures has to know; said once."""
        if text not in self.notes:
            self.notes.append(text)
            self._run.log.note(f"note: {text}")

    def add(
        self,
        of: Round | None,
        evaluation: Done,
        *,
        rewards: tuple[Done, ...] = (),
        update: Done | None = None,
        decision: Done | None = None,
    ) -> None:
        """The row of a round, or (None) of π_SFT."""
        figures, report = evaluation.record["result"], update_report(update)
        row: dict[str, Any] = {"round": of.number if of else 0}
        row |= {key: figures.get(key) for name in INTERVALS for key in as_fields(name, None)}
        row |= {name: report.get(name) for name in ("ess", "ess_fraction", "eta")}
        row |= {
            "reward_accuracy_valid": accuracy_valid(rewards),
            "pairs": rewards[0].record["result"]["pairs"] if rewards else None,
            "refit": update is not None,
            "update": update.record["result"]["update"] if update else None,
            "refit_value": decision.record["result"]["value"] if decision else None,
        }
        row |= {name: figures.get(name) for name in ("tie_rate", "length", "eos_rate")}
        diverged = [name for name in INTERVALS if row[name] is None and row[f"{name}_n"]]
        if diverged:
            why = "the policy or its reward model has diverged"
            self.note(f"round {row['round']}: not finite on every prompt, and so without a value: {', '.join(diverged)}; {why}.")
        done = self._run.stages[self._counted :]  # a reward model that is kept was paid for before
        self._counted = len(self._run.stages)
        self.notes += [said for stage in done if (said := kept_look(stage)) is not None]
        row["seconds"] = round(sum(stage.record["seconds"] for stage in done), 3)
        self._rounds.append(row)
        self.write()
        self._run.guards.see(evaluation_figures(row, evaluation), round=row["round"], where="evaluation")

    def write(self) -> None:
        """The file as it is now; none before the first round."""
        if not self._rounds or not distributed.is_leader():
            return
        config = self._run.config
        body = {"method": config.method, "row": config.row, "seed": config.seed, "name": config.name}
        body |= {"rounds": self._rounds, "baselines": self.baselines, "notes": self.notes, "guards": self._run.guards.found}
        body["finished"] = self._rounds[-1]["round"] >= self._of
        write_whole(self._run.folder / "summary.json", json.dumps(body, indent=1) + "\n")


def accuracy_valid(rewards: Sequence[Done]) -> float | None:
    """On the held-out pairs, the mean of an ensemble's members."""
    valid = [done.record["result"]["accuracy_valid"] for done in rewards]
    return sum(valid) / len(valid) if valid and None not in valid else None


def evaluation_figures(row: dict[str, Any], evaluation: Done) -> Figures:
    """What the guards look at when a round is evaluated."""
    samples = evaluation.folder / SAMPLES
    known = {"kl": from_fields(row, "kl_sft"), "reward_own_text": from_fields(row, "reward_accuracy")}
    found: Figures = {name: one for name, one in known.items() if one is not None}  # type: ignore[misc]
    return found | (sample_figures(read_table(samples)[0]) if samples.exists() else {})


def update_report(update: Done | None) -> dict[str, Any]:
    return {} if update is None else report_of(update.folder)
