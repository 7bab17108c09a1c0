"""Write and read stage.json, the record of a finished stage."""

import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

from jaxrlhf.files import listed_files, read_sealed
from jaxrlhf.storage.stage import STAGE_FORMAT, Done, Stage, StageError, canonical_json

RECORD = "stage.json"
# What a run relies on; what a later version has added is not among it.
_FIELDS = {"name": str, "function": str, "hash": str, "inputs": dict, "config": dict, "result": dict | None, "seconds": int | float}


def read_record(folder: str | Path) -> dict[str, Any]:
    """The stage.json of a stage folder. Raises StageError with the way out where it is missing or broken."""
    path = Path(folder) / RECORD
    try:
        record = read_sealed(path)
    except FileNotFoundError:
        raise StageError(f"{path} is missing, so the stage is not complete; delete {Path(folder)} to build it again.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StageError(f"{path} cannot be read ({error}); delete {Path(folder)} to build the stage again.") from error
    if not record.get("finished"):
        raise StageError(f"{path} is not the record of a finished stage; delete {Path(folder)} to build it again.")
    return record


def check_fields(folder: Path, record: dict[str, Any]) -> None:
    """Raise StageError where the record lacks what a run reads of it."""
    wrong = [name for name, kind in _FIELDS.items() if name not in record or not isinstance(record[name], kind)]
    if wrong:
        raise StageError(f"{folder / RECORD} has no {wrong[0]} that can be used; delete {folder} to build the stage again.")
    try:
        listed_files(record.get("files", {}))
    except ValueError as error:
        raise StageError(f"{folder / RECORD} cannot be used ({error}); delete {folder} to build the stage again.") from error


def record_of(stage: Stage, result: dict[str, Any] | None, resumed: bool, *, seconds: float, compile_seconds: float) -> dict[str, Any]:
    """`seconds` and `compile_seconds`: of the process that finished the stage, and of others up to the checkpoints it went on from."""
    return {
        "kind": stage.kind,
        "name": stage.name,
        "function": stage.function,
        "version": stage.version,
        "hash": stage.hash,
        "inputs": {name: done.hash for name, done in stage.inputs.items()},
        "parent": stage.inputs[stage.parent].hash if stage.parent else None,
        "config": json.loads(canonical_json(stage.config)),
        "result": result,
        "seconds": round(seconds, 3),
        "resumed": resumed,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: _version(name) for name in ("jaxrlhf", "jax", "flax")} | {"python": platform.python_version()},
        "format": STAGE_FORMAT,
        "compile_seconds": round(compile_seconds, 3),
    }


def check_stage(folder: Path) -> None:
    """Raise StageError where `folder` is that of a finished stage, or a copy of one, and a file in it is not what was written."""
    path = folder / RECORD
    try:
        record = read_sealed(path) if path.is_file() else {}
        Done(str(record.get("name")), folder, "", record).check()
    except (ValueError, TypeError, AttributeError, StageError) as error:
        fault = error if isinstance(error, StageError) else f"{path} cannot be read ({error})."
        raise StageError(f"{fault} If it is a copy that you changed, delete its {RECORD}.") from None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hash_of(folder: Path) -> str | None:
    try:
        return read_record(folder)["hash"]
    except (StageError, KeyError):
        return None
