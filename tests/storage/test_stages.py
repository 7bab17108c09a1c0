import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxrlhf import files
from jaxrlhf.storage.record import RECORD, read_record
from jaxrlhf.storage.stage import Stage, StageError, canonical_json, fingerprint
from jaxrlhf.storage.store import Store


def write(text):
    def build(folder):
        (folder / "out.txt").write_text(text)
        return {"rows": len(text)}

    return build


def never(folder):
    raise AssertionError("a finished stage was built again")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs" / ".stages")


SFT = Stage("01-sft", "model", "sft", {"learning_rate": 1e-3, "steps": 3})


def test_a_stage_is_built_once_and_its_record_says_what_it_is(store):
    done = store.build(SFT, write("hello"))
    assert not done.cached and (done.folder / "out.txt").read_text() == "hello"
    again = store.build(SFT, never)
    assert again.cached and (again.folder, again.hash, again.record) == (done.folder, done.hash, done.record)
    record = json.loads((done.folder / RECORD).read_text())
    assert record["kind"] == "model" and record["hash"] == done.folder.name == SFT.hash and record["result"] == {"rows": 5}
    assert record["config"] == {"learning_rate": 1e-3, "steps": 3} and record["parent"] is None and record["inputs"] == {}
    assert record["seconds"] >= 0 and record["finished"].endswith("Z") and record["versions"]["jax"]
    assert [p.name for p in store.root.iterdir() if not p.name.startswith(".")] == [done.hash]
    assert not list(store.root.glob(".partial-*"))


def test_the_hash_is_of_what_the_content_depends_on_and_of_nothing_else(store):
    done, other = store.build(SFT, write("a")), store.build(Stage("x", "model", "sft", {"steps": 4}), write("b"))
    base = Stage("reward", "model", "reward", {"steps": 1}, {"start": done})
    assert base.hash == Stage("another name", "model", "reward", {"steps": 1}, {"start": done}, parent="start").hash
    changed = [
        Stage("reward", "data", "reward", {"steps": 1}, {"start": done}),
        Stage("reward", "model", "ppo", {"steps": 1}, {"start": done}),
        Stage("reward", "model", "reward", {"steps": 2}, {"start": done}),
        Stage("reward", "model", "reward", {"steps": 1}, {"start": other}),
        Stage("reward", "model", "reward", {"steps": 1}, {"pairs": done}),
        Stage("reward", "model", "reward", {"steps": 1}, {"start": done}, version=2),
    ]
    assert len({base.hash, *(stage.hash for stage in changed)}) == 7
    record = store.build(Stage("reward", "model", "reward", {}, {"start": done}, parent="start"), write("c")).record
    assert record["parent"] == done.hash and record["inputs"] == {"start": done.hash}


def test_canonical_json_is_one_text_for_equal_values():
    @dataclass(frozen=True)
    class Config:
        b: tuple = (1, 2)
        a: float = 0.1

    assert canonical_json(Config()) == canonical_json({"a": 0.1, "b": [1, 2]}) == '{"a":0.1,"b":[1,2]}'
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) == "43258cff783fe7036d8a"
    for bad in (float("nan"), object(), Path("x")):
        with pytest.raises(StageError, match="cannot be hashed"):
            canonical_json({"x": bad})


def test_a_failed_stage_keeps_its_work_and_is_continued(store):
    def fails(folder):
        (folder / "checkpoint").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as raised:
        store.build(SFT, fails)
    assert "stage 01-sft is not finished" in raised.value.__notes__[0] and "the disk is full: free some space" in raised.value.__notes__[0]
    assert store.find(SFT) is None and not (store.root / SFT.hash).exists()

    def continues(folder):
        assert (folder / "checkpoint").read_text() == "half"
        (folder / "checkpoint").write_text("whole")

    done = store.build(SFT, continues)
    assert (done.folder / "checkpoint").read_text() == "whole" and done.record["resumed"] and done.record["result"] is None


def test_a_result_that_is_no_json_leaves_no_finished_stage(store):
    with pytest.raises(TypeError):
        store.build(SFT, lambda folder: {"x": object()})
    with pytest.raises(ValueError):
        store.build(SFT, lambda folder: {"x": float("nan")})
    assert store.find(SFT) is None
    assert store.build(SFT, lambda folder: {"x": 1}).record["result"] == {"x": 1}


