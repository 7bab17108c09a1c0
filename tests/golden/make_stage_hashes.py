"""The hash of every stage of every row of the table, from the quickstart's config; nothing is built and no torch is needed.

A hash says what a stage depends on. One that changes rebuilds the stage in everyone's store: that is meant, and said in the changelog, or
it is a fault.
"""

import json
import pathlib
import string
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from tiny_encoder import write_tiny_bert

from jaxrlhf.algorithms.rounds import METHODS
from jaxrlhf.config import Config
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.pipeline.loop import walk_through
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.recipe import from_mapping, load_config, to_mapping
from jaxrlhf.storage.stage import Done, Stage

TRIGGERS = ("kl", "ess", "accuracy")
RESULT = {"due": True, "forced": False, "rounds": 1, "value": 1.0, "threshold": 1.0, "when": "kl"}
RESULT |= {"accuracy_valid": None, "pairs": 1, "update": "", "baselines": {}}


@contextmanager
def nothing_built() -> Iterator[dict[str, str]]:
    """Stages that are asked for are noted (name → hash) and count as finished."""
    found: dict[str, str] = {}

    def build(self, stage: Stage, fn, **options) -> Done:
        found[stage.name] = stage.hash
        done = Done(stage.name, pathlib.Path("nowhere"), stage.hash, {"result": RESULT, "seconds": 0.0})
        self.stages.append(done)
        return done

    with patch.object(RunContext, "build", build):
        yield found


def hashes_of(config: Config, folder: pathlib.Path, until: str | None = None) -> dict[str, str]:
    """Stage → hash of a run of which nothing is built."""
    with nothing_built() as found:
        walk_through(RunContext(config, None, folder, RunLog(None), None), until)  # type: ignore[arg-type]
        return dict(found)


def changed(config: Config, **sections) -> Config:
    raw = to_mapping(config)
    for name, value in sections.items():
        raw[name] = raw[name] | value if isinstance(value, dict) else value
    return from_mapping(raw)


def stage_hashes(folder: pathlib.Path) -> dict[str, dict[str, str]]:
    """Row of the table (and what decides when it refits) → stage → hash. `folder` takes a small encoder and nothing else."""
    encoder = write_tiny_bert(folder / "encoder", string.ascii_lowercase)
    base = changed(load_config("configs/quickstart.yaml"), arms={}, encoder={"source": str(encoder), "backend": "flax"})
    rows = {name: changed(base, method=name) for name in METHODS}
    rows |= {f"ocrm, refit.when {when}": changed(base, method="ocrm", refit={"when": when}) for when in TRIGGERS}
    return {name: hashes_of(config, folder) for name, config in rows.items()}


def main():
    with tempfile.TemporaryDirectory() as folder:
        found = stage_hashes(pathlib.Path(folder))
    pathlib.Path(__file__).with_name("stage_hashes.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
