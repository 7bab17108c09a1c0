"""Files that are damaged are named and never used; what a killed process leaves is no dead end, and is swept by the next."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import distributed, files
from jaxrlhf.cli import main
from jaxrlhf.data.columns import write_columns
from jaxrlhf.files import finished_folder, replacing, write_whole
from jaxrlhf.models.hub import resolve
from jaxrlhf.storage import checkpoint
from jaxrlhf.storage.checkpoint import CheckpointError, Checkpoints
from jaxrlhf.storage.record import RECORD
from jaxrlhf.storage.remote_store import RemoteStore
from jaxrlhf.storage.stage import Stage, StageError
from jaxrlhf.storage.store import Store
from jaxrlhf.types import TrainState

WAYS = ("missing", "empty", "cut", "flipped", "garbage")
SFT = Stage("sft", "model", "sft", {"steps": 3})


def damage(file: Path, way: str) -> None:
    raw = file.read_bytes()
    middle = len(raw) // 2
    if way == "missing":
        file.unlink()
    else:
        flipped = raw[:middle] + bytes([raw[middle] ^ 0x10]) + raw[middle + 1 :]
        file.write_bytes({"empty": b"", "cut": raw[:middle], "flipped": flipped, "garbage": np.random.default_rng(0).bytes(len(raw))}[way])


def state_at(step):
    return TrainState(jnp.int32(step), {"w": jnp.linspace(0.1, 1, 300) * step}, {"m": jnp.full(3, 0.1) * step}, {})


def found_in(folder, **how):
    """The step of the newest checkpoint that is read; its arrays are those of that step, whatever was damaged."""
    with Checkpoints(folder, **how) as checkpoints:
        found = checkpoints.restore(state_at(0))
    if found is None:
        return None
    step = int(found[0].step)
    want = state_at(step)
    assert (
        found[1] == {"n": step}
        and (found[0].params["w"] == want.params["w"]).all()
        and (found[0].opt_state["m"] == want.opt_state["m"]).all()
    )
    return step


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder of the checkpoints 1 and 2, made once."""
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_at(step), {"n": step})
    return folder


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(two, tmp_path, caplog):
    """Each kind of file of the newest, damaged so that orbax sees it or does not; nothing of it is ever read as if it were whole."""
    places = sorted(str(path.relative_to(two)) for path in (two / "2").rglob("*") if path.is_file())
    places = [place for place in places if not place.startswith(("2/opt_state", "2/state"))]  # as params
    assert sum("ocdbt.process_0/d/" in place for place in places) >= 2 and "2/files.json" in places
    for number, place in enumerate(places):
        way = "flipped" if "process_0/d/" in place else WAYS[number % len(WAYS)]
        folder = tmp_path / str(number)
        shutil.copytree(two, folder)
        damage(folder / place, way)
        unread = place.count("/") == 1 and (
            place != "2/files.json" or way == "missing"
        )  # orbax's own notes; a list of files that is not there
        caplog.clear()
        assert found_in(folder) == (2 if unread else 1), (place, way)
        assert unread or (str(folder / place) in caplog.text and "; checkpoint 1 is used" in caplog.text)
        assert (folder / ".damaged-2").is_dir() == (not unread)


def test_where_no_checkpoint_is_left_the_stage_begins_anew_and_the_step_can_be_saved_again(two, tmp_path, caplog):
    shutil.copytree(two, tmp_path / "x")
    for step in ("1", "2"):
        damage(tmp_path / "x" / step / "meta" / "metadata", "cut")
    with Checkpoints(tmp_path / "x") as checkpoints:
        assert checkpoints.newest() is None and "none is left: the stage starts from its beginning" in caplog.text
        checkpoints.save(2, state_at(2), {"n": 2})
    assert found_in(tmp_path / "x") == 2
    with Checkpoints(tmp_path / "x") as checkpoints:
        checkpoints.save(3, state_at(3), {"n": 3})
        checkpoints.prune()
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["3"]  # of a finished training the newest stays, and nothing of its past


