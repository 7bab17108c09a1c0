"""Save and restore training state with its step, so that a killed run continues with the same bits.

A checkpoint is a folder named after its step with the items `params`, `opt_state`, `state` (step and controller) and `meta` (JSON). Every
item is stored as a flat table from path ("layers/0/query/kernel") to array, so that a checkpoint does not depend on the Python types of an
optimizer's state and the parameters can be read alone. Random keys and data positions are not in it: they derive from the step.
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
from jaxrlhf.storage import copies, remote
from jaxrlhf.types import Params, TrainState

_FILES = "files.json"  # put after all other files of a checkpoint, at a URL


@cache
def _orbax() -> Any:
    """The library that writes checkpoints. Importing it takes a second: who has no checkpoints does without.

    It logs a failed background write some ten times with its traceback; that is raised here once, as a CheckpointError.
    """
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)
    return ocp


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says why and what to do."""


class Checkpoints:
    """The checkpoints of one training loop in one folder; the newest `keep` stay.

        with Checkpoints(folder, keep=2) as checkpoints:
            found = checkpoints.restore(sharding.template(state, mesh))
            ...
            checkpoints.save(int(state.step), state, {"stage": "reward"})

    `save` returns once the arrays are off the device and writes in the background; leaving the block (or `wait`) finishes the writing. A
    checkpoint appears under its name by an atomic rename, so one that was half-written when the process died is never seen; what such a
    death left behind is removed in the background. One process (or one group of JAX processes) at a time may have a folder open.

    `folder` may be a URL. At gs:// every process writes its own part there itself. Elsewhere they are written on this machine and put
    there before `save` returns, the list of their files last; opening fetches what is not here, so that another machine goes on from them.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep {keep}: at least one checkpoint has to stay; try 1.")
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
            self._put(self._url)  # what did not come through the last time

    def save(self, step: int, state: TrainState, meta: dict[str, Any] | None = None) -> None:
        """Save `state` as checkpoint `step`, in the background. `meta` is anything JSON takes.

        A step that is already there is left as it is: the same step is the same state. Raises CheckpointError where the disk is full or
        an earlier save failed.
        """
        if distributed.agree(step in self._manager.all_steps(), f"checkpoint {step}"):  # saving is something that all do or none
            return
        items = _items(state)
        self._check_room(items)
        args = _orbax().args
        saves = {name: args.StandardSave(_flat(tree)) for name, tree in items.items() if jax.tree.leaves(tree)}
        with (
            ignore_compilations(),
            _clear_errors(self.folder, "write"),
        ):  # several processes cut what all of them hold, and each writes a part
            self._manager.save(step, args=args.Composite(meta=args.JsonSave(meta or {}), **saves), force=True)
        if self._url is not None and not self._direct:
            self.wait()
            with _clear_errors(self._url, "put"):
                self._put(self._url)

    def latest_step(self) -> int | None:
        """The newest finished checkpoint's step; None where there is none."""
        return self._manager.latest_step()

    def restore(self, template: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
        """(state, meta) of checkpoint `step` (default: the newest); None where there is none at all.

        `template` is a state of the wanted shapes: arrays, or ShapeDtypeStructs from `sharding.template` that say where every leaf goes;
        the mesh may differ from the one that saved. Raises CheckpointError where the shapes, types or names differ.
        """
        step = self._existing(step)
        if step is None:
            return None
        restored, meta = self._read(step, _items(template))
        state = restored["state"]
        return TrainState(state["step"], restored["params"], restored["opt_state"], state["controller"]), meta

    def restore_params(self, template: Params, step: int | None = None) -> Params | None:
        """The parameters alone, without reading the (larger) optimizer state; None where there is no checkpoint."""
        step = self._existing(step)
        return None if step is None else self._read(step, {"params": template})[0]["params"]

    def wait(self) -> None:
        """Return once everything saved is on disk. Raises CheckpointError where that failed."""
        with _clear_errors(self.folder, "write"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """`wait`, and let go of the folder."""
        with _clear_errors(self.folder, "write"):
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self.close()
        except CheckpointError:
            if kind is None:  # else the block's own exception is the one to show
                raise

    def _existing(self, step: int | None) -> int | None:
        self.wait()
        there = distributed.agree(sorted(self._manager.all_steps()), f"the checkpoints in {self.folder}")
        if step is None:
            return there[-1] if there else None
        if step not in there:
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; it has {there or 'none'}.")
        return step

    def _put(self, url: str) -> None:
        """Put there what is here alone, and remove what is there alone."""
        here, there = set(self._manager.all_steps()), _steps_at(url)
        for step in sorted(here - there):
            copies.put_folder(self.folder / str(step), remote.join(url, str(step)), last=_FILES)
        for step in sorted(there - here):
            remote.remove(remote.join(url, str(step), _FILES))  # first: without it the rest is no checkpoint
            remote.remove(remote.join(url, str(step)))

    def _fetch(self, url: str) -> None:
        """Have here what is there: another machine may have gone on since."""
        for step in sorted(_steps_at(url)):
            folder = self.folder / str(step)
            if not folder.is_dir() and copies.fetch_folder(remote.join(url, str(step)), folder, last=_FILES):
                (folder / _FILES).unlink()

    def _check_room(self, items: dict[str, Any]) -> None:
        if self._direct:
            return
        needed = sum(_bytes(leaf) for leaf in jax.tree.leaves(items))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise CheckpointError(
                f"a checkpoint of {needed / 2**20:.1f} MiB does not fit: {self.folder} has {free / 2**20:.1f} MiB free; "
                "free some space or point the output folder elsewhere, then run the same command again to resume."
            )

    def _read(self, step: int, templates: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The named items of a checkpoint in the structure of their templates, and its meta."""
        flat = {name: _flat(tree) for name, tree in templates.items()}
        with _clear_errors(self.folder / str(step), "read"):
            wanted = [name for name, table in flat.items() if table]
            described = dict(self._manager.item_metadata(step).items())
            for name in wanted:
                _compare(self.folder / str(step) / name, flat[name], _stored(described.get(name)))
            args = _orbax().args
            reads = {name: args.StandardRestore({k: _struct(v) for k, v in flat[name].items()}) for name in wanted}
            got = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore(), **reads))
        return {name: _unflat(tree, got[name] if name in wanted else {}) for name, tree in templates.items()}, got["meta"]


def _steps_at(url: str) -> set[int]:
    """The checkpoints that are whole at a URL."""
    parts = [name.split("/") for name in remote.names(url)]
    return {int(part[0]) for part in parts if len(part) == 2 and part[0].isdigit() and part[1] == _FILES}


def _items(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "opt_state": state.opt_state, "state": {"step": state.step, "controller": state.controller}}


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _flat(tree: Any) -> dict[str, Any]:
    """Path → array. A Python or numpy scalar becomes a 0-d array: the store takes scalars but does not give them back exactly."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    table = {_path(path): leaf if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else np.asarray(leaf) for path, leaf in leaves}
    if len(table) != len(leaves):
        raise ValueError("two leaves of the state have the same path; do not use '/' in the names of parameters.")
    return table


def _unflat(tree: Any, table: dict[str, Any]) -> Any:
    """The leaves of `table` in the structure of `tree`, as the kinds of number that `tree` has."""

    def leaf(path: tuple[Any, ...], like: Any) -> Any:
        value = table[_path(path)]
        return type(like)(value.item()) if isinstance(like, bool | int | float) else value

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _struct(leaf: Any) -> Any:
    """What the reader needs to know of a leaf; host arrays stay host arrays (64-bit ones would lose bits on the way to a device)."""
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf


def _bytes(leaf: Any) -> int:
    return int(getattr(leaf, "nbytes", 8))


def _stored(described: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Path → (shape, dtype) of an item as it lies on disk; empty where the checkpoint lacks the item."""
    return {} if described is None else {name: (tuple(entry.shape), np.dtype(entry.dtype)) for name, entry in dict(described.tree).items()}


def _compare(path: Path, wanted: dict[str, Any], stored: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Raise CheckpointError at the first difference: the store would cast or pad in silence."""
    way_out = "the config changed since this checkpoint; restore with the old config, or start in another folder."
    for what, names in (("lacks", wanted.keys() - stored.keys()), ("also holds", stored.keys() - wanted.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(f"checkpoint {path} {what} {shown}: {way_out}")
    for name, leaf in wanted.items():
        shape, dtype = stored[name]
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        if shape != tuple(leaf.shape) or dtype != np.dtype(leaf.dtype):
            have, want = f"{list(shape)} {dtype}", f"{list(leaf.shape)} {np.dtype(leaf.dtype)}"
            raise CheckpointError(f"checkpoint {path} holds {name} as {have}, and {want} is wanted: {way_out}")


@contextmanager
def _clear_errors(folder: Path | str, verb: str) -> Iterator[None]:
    """One clear error for whatever the store raises, a full disk above all."""
    try:
        yield
    except (CheckpointError, remote.RemoteError):
        raise
    except Exception as error:
        full = (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "no space left" in str(error).lower()
        reason = "the disk is full; free some space, then run the same command again to resume" if full else str(error) or repr(error)
        raise CheckpointError(f"cannot {verb} checkpoint in {folder}: {reason}") from error
