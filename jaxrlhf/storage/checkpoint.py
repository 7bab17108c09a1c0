"""Save and restore training state with orbax, so that a killed run continues with the same bits.

A checkpoint is a folder named after its step with the items `params`, `opt_state`, `state` (step and controller) and `meta` (JSON). Every
item is stored as a flat table from path ("layers/0/query/kernel") to array, so that it does not depend on the Python types of an
optimizer's state. Random keys and data positions are not stored: they derive from the step. `files.json` beside the items has the size
and the checksum of each of their files: orbax's own do not cover the arrays.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxrlhf import distributed
from jaxrlhf.files import faults, identities, listed_files, read_sealed, remove, sealed, sweep, write_whole
from jaxrlhf.monitoring.recompiles import ignore_compilations
from jaxrlhf.storage import copies, remote
from jaxrlhf.storage.checkpoint_items import CheckpointError, compare, flat, items_of, stored_in, struct, unflat
from jaxrlhf.types import TrainState

_log = logging.getLogger(__name__)
_FILES = "files.json"  # at a URL: uploaded after all other files of a checkpoint
_GONE = ".gone"  # where orbax puts a checkpoint that is to be removed, by one rename
T = TypeVar("T")


@cache
def _orbax() -> Any:
    """The library that writes checkpoints. Importing it takes a second, which a program without checkpoints saves.

    Orbax logs a failed background write about ten times, with tracebacks; it is raised here once, as a CheckpointError.
    """
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)
    return ocp


class _Unreadable(CheckpointError):
    """What orbax raised while it read: of a checkpoint without checksums, damage."""


class Checkpoints:
    """The checkpoints of one training loop in one folder; the newest `keep` are kept.

        with Checkpoints(folder, keep=2) as checkpoints:
            found = checkpoints.restore(sharding.template(state, mesh))
            ...
            checkpoints.save(int(state.step), state, {"stage": "reward"})

    `save` returns once the arrays are copied off the device and writes in the background; `wait`, or the end of the block, finishes the
    writing. A checkpoint gets its name by an atomic rename, so a half-written one is never seen; orbax removes it. One process (or one
    group of JAX processes) at a time may have a folder open.

    What is read is held to its checksums. A damaged checkpoint is named and set aside as .damaged-STEP, and the one before it is read:
    whoever reads takes the steps after that again. Where that would be another result, `whole` is the folder to delete, and it is an error.

    `folder` may be a URL. To gs:// every process writes its own part directly. For other protocols a checkpoint is written on this machine
    and uploaded before `save` returns, the list of its files last; opening downloads what is missing here, so another machine can resume.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, whole: Path | str | None = None):
        if keep < 1:
            raise ValueError(f"keep {keep}: at least one checkpoint must be kept; try 1.")
        self._whole = whole
        self._url = str(folder) if remote.is_url(str(folder)) else None
        self._bad: set[int] = set()  # steps at the URL that cannot be used
        self._direct = self._url is not None and self._url.split("://")[0] in remote.DIRECT
        if self._url is not None and not self._direct and distributed.count() > 1:
            raise CheckpointError(f"{self._url}: several processes write their checkpoints to gs:// or a file system that all of them see.")
        self.folder: Any = Path(folder).absolute() if self._url is None else copies.work_folder(self._url)
        with _clear_errors(self.folder, "open"):
            if self._direct and self._url is not None:
                from etils import epath

                self.folder = epath.Path(self._url)
            elif self._url is not None:
                self._fetch(self._url)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            ocp = _orbax()
            callback = ocp.AsyncOptions(post_finalization_callback=None if self._direct else self._sign)
            how: dict[str, Any] = {"cleanup_tmp_directories": True, "todelete_subdir": _GONE, "async_options": callback}
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, **how)
            handlers: Any = {name: ocp.StandardCheckpointHandler() for name in ("params", "opt_state", "state")}
            handlers["meta"] = ocp.JsonCheckpointHandler()
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
            self._found = frozenset(self._manager.all_steps())
        if self._url is not None and not self._direct:
            self._put(self._url)  # what an interrupted upload left out

    def save(self, step: int, state: TrainState, meta: dict[str, Any] | None = None) -> None:
        """Save `state` as checkpoint `step`, in the background. `meta` is any JSON value.

        A step that exists is left as it is: the same step is the same state. Raises CheckpointError where the disk is full or an earlier
        save failed.
        """
        if distributed.agree(step in self._manager.all_steps(), f"checkpoint {step}"):  # all processes save, or none
            return
        items = items_of(state)
        self.wait()
        self._sweep()
        self._check_room(items)
        args = _orbax().args
        saves = {name: args.StandardSave(flat(tree)) for name, tree in items.items() if jax.tree.leaves(tree)}
        with ignore_compilations(), _clear_errors(self.folder, "write"):  # orbax slices what several processes hold, and that compiles
            self._manager.save(step, args=args.Composite(meta=args.JsonSave(meta or {}), **saves), force=True)
        if self._url is not None and not self._direct:
            self.wait()
            with _clear_errors(self._url, "put"):
                self._put(self._url)

    def restore(self, template: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """(state, meta) of the newest checkpoint; None where there is none.

        `template` is a state of the same shapes: arrays, or ShapeDtypeStructs from `sharding.template` that say where every leaf goes;
        the mesh may differ from the one that saved. Raises CheckpointError where shapes, dtypes or names differ, or files are damaged.
        """
        return self._read_newest(lambda step: self._restore(step, template))

    def newest(self) -> dict[str, Any] | None:
        """The `meta` of the newest checkpoint; None where there is none. Of one saved here the rest is not looked at."""
        args = _orbax().args.Composite(meta=_orbax().args.JsonRestore())
        return self._read_newest(lambda step: self._manager.restore(step, args=args)["meta"], part="meta/")

    def prune(self) -> None:
        """Remove all but the newest checkpoint: of a training that is finished."""
        self.wait()
        for step in self._manager.all_steps()[:-1]:
            self._manager.delete(step)
        if distributed.is_leader() and not self._direct:
            for aside in self.folder.glob(".damaged-*"):
                remove(aside)
        if self._url is not None and not self._direct:
            self._put(self._url)

    def _restore(self, step: int, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
        items, args = items_of(template), _orbax().args
        tables = {name: table for name, tree in items.items() if (table := flat(tree))}
        described = dict(self._manager.item_metadata(step).items())
        for name, table in tables.items():
            if described.get(name) is None and not self._is_signed(step):
                raise FileNotFoundError(f"{self.folder / str(step) / name} is missing")
            compare(self.folder / str(step) / name, table, stored_in(described.get(name)))
        reads = {name: args.StandardRestore({k: struct(v) for k, v in table.items()}) for name, table in tables.items()}
        got = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore(), **reads))
        back = {name: unflat(tree, got[name] if name in tables else {}) for name, tree in items.items()}
        return TrainState(back["state"]["step"], back["params"], back["opt_state"], back["state"]["controller"]), got["meta"]

    def _read_newest(self, read: Callable[[int], T], part: str = "") -> T | None:
        """`read(step)` of the newest checkpoint whose files are those that were written; None where there is none."""
        self.wait()
        while (step := distributed.agree(self._manager.latest_step(), f"the checkpoints in {self.folder}")) is not None:
            folder = self.folder / str(step)
            fault = self._fault(step, "" if step in self._found else part) if distributed.is_leader() else None
            fault = distributed.agree(fault, f"whether {folder} is damaged")
            if fault is None:
                try:
                    with _clear_errors(folder, "read"):
                        return read(step)
                except _Unreadable as error:
                    if self._is_signed(step):  # its bytes are right: it is not the checkpoint that is at fault
                        raise
                    if self._direct or distributed.count() > 1:
                        raise CheckpointError(f"{error}; delete {folder} to go on from the checkpoint before it.") from error
                    fault = str(error)
            self._set_aside(step, fault)
        return None

    def _is_signed(self, step: int) -> bool:
        return not self._direct and (self.folder / str(step) / _FILES).exists()

    def _fault(self, step: int, part: str) -> str | None:
        """What is wrong with the files of (a part of) a checkpoint, if it has checksums: not at gs://, nor of an earlier version."""
        path = self.folder / str(step) / _FILES
        try:
            files = listed_files(read_sealed(path)["files"]) if self._is_signed(step) else {}
            return next(faults(path.parent, {name: facts for name, facts in files.items() if name.startswith(part)}), None)
        except (ValueError, KeyError, TypeError) as error:
            return f"{path} is damaged ({error})"

    def _set_aside(self, step: int, fault: str) -> None:
        if self._whole is not None:  # the copy of what lies at a URL is downloaded again
            place = self.folder if self._url is not None else self._whole
            raise CheckpointError(f"{fault}. No other checkpoint can take its place: delete {place}, then run the same command again.")
        aside = self.folder / f".damaged-{step}"
        again = self._url is not None and not aside.exists()
        if distributed.is_leader():
            remove(aside)
            os.replace(self.folder / str(step), aside)
        distributed.barrier(f"checkpoint {step} is set aside")
        if again and self._url is not None:
            self._fetch(self._url)
        if not (self.folder / str(step)).is_dir():
            self._bad.add(step)
        self._manager.reload()
        if distributed.is_leader():
            left = self._manager.latest_step()
            then = "none is left: the stage starts from its beginning" if left is None else f"checkpoint {left} is used"
            _log.warning("%s. The checkpoint is set aside as %s; %s.", fault, aside, then)

    def _sign(self) -> None:
        """Write the checksums of the checkpoint that orbax has just written: called in its thread, before the checkpoint has its name."""
        for folder in self.folder.glob("*.orbax-checkpoint-tmp*"):
            names = [name for name in copies.files_in(folder) if "/" in name]  # orbax writes on in its notes beside, and reads none of them
            write_whole(folder / _FILES, json.dumps(sealed({"files": identities(folder, names)})))

    def _sweep(self) -> None:
        if distributed.is_leader() and not self._direct:
            shutil.rmtree(self.folder / _GONE, ignore_errors=True)
            sweep(self.folder)

    def wait(self) -> None:
        """Return once everything saved is on disk. Raises CheckpointError where that failed."""
        with _clear_errors(self.folder, "write"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """`wait`, and release the folder."""
        with _clear_errors(self.folder, "write"):
            self._manager.close()
        self._sweep()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self.close()
        except CheckpointError:
            if kind is None:  # otherwise the exception of the block is raised
                raise

    def _put(self, url: str) -> None:
        """Upload the checkpoints that are not at the URL, or not whole; remove those there (also what cannot be read) that are older."""
        here, there = set(self._manager.all_steps()), _steps_at(url)
        for step in sorted(here - (there - self._bad)):
            if step in there:
                self._remove_at(url, step)
            copies.put_folder(self.folder / str(step), remote.join(url, str(step)), last=_FILES)
            self._bad.discard(step)
        for step in sorted(step for step in there - here if step < max(here, default=0)):
            self._remove_at(url, step)

    def _remove_at(self, url: str, step: int) -> None:
        remote.remove(remote.join(url, str(step), _FILES))  # first: without it the other files are no checkpoint
        remote.remove(remote.join(url, str(step)))

    def _fetch(self, url: str) -> None:
        """Download what is missing here: another machine may have continued."""
        for step in sorted(_steps_at(url)):
            folder = self.folder / str(step)
            try:
                if not folder.is_dir():
                    copies.fetch_folder(remote.join(url, str(step)), folder, last=_FILES)
            except remote.DamagedError as fault:
                if self._whole is not None:
                    raise
                self._bad.add(step)
                _log.warning("%s The checkpoint is left out.", fault)

    def _check_room(self, items: dict[str, Any]) -> None:
        if self._direct:
            return
        needed = sum(getattr(leaf, "nbytes", 8) for leaf in jax.tree.leaves(items))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise CheckpointError(
                f"a checkpoint of {needed / 2**20:.1f} MiB does not fit: {self.folder} has {free / 2**20:.1f} MiB free; "
                "free some space or point the output folder elsewhere, then run the same command again to resume."
            )


def _steps_at(url: str) -> set[int]:
    """The steps of the complete checkpoints at a URL."""
    parts = [name.split("/") for name in remote.names(url)]
    return {int(part[0]) for part in parts if len(part) == 2 and part[0].isdigit() and part[1] == _FILES}


@contextmanager
def _clear_errors(folder: Path | str, verb: str) -> Iterator[None]:
    """Turn whatever orbax raises into one CheckpointError, a full disk above all."""
    try:
        yield
    except (CheckpointError, remote.RemoteError):
        raise
    except Exception as error:
        full = (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "no space left" in str(error).lower()
        reason = "the disk is full; free some space, then run the same command again to resume" if full else str(error) or repr(error)
        ours = isinstance(error, MemoryError | PermissionError) or "RESOURCE_EXHAUSTED" in str(error)
        kind = CheckpointError if verb != "read" or full or ours else _Unreadable
        raise kind(f"cannot {verb} checkpoint in {folder}: {reason}") from error
