"""Run folders as a report reads them: what is there, and in words what is missing. No model is loaded.

A folder may be a run, a run of several arms, or a sweep; a run may be unfinished, and its files are read as they are at the moment.
"""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jaxrlhf.files import faults
from jaxrlhf.report.run_files import number, read_json, read_log, read_record, read_yaml

STAGE = re.compile(r"\d\d+-.")  # how a folder in stages/ is named
PREFERENCE = ("dpo", "wpo")  # policies that are fitted to pairs, and sample nothing
IDENTITY = ("name", "output", "seed", "sft_seed", "store", "standalone", "log", "checkpoint", "mesh", "guards")  # not what is compared


class ReportError(ValueError):
    """A folder of which nothing can be shown; the message says what is missing and how to make it."""


@dataclass(frozen=True)
class StageRead:
    """A finished stage as its stage.json tells; `round` from its name, None outside rounds."""

    name: str
    function: str
    round: int | None
    folder: Path
    record: dict[str, Any]  # what follows of it, empty where it lacks that
    hash: str
    seconds: float
    result: dict[str, Any]
    config: dict[str, Any]
    inputs: dict[str, str]


@dataclass
class RunRead:
    """One run: one arm at one seed. `arm` is its name on the page, `missing` what a reader has to know is not there."""

    folder: Path
    arm: str
    seed: int | None
    method: str
    config_text: str
    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    notes: list[str]
    stages: list[StageRead]
    log: list[dict[str, Any]]
    missing: list[str] = field(default_factory=list)
    finished: bool = False
    guards: list[str] = field(default_factory=list)  # what they have said (evaluation/guards.py)

    def of(self, function: str, round: int | None = None) -> list[StageRead]:
        return [s for s in self.stages if s.function == function and (round is None or s.round == round)]

    @property
    def baselines(self) -> dict[str, Any] | None:
        """What a reward model has to beat on the held-out pairs (`evaluation.baselines`)."""
        return next((stage.result.get("baselines") for stage in self.of("pairs")), None)

    @property
    def policies(self) -> list[StageRead]:
        return [s for s in self.stages if s.round and s.name.endswith("-policy")]

    @property
    def fitted(self) -> dict[int, list[StageRead]]:
        """The reward models by the round that fitted them; several are an ensemble."""
        found: dict[int, list[StageRead]] = {}
        for stage in self.of("reward"):
            found.setdefault(stage.round or 0, []).append(stage)
        return found


def read_runs(folder: str | Path) -> list[RunRead]:
    """The runs of a folder: of a sweep's seeds, of a run's arms, or the one it is. Raises ReportError where there is none."""
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise ReportError(f"{folder} does not exist; `jaxrlhf run CONFIG.yaml` makes a run folder (output/name of its config).")
    if not folder.is_dir():
        raise ReportError(f"{folder} is a file; name the folder of a run, which holds config.yaml and stages/.")
    folders = _run_folders(folder)
    if not folders:
        raise ReportError(_foreign(folder))
    return [read_run(one, arm=one.name) for one in folders]


def _run_folders(folder: Path) -> list[Path]:
    if _is_run(folder):
        return [folder]
    seeds = sorted((p for p in folder.glob("seed-*") if p.is_dir()), key=_seed_number)
    homes = seeds or [folder]
    return [run for home in homes for run in ([home] if _is_run(home) else _arms(home))]


def _seed_number(path: Path) -> tuple[int, str]:
    number = path.name.removeprefix("seed-")
    return (int(number) if number.isdecimal() else 1 << 30, path.name)


def _arms(folder: Path) -> list[Path]:
    """The arms of a run: in the order of its config, then what else lies there. An arm that has not begun has no folder yet."""
    known = [p for p in folder.iterdir() if p.is_dir() and _is_run(p)]
    raw, _ = read_yaml(folder / "config.yaml")
    arms = raw.get("arms") or {}
    order = {name: n for n, name in enumerate(arms)} if isinstance(arms, dict) else {}
    return sorted(known, key=lambda p: (order.get(p.name, len(order)), p.name))


def _is_run(folder: Path) -> bool:
    """Stages named as ours, or a summary with rounds of ours: a report is written into a run's folder, and into no other."""
    if any(STAGE.match(path.name) for path in (folder / "stages").glob("*")):
        return True
    return bool(_rows(read_json(folder / "summary.json", [], "")))


def _foreign(folder: Path) -> str:
    if not any(folder.iterdir()):
        return f"{folder} is empty; `jaxrlhf run CONFIG.yaml` with output: {folder.parent} and name: {folder.name} fills it."
    if (folder / "config.yaml").is_file():
        return f"{folder} has a config.yaml and no stage is finished yet: `jaxrlhf run {folder / 'config.yaml'}` makes them."
    if (folder / "stage.json").is_file():
        return f"{folder} is the folder of one stage; name the run's folder, in whose stages/ it is linked."
    if (folder / "model.safetensors").is_file():
        return f"{folder} is a model folder and no run; a report needs a run's config.yaml, summary.json and stages/ (`jaxrlhf run`)."
    inside = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".") and _run_folders(path)]
    if inside:
        return f"{folder} holds several runs and is none: name those to show, {', '.join(inside[:8])}{' …' if inside[8:] else ''} in it."
    return (
        f"{folder} is no run folder: it has neither a summary.json with rounds nor stages/NN-…, and no folder in it has. "
        "`jaxrlhf run CONFIG.yaml` makes one, and `jaxrlhf sweep` a folder of them."
    )