def test_where_another_checkpoint_would_be_another_result_damage_is_an_error(two, tmp_path):
    shutil.copytree(two, tmp_path / "x")
    file = next((tmp_path / "x" / "2" / "params" / "ocdbt.process_0" / "d").iterdir())
    damage(file, "flipped")
    with pytest.raises(CheckpointError, match=rf"{file} is damaged: .*: delete /the/stage, then run the same command again"):
        found_in(tmp_path / "x", whole="/the/stage")
    assert (tmp_path / "x" / "2").is_dir()  # nothing was moved: the next process says the same


def test_what_is_looked_up_of_a_checkpoint_that_was_saved_here_costs_no_reading_of_its_arrays(two, tmp_path, monkeypatch):
    """The look at held-out rows asks for the best figure so far, again and again."""
    read, look = [], checkpoint.faults
    monkeypatch.setattr(checkpoint, "faults", lambda folder, files: look(folder, read.append({*files}) or files))
    shutil.copytree(two, tmp_path / "x")
    with Checkpoints(tmp_path / "x") as checkpoints:
        assert checkpoints.newest() == {"n": 2} and any(name.startswith("params/") for name in read[-1])  # another process wrote it
        checkpoints.save(3, state_at(3), {"n": 3})
        assert checkpoints.newest() == {"n": 3} and {name.split("/")[0] for name in read[-1]} == {"meta"}
        assert checkpoints.restore(state_at(0))[1] == {"n": 3} and any(name.startswith("params/") for name in read[-1])


def test_a_checkpoint_without_checksums_is_used_if_it_can_be_read(two, tmp_path, caplog):
    """Of an earlier version, or half-removed by one."""
    shutil.copytree(two, tmp_path / "x")
    for step in ("1", "2"):
        (tmp_path / "x" / step / "files.json").unlink()
    assert found_in(tmp_path / "x") == 2
    shutil.rmtree(tmp_path / "x" / "2" / "opt_state")
    assert found_in(tmp_path / "x") == 1 and "2/opt_state is missing" in caplog.text


def built(store, **how):
    def fn(folder):
        (folder / "model.safetensors").write_bytes(bytes(range(256)))
        (folder / "metrics.jsonl").write_text('{"loss": 1.5}\n')
        with Checkpoints(store.state(folder)) as checkpoints:
            checkpoints.save(1, state_at(1), {"n": 1})
        return {"loss": 0.12345, "name": "π"}

    return store.build(SFT, fn, **how)


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_file_of_a_finished_stage_is_named(tmp_path, way):
    """A size is seen when the stage is found, a content when it is read; of stage.json both at once."""
    done = Store(tmp_path).build(SFT, lambda folder: (folder / "model.safetensors").write_bytes(bytes(range(256))) and {"loss": 0.12345})
    file = done.place / "model.safetensors"
    whole = file.read_bytes()
    damage(file, way)
    with pytest.raises(StageError, match=rf"{file} is .*; delete {done.place} to build stage sft again"):
        found = Store(tmp_path).find(SFT)
        assert found is not None and way in ("flipped", "garbage")  # a stat does not see those
        found.folder  # noqa: B018
    file.write_bytes(whole)
    assert Store(tmp_path).find(SFT).folder == done.place
    damage(done.place / RECORD, way)
    with pytest.raises(StageError, match=rf"{done.place / RECORD} .*; delete {done.place} to build"):
        Store(tmp_path).find(SFT)


def test_a_figure_of_a_record_that_is_another_is_seen_and_a_record_without_checksums_is_taken(tmp_path):
    done = Store(tmp_path).build(SFT, lambda folder: {"loss": 0.12345})
    record = done.place / RECORD
    text = record.read_text()
    record.write_text(text.replace("0.12345", "0.12346"))
    with pytest.raises(StageError, match=r"it is damaged: its content is another than was written"):
        Store(tmp_path).find(SFT)
    old = {name: value for name, value in json.loads(text).items() if name not in ("seal", "files")}
    record.write_text(json.dumps(old))
    assert Store(tmp_path).find(SFT).folder == done.place


