"""A stage: everything that its content depends on, and the hash of that."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxrlhf import distributed
from jaxrlhf.config.names import name_fault
from jaxrlhf.files import faults
from jaxrlhf.monitoring.metrics_file import FILE

_log = logging.getLogger(__name__)
STATE = "checkpoint"  # the folder of training state inside a stage's; its checkpoints have checksums of their own
STAGE_FORMAT = 1  # raise it when the content of stage folders changes its meaning: every stage is then built again
KINDS = ("model", "data", "report")


class StageError(RuntimeError):
    """A stage that cannot be identified, built or read; the message says why and what to do."""


@dataclass(frozen=True)
class Done:
    """A finished stage: its place in the store, its hash and its stage.json.

    `cached`: it was found, not built. `apart`: each process has its own copy of it, not all of them one folder.
    """

    name: str
    place: Path
    hash: str
    record: dict[str, Any]
    cached: bool = False
    apart: bool = False

    @property
    def folder(self) -> Path:
        """Its folder, to read from, checked. Where nothing is read, `place` is the same."""
        self.check()
        return self.place

    def check(self) -> None:
        """Raise StageError where a file is not what was written: all but metrics and training state are read, once a process.

        Of several processes that share the folder the leader does: if it ends, all do.
        """
        if not self.apart and not distributed.is_leader():
            return
        files = {name: facts for name, facts in self.record.get("files", {}).items() if name != FILE and Path(name).parts[0] != STATE}
        for fault in faults(self.place, files):
            raise StageError(f"{fault}; delete {self.place} to build stage {self.name} again.")

    @property
    def metrics(self) -> Path | None:
        """Its metrics.jsonl, if it has one. A damaged one is named and left out: no result depends on it."""
        files = self.record.get("files", {})
        for fault in faults(self.place, {FILE: files[FILE]} if FILE in files else {}):
            _log.warning("%s; the curves of stage %s are left out.", fault, self.name)
            return None
        return self.place / FILE if (self.place / FILE).exists() else None


@dataclass(frozen=True)
class Stage:
    """What determines a stage's content, and therefore its hash; `name` is for people and links only.

    `kind` is "model" (a Hugging Face folder), "data" (Parquet shards and an index) or "report"; `function` names what builds it, and
    `version` is raised when that function changes its result. `config` is the slice of the config the function reads: a mapping or a
    dataclass, of values JSON has. `inputs` are the finished stages it reads, by the name it knows them by; `parent` says which of them
    is the model this one started from.
    """

    name: str
    kind: str
    function: str
    config: Any
    inputs: Mapping[str, Done] = field(default_factory=dict)
    version: int = 1
    parent: str | None = None

    def __post_init__(self) -> None:
        if (fault := name_fault(self.name)) is not None:
            raise ValueError(f"stage {self.name!r} {fault}; its name is that of a link in the run folder.")
        if self.kind not in KINDS:
            raise ValueError(f"stage {self.name}: kind {self.kind!r} is none of {', '.join(KINDS)}.")
        if self.parent is not None and self.parent not in self.inputs:
            raise ValueError(f"stage {self.name}: parent {self.parent!r} is not among its inputs ({', '.join(self.inputs) or 'none'}).")

    @property
    def hash(self) -> str:
        """sha256 (80 bits of it, hex) of the canonical JSON of everything the content depends on."""
        return fingerprint(
            {
                "format": STAGE_FORMAT,
                "kind": self.kind,
                "function": self.function,
                "version": self.version,
                "config": self.config,
                "inputs": {name: done.hash for name, done in self.inputs.items()},
            }
        )


def fingerprint(value: Any) -> str:
    """20 hex digits that identify a value made of dicts, lists, dataclasses, strings and numbers, whatever the order of its keys."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:20]


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces, tuples as lists. Raises StageError for what JSON does not have."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise StageError(f"a stage's config cannot be hashed: {error}; use strings, finite numbers, lists and dicts.") from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")