def read_run(folder: Path, *, arm: str) -> RunRead:
    """One run folder; whatever cannot be read is named in `missing`, with the way out."""
    missing: list[str] = []
    config, text = read_yaml(folder / "config.yaml")
    if not config:
        missing.append("config.yaml is missing or broken: settings are not shown; running the config again writes it.")
    summary = read_json(folder / "summary.json", missing, "the table and the curves need it; `jaxrlhf run` on the config writes it again")
    rounds = _rows(summary)
    if summary and not rounds:
        missing.append("summary.json has no rounds of ours: it was written by something else, or broken; `jaxrlhf run` writes it again.")
    notes, guards = (_list(summary, name, missing) for name in ("notes", "guards"))
    method = str(summary.get("method") or config.get("method") or arm)
    seed = summary.get("seed", config.get("seed"))
    run = RunRead(
        folder, arm, seed if isinstance(seed, int) else None, method, text, config, rounds,
        [str(note) for note in notes], _stages(folder, missing), read_log(folder / "metrics.jsonl", missing), missing,
    )  # fmt: skip
    _completeness(run, summary)
    run.guards = [f"guard {one.get('name')}: {one['text']}" for one in guards if isinstance(one, dict) and isinstance(one.get("text"), str)]
    return run


def _list(summary: dict[str, Any], name: str, missing: list[str]) -> list[Any]:
    found = summary.get(name) or []
    if isinstance(found, list):
        return found
    missing.append(f"summary.json: {name} is not a list, and is left out.")
    return []


def _rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    rows = summary.get("rounds")
    if not isinstance(rows, list):
        return []
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("round"), int) and row["round"] >= 0]
    return [{name: value if isinstance(value, bool) else number(value) for name, value in row.items()} for row in rows]


def _completeness(run: RunRead, summary: dict[str, Any]) -> None:
    asked, done = run.config.get("rounds"), len(run.rounds) - 1
    single = any(s.function in PREFERENCE for s in run.stages) and not run.of("update")  # every further round would repeat the first
    asked = 1 if single else asked
    if not summary and not (run.folder / "summary.json").exists():
        run.missing.append("No round is finished, so there is no summary.json yet: the figures by round come with the first.")
    elif isinstance(asked, int) and run.rounds:
        run.finished = done >= asked
        if not run.finished:
            run.missing.append(f"Unfinished: round {done} of {asked} is done. The same `jaxrlhf run` goes on from here.")
    if not run.log and not all(s.function in ("tokenizer", "pairs") for s in run.stages):
        run.missing.append("metrics.jsonl is missing or empty: no training curves, no KL to the penalty's reference, no FLOPs of PPO.")


def now_doing(run: RunRead) -> str:
    """What an unfinished run logged last."""
    if run.finished or not run.log:
        return ""
    last = run.log[-1]
    where = f" of round {last['round']}" if last.get("round") is not None else ""
    return f"last heard from: {last.get('stage')}{where}, step {last.get('step')}"


def _stages(folder: Path, missing: list[str]) -> list[StageRead]:
    found = []
    home = folder / "stages"
    for path in sorted(home.iterdir()) if home.is_dir() else []:
        if not STAGE.match(path.name):
            continue
        name = path.name.split("-", 1)[1]
        if path.is_symlink() and not path.exists():
            missing.append(f"stages/{path.name} links to a folder that is gone (the store was moved?); `jaxrlhf run` builds it again.")
            continue
        record = read_record(path / "stage.json", missing)
        shown = {
            name: facts for name, facts in (record.get("files") or {}).items() if not name.endswith(".safetensors") and "/" not in name
        }
        missing += [
            f"{fault}: what is shown of {name} may be wrong; delete {path.resolve()} and run again." for fault in faults(path, shown)
        ]
        if isinstance(record.get("function"), str):
            match = re.match(r"r(\d+)-", name)
            parts: list[Any] = [
                record.get(part) or empty
                for part, empty in (("hash", ""), ("seconds", 0.0), ("result", {}), ("config", {}), ("inputs", {}))
            ]
            found.append(StageRead(name, record["function"], int(match[1]) if match else None, path, record, *parts))
    if not home.is_dir():
        missing.append("stages/ is missing: no samples, lineage or cost; a run folder that was copied needs `standalone: true`.")
    return found


def settings_key(run: RunRead) -> str:
    """The same for two runs that differ in their seeds alone."""
    facts = {name: value for name, value in run.config.items() if name not in IDENTITY} or {"method": run.method}
    return hashlib.sha256(yaml.safe_dump(facts, sort_keys=True).encode()).hexdigest()
