"""A stage: a name, its inputs and a slice of the config → a folder that is built once.

Finished stages live in a store under the hash of all they depend on, so the rows and seeds of a sweep share every stage whose hash is
equal, and a run only links them. A stage is built in `.partial-<hash>` and finished by one rename: a folder called `<hash>` is whole.
A killed stage is continued in its partial folder, where its function finds its own checkpoints.
"""

import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxrlhf import compilation, processes

STAGE_FORMAT = 1  # raise it when what a stage folder holds changes its meaning: every stage is then built anew
KINDS = ("model", "data", "report")
RECORD = "stage.json"
STATE = "checkpoint"  # the folder of training state inside a stage's

_log = logging.getLogger(__name__)


class StageError(RuntimeError):
    """A stage that cannot be identified, built or read; the message says why and what to do."""


@dataclass(frozen=True)
class Done:
    """A finished stage: its folder in the store, its hash, and what its stage.json says. `cached`: it was there already."""

    name: str
    folder: Path
    hash: str
    record: dict[str, Any]
    cached: bool = False


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


class Store:
    """A folder of finished stages. `build` is all that writes to it; several processes may share it."""

    def __init__(self, root: str | Path):
        self.root = Path(root).absolute()
        self._shared: dict[Path, Path] = {}  # scratch folder → the folder of the stage that the leader builds

    def find(self, stage: Stage) -> Done | None:
        """The finished stage, or None. Raises StageError where its folder is there and its record cannot be trusted."""
        return self._load(stage, cached=True)

    def build(self, stage: Stage, fn: Callable[[Path], dict[str, Any] | None]) -> Done:
        """The finished stage: found, or built by `fn(folder)`, whose returned dict (JSON) is kept in the record as `result`.

        An exception in `fn`, or the death of the process, leaves the partial folder, and the next `build` continues in it. A second
        process that wants the same stage waits for the first. Raises StageError where the record of a finished stage is broken.

        Several processes that work as one all call it, and `fn` runs in all of them: the leader finds, locks and finishes; what the
        others' `fn` writes goes into a scratch folder, but for what it writes into `shared(folder)`.
        """
        return self._build(stage, fn) if processes.count() == 1 else self._build_together(stage, fn)

    def shared(self, folder: Path) -> Path:
        """The one folder, for all processes, of the stage that is built in `folder`: there is one checkpoint, and all write it."""
        return self._shared.get(folder, folder)

    def state(self, folder: Path) -> Path | str:
        """Where the training state of the stage that is built in `folder` is kept, for all processes."""
        return self.shared(folder) / STATE

    def state_of(self, done: Done) -> Path | str:
        """Where the training state of a finished stage is, if it was kept."""
        return done.folder / STATE

    def drop_state(self, folder: Path) -> None:
        """The stage in `folder` needs its training state no more."""
        shutil.rmtree(folder / STATE, ignore_errors=True)

    def saving(self, folder: Path) -> None:
        """Called before the stage in `folder` saves its training state: what lies beside it should be as safe."""

    def _fetch(self, hash: str) -> None:
        """Have a stage here that another process has finished; they share the folder."""

    def _build_together(self, stage: Stage, fn: Callable[[Path], dict[str, Any] | None]) -> Done:
        what = f"stage {stage.name} {stage.hash}"

        def announced(folder: Path) -> dict[str, Any] | None:
            processes.agree(None, what)  # nothing there: all build it
            result = fn(folder)
            processes.barrier(f"{what} built")
            return result

        if processes.is_leader():
            done = self._build(stage, announced)
            processes.agree({"record": done.record, "cached": done.cached}, what)
            return done
        told = processes.agree(None, what)
        if told is None:
            with tempfile.TemporaryDirectory(prefix="jaxrlhf-") as scratch:
                self._shared[Path(scratch)] = self._partial(stage.hash)
                fn(Path(scratch))
                processes.barrier(f"{what} built")
                del self._shared[Path(scratch)]
            told = processes.agree(None, what)
        self._fetch(stage.hash)
        return Done(stage.name, self.root / stage.hash, stage.hash, told["record"], told["cached"])

    def _partial(self, hash: str) -> Path:
        return self.root / f".partial-{hash}"

    def _build(self, stage: Stage, fn: Callable[[Path], dict[str, Any] | None]) -> Done:
        found = self.find(stage)
        if found:
            return found
        hash = stage.hash
        (self.root / ".locks").mkdir(parents=True, exist_ok=True)
        with _lock(self.root / ".locks" / hash, stage.name):
            found = self.find(stage)  # the process we waited for may have finished it
            if found:
                return found
            partial = self._partial(hash)
            resumed = partial.is_dir()
            partial.mkdir(exist_ok=True)
            started = time.monotonic()
            try:
                with compilation.counted() as compiled:
                    result = fn(partial)
                record = _record(stage, result, time.monotonic() - started, resumed) | {"compile_seconds": round(compiled.seconds, 3)}
                _finish(partial, self.root / hash, record)
            except BaseException as error:
                error.add_note(_way_out(stage, partial, error))
                raise
        done = self._load(stage, cached=False)
        if done is None:
            raise StageError(f"stage {stage.name}: {self.root / hash} vanished right after it was finished; is something else cleaning up?")
        return done

    def link(self, done: Done, run_folder: str | Path, number: int, *, standalone: bool = False) -> Path:
        """`run_folder/stages/NN-name` → the stage: a relative symlink, or a copy where `standalone` or the filesystem asks for one.

        Of several processes the leader links.
        """
        target = Path(run_folder).absolute() / "stages" / f"{number:02d}-{done.name}"
        if not processes.is_leader():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.new")
        _remove(fresh)
        if not standalone:
            try:
                # Both ends resolved: a relative link through a symlinked folder would otherwise lead elsewhere.
                fresh.symlink_to(os.path.relpath(done.folder.resolve(), target.parent.resolve()), target_is_directory=True)
            except OSError as error:
                _log.warning("%s takes no symbolic links (%s); stage %s is copied.", target.parent, error.strerror, done.name)
                standalone = True
        if standalone:
            if not target.is_symlink() and _hash_of(target) == done.hash:
                return target
            shutil.copytree(done.folder, fresh)
        if target.is_dir() and not target.is_symlink():
            _remove(target)
        elif standalone:
            target.unlink(missing_ok=True)  # a folder cannot be renamed over a link
        os.replace(fresh, target)
        return target

    def _load(self, stage: Stage, *, cached: bool) -> Done | None:
        hash = stage.hash
        folder = self.root / hash
        if not folder.is_dir():
            return None
        record = read_record(folder)
        if record.get("hash") != hash:
            raise StageError(
                f"{folder / RECORD} is of stage {record.get('hash')!r}: the folder was renamed; delete {folder} to build it again."
            )
        return Done(stage.name, folder, hash, record, cached)