def test_damaged_metrics_of_a_finished_stage_block_nothing(tmp_path, caplog):
    done = built(Store(tmp_path))
    assert done.metrics == done.place / "metrics.jsonl"
    for way in ("flipped", "missing"):
        damage(done.place / "metrics.jsonl", way)
        found = Store(tmp_path).find(SFT)
        assert found.folder == done.place and found.metrics is None
        assert f"{done.place / 'metrics.jsonl'} is" in caplog.text and "the curves of stage sft are left out" in caplog.text


def killed_in_removing(monkeypatch, what):
    """Whoever removes a folder of this name dies with half of its files gone."""
    rmtree = shutil.rmtree

    def half(path, *rest, **options):
        if what not in Path(path).name or not Path(path).exists():
            return rmtree(path, *rest, **options)
        for file in sorted(file for file in Path(path).rglob("*") if file.is_file())[::2]:
            file.unlink()
        raise SystemExit("killed")

    monkeypatch.setattr(shutil, "rmtree", half)


def test_a_stop_while_training_state_is_removed_is_no_dead_end(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_in_removing(patch, "checkpoint")
        with pytest.raises(SystemExit):
            built(Store(tmp_path), keep_state=False)
    assert list((tmp_path / SFT.hash).glob(".checkpoint.*.gone"))
    done = built(Store(tmp_path), keep_state=False)
    assert done.cached and sorted(path.name for path in done.folder.iterdir()) == ["metrics.jsonl", "model.safetensors", RECORD]
    kept = Store(tmp_path / "kept")
    assert found_in(kept.state_of(built(kept))) == 1  # and where it is to be kept it is


def test_a_stop_before_training_state_is_removed_leaves_none_behind(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_tidy", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            built(Store(tmp_path), keep_state=False)
    assert (tmp_path / SFT.hash / "checkpoint" / "1").is_dir() and not any(
        "check" in name for name in Store(tmp_path).find(SFT).record["files"]
    )
    assert not (built(Store(tmp_path), keep_state=False).folder / "checkpoint").exists()


def test_a_stop_while_an_old_checkpoint_is_removed_is_no_dead_end(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_in_removing(patch, ".gone")
        with pytest.raises(SystemExit), Checkpoints(tmp_path, keep=1) as checkpoints:
            for step in (1, 2, 3):
                checkpoints.save(step, state_at(step), {"n": step})
    assert (tmp_path / ".gone").is_dir()
    assert found_in(tmp_path) == 2 and [path.name for path in tmp_path.iterdir()] == ["2"]


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_dead_process_left_is_swept_and_that_of_a_living_one_is_not(tmp_path, dead):
    here = files._host()
    left, living = (tmp_path / f".summary.json.{here}-{process}-0123abcd.partial" for process in (dead, os.getppid()))
    other, elsewhere = (
        tmp_path / f".another.json.{here}-{dead}-0123abcd.partial",
        tmp_path / f".summary.json.00000000-{dead}-0123abcd.partial",
    )
    earlier = tmp_path / f".summary.json.{dead}.partial"  # of a version that did not say on which host
    for path in (left, living, other, elsewhere, earlier):
        path.touch()
    write_whole(tmp_path / "summary.json", "{}")
    # another.json is swept by who writes it, and what a process elsewhere writes by processes there
    assert not left.exists() and all(path.exists() for path in (living, other, elsewhere, earlier))
    folder = tmp_path / f".model.{here}-{dead}-0123abcd.partial"
    folder.mkdir()
    with finished_folder(tmp_path / "model") as work:
        (work / "a").touch()
    assert not folder.exists() and (tmp_path / "model" / "a").exists()


def test_processes_of_one_number_and_host_do_not_take_each_others_files(tmp_path, monkeypatch):
    """Containers count their processes from 1, and several may have one host name."""
    with finished_folder(tmp_path / "model") as first, replacing(tmp_path / "summary.json") as one:
        (first / "a").touch()
        one.touch()
        with finished_folder(tmp_path / "model") as second, replacing(tmp_path / "summary.json") as other:
            (second / "b").touch()
            other.write_text("other")
            assert first != second and one != other
        assert (first / "a").exists() and one.exists()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["a"]
    name, stat = files._host(), os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, *rest, **how: stat("/proc/self/exe" if path == "/proc/self/ns/pid" else path, *rest, **how)
    )
    assert files._host() != name  # as in a container with the name of its host


def test_what_another_user_left_stays(tmp_path, dead, monkeypatch):
    left = tmp_path / f".summary.json.{files._host()}-{dead}-0123abcd.partial"
    left.touch()

    def refused(path, *rest, **how):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        files.sweep(tmp_path, "summary.json")
    assert left.exists()


def test_what_a_stage_was_left_with_is_swept_by_the_next_process(tmp_path):
    store = Store(tmp_path)
    names = (
        "..model.1f2e3d4c",
        "..model.00000000-77-0123abcd.partial",
        "..model.77.partial",
        "..model.old",
        ".out.txt.78.partial",
        ".checkpoint.79.gone",
    )

    def litter(folder):
        for name in names:
            (folder / name).mkdir(parents=True)
            (folder / name / "x").touch()

    litter(tmp_path / f".partial-{SFT.hash}")
    done = store.build(SFT, lambda folder: (folder / ".mine").touch())
    assert sorted(path.name for path in done.folder.iterdir()) == [".mine", RECORD]
    litter(done.place)
    assert sorted(path.name for path in store.build(SFT, lambda folder: None).folder.iterdir()) == [".mine", RECORD]


def test_a_folder_that_was_being_replaced_comes_back(tmp_path, monkeypatch):
    """Killed between the two renames: the next process finds the old one, and then replaces it or does not."""
    with finished_folder(tmp_path / "model") as work:
        (work / "old").touch()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "rename", lambda *_: sys.exit("killed"))
        with finished_folder(tmp_path / "model") as work:
            (work / "new").touch()
    assert not (tmp_path / "model").exists()
    with pytest.raises(InterruptedError), finished_folder(tmp_path / "model"):
        raise InterruptedError
    assert (tmp_path / "model" / "old").exists() and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_is_read_once_a_process(tmp_path, monkeypatch):
    done = Store(tmp_path).build(SFT, lambda folder: (folder / "x").write_bytes(b"123") and None)
    read, digest = [], files._digest_of_version
    monkeypatch.setattr(files, "_digest_of_version", lambda file, *version: digest(file, *version))
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *rest, **how: read.append(self.name) or opened(self, *rest, **how))
    for _ in range(3):
        assert done.folder
    assert read == ["x"]


