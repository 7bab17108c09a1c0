"""What the attacks share: snapshots of a folder as a kill would leave it, a run's content, and the steps that a run took."""

import json
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from jaxrlhf import sharding
from jaxrlhf.monitoring.runlog import StageLog
from jaxrlhf.pipeline.run import run
from jaxrlhf.recipe import from_mapping

WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"}
_watch: Callable[[str, tuple], None] | None = None  # sys.addaudithook has no opposite: one hook, and what it calls now
_inside = threading.local()


def _hook(event: str, args: tuple) -> None:
    if _watch is None or getattr(_inside, "on", False) or not (event in WRITES or event == "open"):
        return
    if event == "open" and not _writes(args):
        return
    _inside.on = True
    try:
        _watch(event, args)
    finally:
        _inside.on = False


def _writes(args: tuple) -> bool:
    _, mode, flags = args
    return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))


sys.addaudithook(_hook)


@contextmanager
def file_operations(folder: Path, see: Callable[[str, str], None]) -> Iterator[None]:
    """Call `see(event, path)` before every operation of this process that changes what lies under `folder`."""
    global _watch

    def watch(event: str, args: tuple) -> None:
        paths = [
            os.fspath(path) for path in args[: 1 + (event in ("os.rename", "os.symlink", "os.link"))] if isinstance(path, str | os.PathLike)
        ]
        inside = [path for path in paths if os.path.abspath(path).startswith(f"{folder}/")]
        if inside:
            see(event, inside[-1])

    _watch = watch
    try:
        yield
    finally:
        _watch = None


def copy_as_it_is(folder: Path, target: Path) -> None:
    """A copy of a folder in which other threads may be at work: what vanishes on the way was not there."""
    with suppress(shutil.Error):  # which it raises at the end, when all the rest is copied
        shutil.copytree(folder, target, symlinks=True, copy_function=_copy)


def _copy(source: str, target: str, **rest: Any) -> str:
    del rest
    try:
        return shutil.copy2(source, target, follow_symlinks=False)
    except FileNotFoundError:
        return target


@contextmanager
def steps_taken() -> Iterator[Counter]:
    """How often each (stage, round, step) was taken in the block."""
    taken: Counter = Counter()
    plain = StageLog.dispatched

    def counted(self: StageLog, n: int) -> None:
        taken[self._name, self._round, n] += 1
        plain(self, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageLog, "dispatched", counted)
        yield taken


@contextmanager
def devices(count: int) -> Iterator[None]:
    """Runs of the block see the first `count` devices."""
    import jax

    make = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        for module in (sharding.mesh, sharding):
            patch.setattr(module, "make_mesh", lambda *axes: make(*axes, devices=jax.devices()[:count]))
        yield


def run_quietly(raw: dict[str, Any]) -> Path:
    return run(from_mapping(raw))


TIMES = ("seconds", "time/", "compile", "resumed", "_seconds", "per_second")


def content(store: Path) -> dict[str, Any]:
    """What the finished stages of a store are: bytes of each file, and of records and metrics all but times and their checksums."""
    found: dict[str, Any] = {}
    for path in sorted(store.rglob("*")):
        name = path.relative_to(store).as_posix()
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(store).parts):
            continue
        found[name] = _without_times(path) if path.name in ("stage.json", "metrics.jsonl") else path.read_bytes()
    return found


def _without_times(path: Path) -> list[Any]:
    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: kept(v) for k, v in value.items() if not any(part in k for part in TIMES) and k not in ("finished", "files", "seal")}
        return value

    try:
        text = path.read_text(encoding="utf-8")
        return [kept(json.loads(line)) for line in text.split("\n") if line] if path.suffix == ".jsonl" else [kept(json.loads(text))]
    except ValueError:  # damaged
        return [path.read_bytes()]


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