def read_record(folder: str | Path) -> dict[str, Any]:
    """The stage.json of a stage folder. Raises StageError with the way out where it is missing or broken."""
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path} is missing, so the stage is not whole; delete {Path(folder)} to build it again.") from None
    except (OSError, ValueError) as error:
        raise StageError(f"{path} cannot be read ({error}); delete {Path(folder)} to build the stage again.") from error
    if not isinstance(record, dict) or not record.get("finished"):
        raise StageError(f"{path} is not the record of a finished stage; delete {Path(folder)} to build it again.")
    return record


def _record(stage: Stage, result: dict[str, Any] | None, seconds: float, resumed: bool) -> dict[str, Any]:
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
        "seconds": round(seconds, 3),  # of the process that finished it
        "resumed": resumed,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: _version(name) for name in ("jaxrlhf", "jax", "flax")} | {"python": platform.python_version()},
        "format": STAGE_FORMAT,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _finish(partial: Path, final: Path, record: dict[str, Any]) -> None:
    """Write the record and rename; everything reaches the disk first, so that a power cut leaves a whole stage or a partial one."""
    (partial / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    for folder, _, files in os.walk(partial):
        for path in [*(os.path.join(folder, name) for name in files), folder]:
            if not os.path.islink(path):
                _sync(path)
    os.replace(partial, final)
    _sync(final.parent)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some filesystems have no fsync of folders
            raise
    finally:
        os.close(descriptor)


def _way_out(stage: Stage, partial: Path, error: BaseException) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    stopped = isinstance(error, KeyboardInterrupt | SystemExit)
    first = "the disk is full: free some space, then run" if full else "run" if stopped else "mend the cause, then run"
    return f"stage {stage.name} is not finished; its work so far is in {partial}: {first} the same command again to continue it."


@contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    """Hold `path` for this process; it is let go when the process ends, however it ends."""
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            _log.warning("stage %s is being built by another process (%s); waiting for it.", name, file.read().strip() or "unknown")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            _log.warning("%s has no file locks (%s); do not build the same stage twice at once.", path.parent, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def _hash_of(folder: Path) -> str | None:
    try:
        return read_record(folder)["hash"]
    except (StageError, KeyError):
        return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