def test_a_model_folder_that_is_a_damaged_stage_is_not_loaded(tmp_path):
    """Also by who reads it by its path: `jaxrlhf.load`, evaluate, generate. A copy that was changed on purpose says how to say so."""
    done = Store(tmp_path).build(SFT, lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}') and None)
    assert resolve(done.place) == done.place
    (done.place / "config.json").write_text('{"model_type": "gpt3"}')
    with pytest.raises(StageError, match=r"config\.json is damaged: .* If it is a copy that you changed, delete its stage\.json"):
        resolve(done.place)
    (done.place / RECORD).unlink()
    assert resolve(done.place) == done.place


def test_json_of_others_is_not_taken_for_a_record(tmp_path, capsys):
    run = tmp_path / "run"
    for n, body in enumerate(([1], {"files": ["a"]}, {"files": {"a": "b"}}, {"files": {"a": [True, "b"]}}, {"files": 3})):
        for name in ("index.json", "header.json", "files.json"):
            write_whole(run / str(n) / name, json.dumps(body))
    assert main(["verify", str(run)]) == 0
    assert "15 more have no checksum and were not verified: files.json, header.json, index.json" in capsys.readouterr().out
    write_whole(run / "5" / "index.json", "{")  # may be ours
    write_whole(run / "6" / RECORD, '{"files": ["a"]}')
    assert main(["verify", str(run)]) == 1
    assert f"{run / '6' / RECORD} cannot be read (its `files` are not names" in (said := capsys.readouterr().out) and "2 faults" in said


