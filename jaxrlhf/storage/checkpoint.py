"""Save and restore training state with orbax, so that a killed run continues with the same bits.

A checkpoint is a folder named after its step with the items `params`, `opt_state`, `state` (step and controller) and `meta` (JSON). Every
item is stored as a flat table from path ("layers/0/query/kernel") to array, so that it does not depend on the Python types of an
optimizer's state. Random keys and data positions are not stored: they derive from the step.
"""

import errno
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import distributed
from jaxrlhf.monitoring.recompiles import ignore_compilations
from jaxrlhf.sharding import path_of
from jaxrlhf.storage import copies, remote
from jaxrlhf.types import TrainState

_FILES = "files.json"  # at a URL: uploaded after all other files of a checkpoint


@cache
def _orbax() -> Any:
    """The library that writes checkpoints. Importing it takes a second, which a program without checkpoints saves.

    Orbax logs a failed background write about ten times, with tracebacks; it is raised here once, as a CheckpointError.
    """
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)
    return ocp


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says why and what to do."""


class Checkpoints:
    """The checkpoints of one training loop in one folder; the newest `keep` are kept.

        with Checkpoints(folder, keep=2) as checkpoints:
            found = checkpoints.restore(sharding.template(state, mesh))
            ...
            checkpoints.save(int(state.step), state, {"stage": "reward"})

    `save` returns once the arrays are copied off the device and writes in the background; `wait`, or the end of the block, finishes the
    writing. A checkpoint gets its name by an atomic rename, so a half-written one is never seen; orbax removes it. One process (or one
    group of JAX processes) at a time may have a folder open.

    `folder` may be a URL. To gs:// every process writes its own part directly. For other protocols a checkpoint is written on this machine
    and uploaded before `save` returns, the list of its files last; opening downloads what is missing here, so another machine can resume.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep {keep}: at least one checkpoint must be kept; try 1.")
        self._url = str(folder) if remote.is_url(str(folder)) else None
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
            ocp = _orbax()
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
            handlers: Any = {name: ocp.StandardCheckpointHandler() for name in ("params", "opt_state", "state")}
            handlers["meta"] = ocp.JsonCheckpointHandler()
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        if self._url is not None and not self._direct:
            self._put(self._url)  # what an interrupted upload left out

    def save(self, step: int, state: TrainState, meta: dict[str, Any] | None = None) -> None:
        """Save `state` as checkpoint `step`, in the background. `meta` is any JSON value.

        A step that exists is left as it is: the same step is the same state. Raises CheckpointError where the disk is full or an earlier
        save failed.
        """
        if distributed.agree(step in self._manager.all_steps(), f"checkpoint {step}"):  # all processes save, or none
            return
        items = _items(state)
        self._check_room(items)
        args = _orbax().args
        saves = {name: args.StandardSave(_flat(tree)) for name, tree in items.items() if jax.tree.leaves(tree)}
        with ignore_compilations(), _clear_errors(self.folder, "write"):  # orbax slices what several processes hold, and that compiles
            self._manager.save(step, args=args.Composite(meta=args.JsonSave(meta or {}), **saves), force=True)
        if self._url is not None and not self._direct:
            self.wait()
            with _clear_errors(self._url, "put"):
                self._put(self._url)

    def restore(self, template: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """(state, meta) of the newest checkpoint; None where there is none.

        `template` is a state of the same shapes: arrays, or ShapeDtypeStructs from `sharding.template` that say where every leaf goes;
        the mesh may differ from the one that saved. Raises CheckpointError where shapes, dtypes or names differ.
        """
        self.wait()
        step = distributed.agree(self._manager.latest_step(), f"the checkpoints in {self.folder}")
        if step is None:
            return None
        folder, items = self.folder / str(step), _items(template)
        flat = {name: _flat(tree) for name, tree in items.items()}
        with _clear_errors(folder, "read"):
            described = dict(self._manager.item_metadata(step).items())
            for name, table in flat.items():
                if table:
                    _compare(folder / name, table, _stored(described.get(name)))
            args = _orbax().args
            reads = {name: args.StandardRestore({k: _struct(v) for k, v in table.items()}) for name, table in flat.items() if table}
            got = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore(), **reads))
        back = {name: _unflat(tree, got[name] if flat[name] else {}) for name, tree in items.items()}
        return TrainState(back["state"]["step"], back["params"], back["opt_state"], back["state"]["controller"]), got["meta"]

    def newest(self) -> dict[str, Any] | None:
        """The `meta` of the newest checkpoint; None where there is none."""
        self.wait()
        step = distributed.agree(self._manager.latest_step(), f"the newest in {self.folder}")
        if step is None:
            return None
        with _clear_errors(self.folder / str(step), "read"):
            return self._manager.restore(step, args=_orbax().args.Composite(meta=_orbax().args.JsonRestore()))["meta"]

    def wait(self) -> None:
        """Return once everything saved is on disk. Raises CheckpointError where that failed."""
        with _clear_errors(self.folder, "write"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """`wait`, and release the folder."""
        with _clear_errors(self.folder, "write"):
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self.close()
        except CheckpointError:
            if kind is None:  # otherwise the exception of the block is raised
                raise

    def _put(self, url: str) -> None:
        """Upload the checkpoints that exist only here, and remove those that exist only at the URL."""
        here, there = set(self._manager.all_steps()), _steps_at(url)
        for step in sorted(here - there):
            copies.put_folder(self.folder / str(step), remote.join(url, str(step)), last=_FILES)
        for step in sorted(there - here):
            remote.remove(remote.join(url, str(step), _FILES))  # first: without it the other files are no checkpoint
            remote.remove(remote.join(url, str(step)))

    def _fetch(self, url: str) -> None:
        """Download what is missing here: another machine may have continued."""
        for step in sorted(_steps_at(url)):
            folder = self.folder / str(step)
            if not folder.is_dir() and copies.fetch_folder(remote.join(url, str(step)), folder, last=_FILES):
                (folder / _FILES).unlink()

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


def _items(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "opt_state": state.opt_state, "state": {"step": state.step, "controller": state.controller}}


def _flat(tree: Any) -> dict[str, Any]:
    """Path → array. A Python or numpy scalar becomes a 0-d array: orbax does not return scalars exactly."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    table = {path_of(path): leaf if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else np.asarray(leaf) for path, leaf in leaves}
    if len(table) != len(leaves):
        raise ValueError("two leaves of the state have the same path; do not use '/' in the names of parameters.")
    return table


def _unflat(tree: Any, table: dict[str, Any]) -> Any:
    """The leaves of `table` in the structure of `tree`, Python scalars with the type they have in `tree`."""

    def leaf(path: tuple[Any, ...], like: Any) -> Any:
        value = table[path_of(path)]
        return type(like)(value.item()) if isinstance(like, bool | int | float) else value

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _struct(leaf: Any) -> Any:
    """What orbax needs to restore a leaf; host arrays stay host arrays (64-bit ones would lose bits on a device)."""
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf


def _stored(described: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Path → (shape, dtype) of an item on disk; empty where the checkpoint lacks the item."""
    return {} if described is None else {name: (tuple(entry.shape), np.dtype(entry.dtype)) for name, entry in dict(described.tree).items()}


def _compare(path: Path, template: dict[str, Any], stored: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Raise CheckpointError at the first difference: orbax would cast or pad without a message."""
    way_out = "the config changed since this checkpoint; restore with the old config, or start in another folder."
    for what, names in (("lacks", template.keys() - stored.keys()), ("also holds", stored.keys() - template.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(f"checkpoint {path} {what} {shown}: {way_out}")
    for name, leaf in template.items():
        shape, dtype = stored[name]
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        if shape != tuple(leaf.shape) or dtype != np.dtype(leaf.dtype):
            have, want = f"{list(shape)} {dtype}", f"{list(leaf.shape)} {np.dtype(leaf.dtype)}"
            raise CheckpointError(f"checkpoint {path} holds {name} as {have}, and the config needs {want}: {way_out}")


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
        raise CheckpointError(f"cannot {verb} checkpoint in {folder}: {reason}") from error
