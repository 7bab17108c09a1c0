"""The store of finished stages: find, build, lock and link them by their hash."""

import errno
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxrlhf import distributed
from jaxrlhf.files import faults, identities, leftovers, locked, remove, sealed, sweep, sync
from jaxrlhf.monitoring.metrics_file import FILE
from jaxrlhf.monitoring.recompiles import CompileWatch, count_compilations
from jaxrlhf.storage.blocks import Blocks
from jaxrlhf.storage.copies import files_in
from jaxrlhf.storage.record import RECORD, check_fields, hash_of, read_record, record_of
from jaxrlhf.storage.remote import RemoteError
from jaxrlhf.storage.stage import STATE, Done, Stage, StageError

_log = logging.getLogger(__name__)


@dataclass
class _Cost:
    """What a stage costs: in this process, and `before` in those whose checkpoint it goes on from."""

    started: float
    compiled: CompileWatch
    before: dict[str, float] = field(default_factory=dict)

    def spent(self) -> dict[str, float]:
        here = {"seconds": time.monotonic() - self.started, "compile_seconds": self.compiled.seconds}
        return {name: value + self.before.get(name, 0.0) for name, value in here.items()}


class Store:
    """A folder of finished stages. Only `build` writes to it; several processes may share it."""

    apart = False  # whether each process of a run has its own folder of the stages

    def __init__(self, root: str | Path):
        self.root = Path(root).absolute()
        self._shared: dict[Path, Path] = {}  # scratch folder of this process → the leader's folder of the stage
        self._costs: dict[Path, _Cost] = {}  # of the stages built here, by the folder they are built in

    def find(self, stage: Stage) -> Done | None:
        """The finished stage, or None. Raises StageError where its folder exists and its record is broken."""
        return self._load(stage, cached=True)

    def look(self, stage: Stage) -> Done | None:
        """`find` that changes nothing, not even the copies on this machine. Files of the stage need not be here."""
        return self.find(stage)

    def build(self, stage: Stage, fn: Callable[[Path], dict[str, Any] | None], *, keep_state: bool = True) -> Done:
        """The finished stage: found, or built by `fn(folder)`, whose returned dict (JSON) is kept in the record as `result`.

        Without `keep_state` its training state goes once it is finished: a process that dies before that need not train again.

        If `fn` raises or the process dies, the partial folder stays, and the next `build` continues in it. A second process that builds
        the same stage waits for the first. Raises StageError where the record of a finished stage is broken.

        The processes of one run all call it, and `fn` runs in all of them. The leader locks and finishes the stage; the others pass `fn` a
        scratch folder, which is deleted. What all of them write goes to `shared(folder)`.
        """
        done = self._build(stage, fn, keep_state) if distributed.count() == 1 else self._build_together(stage, fn, keep_state)
        if distributed.is_leader():
            with suppress(OSError, RemoteError):  # a store of somebody else, who may write to it; or one that cannot be reached now
                self._tidy(done, keep_state)
        return done

    def shared(self, folder: Path) -> Path:
        """The folder of the stage built in `folder` that is the same in all processes, for the checkpoint that all of them write."""
        return self._shared.get(folder, folder)

    def state(self, folder: Path) -> Path | str:
        """Where the training state of the stage built in `folder` is kept, the same in all processes."""
        return self.shared(folder) / STATE

    def state_of(self, done: Done) -> Path | str:
        """Where the training state of a finished stage is, if it was kept."""
        return done.place / STATE

    def blocks(self, stage: Stage) -> Blocks:
        """Where the passes of an unfinished stage keep what they have computed."""
        return Blocks(self.root / ".blocks" / stage.hash)

    def _tidy(self, done: Done, keep_state: bool) -> None:
        """Remove of a finished stage what killed processes left, and the training state that is not to be kept."""
        stale = not keep_state and (done.place / STATE).exists()
        if stale or leftovers(done.place):
            with locked(self.root / ".locks" / done.hash, f"stage {done.name} is being tidied"):
                if stale:
                    remove(done.place / STATE)
                sweep(done.place)

    def saving(self, folder: Path) -> None:
        """Called before the stage in `folder` saves its training state; a store at a URL uploads the metrics so far."""

    def spent(self, folder: Path) -> dict[str, float]:
        """{"seconds", "compile_seconds"} of the stage in `folder` so far, for its checkpoint; {} where another process leads."""
        return self._costs[folder].spent() if folder in self._costs else {}

    def goes_on(self, folder: Path, spent: dict[str, float]) -> None:
        """The stage in `folder` goes on from a checkpoint that had cost `spent`."""
        if folder in self._costs:
            self._costs[folder].before = spent

    def _fetch(self, hash: str) -> None:
        """Get a stage that another process has finished; here they share the folder."""

    def _build_together(self, stage: Stage, fn: Callable[[Path], dict[str, Any] | None], keep_state: bool) -> Done:
        what = f"stage {stage.name} {stage.hash}"

        def announced(folder: Path) -> dict[str, Any] | None:
            distributed.agree(None, what)  # not found: all build it
            result = fn(folder)
            distributed.barrier(f"{what} built")
            return result

        if distributed.is_leader():
            done = self._build(stage, announced, keep_state)
            distributed.agree({"record": done.record, "cached": done.cached}, what)
            return done
        told = distributed.agree(None, what)
        if told is None:
            with tempfile.TemporaryDirectory(prefix="jaxrlhf-") as scratch:
                self._shared[Path(scratch)] = self._partial(stage.hash)
                fn(Path(scratch))
                distributed.barrier(f"{what} built")
                del self._shared[Path(scratch)]
            told = distributed.agree(None, what)
        self._fetch(stage.hash)
        return Done(stage.name, self.root / stage.hash, stage.hash, told["record"], told["cached"], self.apart)

    def _partial(self, hash: str) -> Path:
        return self.root / f".partial-{hash}"

    def _build(self, stage: Stage, fn: Callable[[Path], dict[str, Any] | None], keep_state: bool) -> Done:
        found = self.find(stage)
        if found:
            return found
        hash = stage.hash
        with locked(self.root / ".locks" / hash, f"stage {stage.name} is being built"):
            found = self.find(stage)  # the process we waited for may have finished it
            if found:
                return found
            partial = self._partial(hash)
            resumed = partial.is_dir()
            partial.mkdir(exist_ok=True)
            sweep(partial)
            try:
                with count_compilations() as compiled:
                    self._costs[partial] = _Cost(time.monotonic(), compiled)
                    result = fn(partial)
                record = record_of(stage, result, resumed, **self.spent(partial))
                del self._costs[partial]
                _finish(partial, self.root / hash, record, without=() if keep_state else (STATE,))
            except BaseException as error:
                error.add_note(_resume_hint(stage, partial, error))
                raise
        done = self._load(stage, cached=False)
        if done is None:
            raise StageError(f"stage {stage.name}: {self.root / hash} vanished right after it was finished; is something else cleaning up?")
        return done

    def link(self, done: Done, run_folder: str | Path, number: int, *, standalone: bool = False) -> Path:
        """`run_folder/stages/NN-name` → the stage: a relative symlink, or a copy where `standalone` or the filesystem asks for one.

        With several processes only the leader links.
        """
        target = Path(run_folder).absolute() / "stages" / f"{number:02d}-{done.name}"
        if not distributed.is_leader():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.new")
        remove(fresh)
        for name in (fresh.name, target.name):
            sweep(target.parent, name)
        if not standalone:
            try:
                # Both ends resolved: a relative link through a symlinked folder would point to another place.
                fresh.symlink_to(os.path.relpath(done.place.resolve(), target.parent.resolve()), target_is_directory=True)
            except OSError as error:
                _log.warning("%s takes no symbolic links (%s); stage %s is copied.", target.parent, error.strerror, done.name)
                standalone = True
        if standalone:
            if not target.is_symlink() and hash_of(target) == done.hash:
                return target
            shutil.copytree(done.folder, fresh)
        if target.is_dir() and not target.is_symlink():
            remove(target)
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
        check_fields(folder, record)
        for fault in faults(folder, {name: facts for name, facts in record.get("files", {}).items() if name != FILE}, read=False):
            raise StageError(f"{fault}; delete {folder} to build stage {stage.name} again.")
        return Done(stage.name, folder, hash, record, cached, self.apart)


def _finish(partial: Path, final: Path, record: dict[str, Any], *, without: tuple[str, ...]) -> None:
    """Write the record, sync all files and rename, so that a power cut leaves a complete stage or a partial folder.

    The record names every file with its size and checksum, but for those in the folders `without`, which do not belong to the stage.
    """
    files = identities(partial, (name for name in files_in(partial, skip=without) if name != RECORD))
    record = sealed(record | {"files": files})
    (partial / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    for folder, folders, files in os.walk(partial):
        folders[:] = [name for name in folders if name not in without]
        for path in [*(os.path.join(folder, name) for name in files), folder]:
            if not os.path.islink(path):
                sync(path)
    os.replace(partial, final)
    sync(final.parent)


def _resume_hint(stage: Stage, partial: Path, error: BaseException) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    stopped = isinstance(error, KeyboardInterrupt | SystemExit)
    first = "the disk is full: free some space, then run" if full else "run" if stopped else "fix the cause, then run"
    return f"stage {stage.name} is not finished; its work so far is in {partial}: {first} the same command again to continue it."