@pytest.mark.parametrize("listed", [["a"], {"a": "b"}, {"a": [1, 2]}, 3])
def test_a_record_whose_files_are_no_list_of_files_is_named(tmp_path, listed):
    done = Store(tmp_path).build(SFT, lambda folder: {})
    record = json.loads((done.place / RECORD).read_text()) | {"files": listed}
    record.pop("seal")
    write_whole(done.place / RECORD, json.dumps(record))
    with pytest.raises(StageError, match=r"stage\.json cannot be used \(its `files` are not names .*delete"):
        Store(tmp_path).find(SFT)


def test_a_copy_of_its_own_is_verified_by_every_process(tmp_path, monkeypatch):
    done = Store(tmp_path).build(SFT, lambda folder: (folder / "x").write_bytes(b"123") and None)
    damage(done.place / "x", "flipped")
    monkeypatch.setattr(distributed, "is_leader", lambda: False)
    done.check()  # the leader's work: all read the same
    with pytest.raises(StageError, match="x is damaged"):
        replace(done, apart=True).check()
    assert RemoteStore.apart and not Store.apart


def test_verify_reads_everything_and_names_each_fault(tmp_path, capsys):
    run, store = tmp_path / "runs" / "toy", Store(tmp_path / "runs" / ".stages")
    done = built(store)
    other = store.build(Stage("pairs", "data", "pairs", {}), lambda folder: (folder / "train.parquet").write_bytes(b"0123") and None)
    for number, stage in enumerate((done, other)):
        store.link(stage, run, number)
    write_whole(run / "summary.json", "{}")
    write_columns(store.root / "columns" / "logps", ["a", "b"], {"logp": np.zeros(2)}, {"dataset": "d"})
    assert main(["verify", str(run)]) == 0
    said = capsys.readouterr().out
    listed = len(done.record["files"]) + len(other.record["files"])
    assert f"{listed} files, " in said and "all as they were written\n1 more have no checksum and were not verified: summary.json\n" in said
    state = next((done.place / "checkpoint" / "1" / "params" / "ocdbt.process_0" / "d").iterdir())
    shard = store.root / "columns" / "logps" / "columns-00000.parquet"
    for file, way in ((state, "flipped"), (other.place / "train.parquet", "cut"), (shard, "garbage")):
        damage(file, way)
    assert main(["verify", str(run), str(store.root)]) == 1
    said = capsys.readouterr().out.splitlines()
    flipped, again = "is damaged: its content (sha256) is another than was written", "and the same run makes it again."
    cut = "is damaged: it has 2 bytes, and was written with 4"
    expected = ((state, flipped, done.place), (other.place / "train.parquet", cut, other.place), (shard, flipped, shard.parent))
    assert sorted(said[:3]) == sorted(f"{file} {fault}; delete {folder}, {again}" for file, fault, folder in expected)
    assert said[3].endswith(": 3 faults")
    damage(done.place / RECORD, "flipped")
    shutil.rmtree(other.place)
    assert main(["verify", str(run)]) == 1
    said = capsys.readouterr().out
    assert f"{done.place / RECORD} cannot be read (" in said and "01-pairs leads nowhere; the same run makes it again" in said
    assert main(["verify", str(tmp_path / "none")]) == 1 and "is not a folder" in capsys.readouterr().err