PROCESS = """
import sys, time, os, signal, logging
from pathlib import Path
from jaxrlhf.storage.stage import Stage
from jaxrlhf.storage.store import Store
logging.basicConfig(level=logging.WARNING, format="%(message)s")
mode, root = sys.argv[1:]
def build(folder):
    with open(folder / "log", "a") as log: log.write(mode + "\\n")
    (Path(root) / "begun").touch()
    if mode == "killed": os.kill(os.getpid(), signal.SIGKILL)
    while mode == "first" and not (Path(root) / "waited for").exists(): time.sleep(0.01)
done = Store(root).build(Stage("01-sft", "model", "sft", {"learning_rate": 1e-3, "steps": 3}), build)
print(done.cached, done.record["resumed"])
"""


def start(mode, store):
    store.root.mkdir(parents=True, exist_ok=True)
    arguments = [sys.executable, "-c", PROCESS, mode, str(store.root)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_stage_is_continued_by_the_next_process(store):
    killed = start("killed", store)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and store.find(SFT) is None
    second = start("second", store)
    assert second.communicate()[0].split() == ["False", "True"]
    assert (store.root / SFT.hash / "log").read_text() == "killed\nsecond\n"


def test_two_processes_build_a_stage_once(store):
    first = start("first", store)
    while not (store.root / "begun").exists() and first.poll() is None:
        time.sleep(0.01)
    second = start("second", store)
    assert second.stderr is not None
    said = next((line for line in second.stderr if line.startswith("stage 01-sft")), "")
    (store.root / "waited for").touch()
    assert f"stage 01-sft is being built by another process (process {first.pid} on" in said
    assert first.communicate()[0].split() == ["False", "False"]
    assert second.communicate()[0].split() == ["True", "False"]
    assert (store.root / SFT.hash / "log").read_text() == "first\n"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / RECORD).write_text("{half"), "cannot be read .* delete .* to build the stage again"),
        (lambda f: (f / RECORD).unlink(), "is missing, so the stage is not complete; delete"),
        (lambda f: (f / RECORD).write_text("{}"), "not the record of a finished stage"),
        (lambda f: (f / RECORD).write_text('{"finished": "now", "hash": "other"}'), "the folder was renamed"),
    ],
)
def test_a_damaged_record_is_a_clear_error_with_a_way_out(store, damage, message):
    done = store.build(SFT, write("x"))
    damage(done.folder)
    with pytest.raises(StageError, match=message):
        store.build(SFT, never)
    shutil.rmtree(done.folder)  # the way out
    assert store.build(SFT, write("x")).hash == done.hash


def test_links_are_relative_and_survive_moving_the_runs(store, tmp_path):
    done = store.build(SFT, write("x"))
    link = store.link(done, tmp_path / "runs" / "toy", 1)
    assert link.name == "01-01-sft" and link.is_symlink() and os.readlink(link).startswith("..")
    other = store.build(Stage("01-sft", "model", "sft", {"steps": 9}), write("y"))
    assert (store.link(other, tmp_path / "runs" / "toy", 1) / "out.txt").read_text() == "y"  # replaced, not nested
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    moved = tmp_path / "moved" / "toy" / "stages" / link.name
    assert read_record(moved)["hash"] == other.hash
    assert [p.name for p in moved.parent.iterdir()] == [link.name]


def test_standalone_copies_and_a_filesystem_without_links_does_too(store, tmp_path, monkeypatch, caplog):
    done = store.build(SFT, write("x"))
    store.link(done, tmp_path / "run", 1)
    copy = store.link(done, tmp_path / "run", 1, standalone=True)
    assert not copy.is_symlink() and (copy / "out.txt").read_text() == "x"
    (copy / "mine").touch()
    assert (store.link(done, tmp_path / "run", 1, standalone=True) / "mine").exists()  # an equal copy is left alone
    (copy.parent / f".01-01-sft.{files._host()}-99999999-0123abcd.gone").mkdir()  # what a process was killed in removing
    assert store.link(done, tmp_path / "run", 1).is_symlink()  # and a link replaces a copy
    assert [path.name for path in copy.parent.iterdir()] == ["01-01-sft"]

    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    copy = store.link(done, tmp_path / "other", 1)
    assert not copy.is_symlink() and read_record(copy)["hash"] == done.hash
    assert "takes no symbolic links (Operation not permitted); stage 01-sft is copied" in caplog.text


def test_a_stage_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="kind 'models' is none of model, data, report"):
        Stage("x", "models", "f", {})
    with pytest.raises(ValueError, match="parent 'sft' is not among its inputs"):
        Stage("x", "model", "f", {}, parent="sft")
