"""Runs at URLs: an object store without rename and links, uploads that are cut off, and a second machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bucket as object_store
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import distributed
from jaxrlhf.data.sources import iter_rows, source_files
from jaxrlhf.storage import copies, remote
from jaxrlhf.storage.checkpoint import Checkpoints
from jaxrlhf.storage.remote import RemoteError
from jaxrlhf.storage.remote_store import RemoteStore
from jaxrlhf.storage.run_folder import check_seen_by_all, fetch_run
from jaxrlhf.storage.stage import Stage, StageError
from jaxrlhf.types import TrainState


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(name): from now on this is the machine of that name, with its own disk; the bucket is the same."""
    monkeypatch.setenv("BUCKET_ROOT", str(tmp_path / "bucket"))

    def use(name: str) -> Path:
        monkeypatch.setenv("JAXRLHF_WORK", str(tmp_path / name))
        return tmp_path / name

    use("one")
    return use


def sft(steps=3):
    return Stage("01-sft", "model", "sft", {"steps": steps})


def made(text):
    def fn(folder):
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "model.safetensors").write_text(text)
        return {"text": text}

    return fn


def bucket(tmp_path, *names):
    return tmp_path.joinpath("bucket", *names)


def test_urls_and_paths():
    assert remote.is_url("gs://b/x") and remote.is_url("memory://x") and not remote.is_url("file:///x") and not remote.is_url("a/b")
    assert not remote.is_url(Path("gs:/b")) and not remote.is_url("C:\\x") and not remote.is_url(None)
    assert remote.as_path("file:///a/b") == Path("/a/b") and remote.as_path("runs") == Path("runs")
    assert copies.work_folder("gs://b/x/") == copies.work_folder("gs://b/x") != copies.work_folder("gs://b/y")


def test_a_stage_is_put_record_last_and_found_by_another_machine(tmp_path, machine):
    done = RemoteStore("bucket://runs/.stages").build(sft(), made("weights"))
    there = bucket(tmp_path, "runs", ".stages", sft().hash)
    record = json.loads((there / "stage.json").read_text())
    assert list(record["files"]) == ["sub/model.safetensors"] and record["files"]["sub/model.safetensors"][0] == 7
    machine("two")
    found = RemoteStore("bucket://runs/.stages").build(sft(), lambda folder: pytest.fail("built again"))
    assert found.cached and found.folder != done.folder and (found.folder / "sub" / "model.safetensors").read_text() == "weights"
    assert found.record["result"] == {"text": "weights"}


def test_what_is_finished_here_and_not_there_is_put_the_next_time(tmp_path, machine, monkeypatch):
    """The upload breaks off: nothing there looks finished, and the next run puts it without building it."""
    monkeypatch.setenv("BUCKET_END", "model.safetensors")
    monkeypatch.setenv("BUCKET_RAISES", "1")
    with pytest.raises(RemoteError, match=r"cannot write bucket://s/.*connection reset by peer. Run the same command again"):
        RemoteStore("bucket://s").build(sft(), made("weights"))
    there = bucket(tmp_path, "s", sft().hash)
    assert there.is_dir() and not (there / "stage.json").exists()
    monkeypatch.delenv("BUCKET_END")
    machine("two")
    assert RemoteStore("bucket://s").find(sft()) is None
    machine("one")
    assert RemoteStore("bucket://s").build(sft(), lambda folder: pytest.fail("built again")).cached
    assert (there / "stage.json").exists() and (there / "sub" / "model.safetensors").read_text() == "weights"


def test_a_look_at_a_store_moves_no_file(tmp_path, machine):
    built = RemoteStore("bucket://s").build(sft(), made("weights"))
    machine("two")
    there = RemoteStore("bucket://s").look(sft())
    assert there is not None and there.cached and there.hash == built.hash and there.record["result"] == {"text": "weights"}
    there.check()  # of files that are not here
    assert RemoteStore("bucket://s").look(sft(4)) is None and not (tmp_path / "two").exists()
    record = bucket(tmp_path, "s", sft().hash, "stage.json")
    for content in ("{", "[]", "3"):
        record.write_text(content)
        with pytest.raises(RemoteError, match=r"stage\.json cannot be read"):
            RemoteStore("bucket://s").look(sft())
    machine("one")
    record.unlink()  # as when its upload broke off: the next run puts it there
    here = RemoteStore("bucket://s").look(sft())
    assert here is not None and here.folder == built.folder and not record.exists()


def test_a_file_that_is_not_the_recorded_one_is_not_taken(tmp_path, machine):
    RemoteStore("bucket://s").build(sft(), made("weights"))
    (bucket(tmp_path, "s", sft().hash) / "sub" / "model.safetensors").write_text("another")
    machine("two")
    with pytest.raises(RemoteError, match=r"model\.safetensors is not the file that stage\.json beside it names"):
        RemoteStore("bucket://s").find(sft())
    assert not any(path.is_dir() for path in (RemoteStore("bucket://s").root).glob("*"))  # nothing half-fetched
    (bucket(tmp_path, "s", sft().hash) / "stage.json").write_text("{")
    with pytest.raises(RemoteError, match=r"stage\.json cannot be read"):
        RemoteStore("bucket://s").find(sft())


def test_what_another_process_of_this_machine_has_fetched_is_left_to_it(tmp_path, machine):
    """Several processes of a machine fetch a stage at once: the one that comes last does not take it from those that read it."""
    RemoteStore("bucket://s").build(sft(), made("weights"))
    machine("two")
    url, folder = f"bucket://s/{sft().hash}", RemoteStore("bucket://s").root / sft().hash
    assert copies.fetch_folder(url, folder, last="stage.json")
    reading = folder.stat().st_ino
    assert copies.fetch_folder(url, folder, last="stage.json") and folder.stat().st_ino == reading
    (folder / "stage.json").write_text("{}")  # something else
    assert copies.fetch_folder(url, folder, last="stage.json") and json.loads((folder / "stage.json").read_text())["files"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_last_to_finish_is_kept(tmp_path, machine):
    """No locks between machines: both build, and what is there at the end is whole."""
    store = RemoteStore("bucket://s")

    def meanwhile(folder):
        machine("two")
        RemoteStore("bucket://s").build(sft(), made("two"))
        machine("one")
        return made("one")(folder)

    assert store.build(sft(), meanwhile).record["result"] == {"text": "one"}
    machine("three")
    assert RemoteStore("bucket://s").find(sft()).record["result"]["text"] in ("one", "two")


def state_at(step):
    return TrainState(jnp.int32(step), {"w": jnp.arange(6.0).reshape(2, 3) * step}, {}, {})


def test_checkpoints_go_on_from_another_machine(tmp_path, machine, monkeypatch):
    with Checkpoints("bucket://s/state", keep=1) as checkpoints:
        checkpoints.save(2, state_at(2))
        checkpoints.save(4, state_at(4))
    assert sorted(path.name for path in bucket(tmp_path, "s", "state").iterdir()) == ["4"]
    machine("two")
    with Checkpoints("bucket://s/state", keep=1) as checkpoints:
        state, _ = checkpoints.restore(state_at(0))
        assert int(state.step) == 4 and np.array_equal(state.params["w"], np.arange(6.0).reshape(2, 3) * 4)
        monkeypatch.setenv("BUCKET_END", "files.json")
        monkeypatch.setenv("BUCKET_RAISES", "1")
        with pytest.raises(RemoteError, match="cannot write bucket://s/state/6"):
            checkpoints.save(6, state_at(6))
    monkeypatch.delenv("BUCKET_END")
    (bucket(tmp_path, "s", "state", "6", "files.json")).unlink()  # what an object store never had: half a file
    for name, step in (("three", 4), ("two", 6), ("three", 6)):  # the unfinished 6 is seen by who has it, and then it is put
        machine(name)
        with Checkpoints("bucket://s/state", keep=1) as checkpoints:
            assert int(checkpoints.restore(state_at(0))[0].step) == step


def damaged(file):
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def test_a_checkpoint_that_is_damaged_here_is_downloaded_again_and_one_there_is_left_out(tmp_path, machine, caplog):
    with Checkpoints("bucket://s/state", keep=2) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state_at(step))
    data = next(name for name in copies.files_in(checkpoints.folder / "4") if "params/ocdbt.process_0/d/" in name)
    damaged(checkpoints.folder / "4" / data)
    with Checkpoints("bucket://s/state", keep=2) as checkpoints:
        assert int(checkpoints.restore(state_at(0))[0].step) == 4
    assert f"4/{data} is damaged" in caplog.text and "; checkpoint 4 is used" in caplog.text
    damaged(bucket(tmp_path, "s", "state", "4", data))
    machine("two")
    with Checkpoints("bucket://s/state", keep=2) as checkpoints:
        assert int(checkpoints.restore(state_at(0))[0].step) == 2 and "The checkpoint is left out." in caplog.text


def test_a_checkpoint_that_cannot_be_read_stays_at_its_url_until_a_newer_one_is_there(tmp_path, machine):
    with Checkpoints("bucket://s/state", keep=2) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state_at(step))
    there = bucket(tmp_path, "s", "state")
    for name, newest, then, left in (("two", 2, 3, ["2", "3", "4"]), ("three", 3, 4, ["3", "4"]), ("four", 3, 6, ["3", "6"])):
        damaged(next((there / "4" / "params" / "ocdbt.process_0" / "d").iterdir()))
        machine(name)
        with Checkpoints("bucket://s/state", keep=2) as checkpoints:
            assert int(checkpoints.restore(state_at(0))[0].step) == newest and (there / "4").exists()
            checkpoints.save(then, state_at(then))
        assert sorted(path.name for path in there.iterdir()) == left
        if then == 4:  # it was put again
            machine("another")
            with Checkpoints("bucket://s/state", keep=2) as checkpoints:
                assert int(checkpoints.restore(state_at(0))[0].step) == 4


def test_what_is_damaged_here_is_not_put_and_a_copy_is_fetched_again(tmp_path, machine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(copies, "put_folder", lambda *_, last: sys.exit("killed"))
        with pytest.raises(SystemExit):
            RemoteStore("bucket://s").build(sft(), made("weights"))
    here = RemoteStore("bucket://s").root / sft().hash / "sub" / "model.safetensors"
    damaged(here)
    with pytest.raises(
        RemoteError, match=rf"{here} is damaged: .*, and it is not put to bucket://s/.*; delete {here.parents[1]}, and it is made"
    ):
        RemoteStore("bucket://s").find(sft())
    shutil.rmtree(here.parents[1])  # the way out
    RemoteStore("bucket://s").build(sft(), made("weights"))
    copy = copies.cached_folder(f"bucket://s/{sft().hash}") / "sub" / "model.safetensors"
    damaged(copy)
    assert (copies.cached_folder(f"bucket://s/{sft().hash}") / "sub" / "model.safetensors").read_text() == "weights"


def test_a_bucket_cannot_have_files_written_elsewhere(tmp_path, machine):
    RemoteStore("bucket://s").build(sft(), made("weights"))
    there = bucket(tmp_path, "s", sft().hash)
    (there / "stage.json").write_text(json.dumps({"files": {"../outside": [7, "0"]}}))
    (there.parent / "outside").write_text("hostile")
    machine("two")
    with pytest.raises(RemoteError, match=r"stage\.json cannot be read \(it names '../outside', outside of its folder\)"):
        RemoteStore("bucket://s").find(sft())
    assert not list((tmp_path / "two").rglob("outside"))
    links = bucket(tmp_path, "runs", "toy", "links.json")
    links.parent.mkdir(parents=True)
    links.write_text("{")
    with pytest.raises(RemoteError, match=r"bucket://runs/toy/links\.json cannot be read .*; delete it"):
        fetch_run("bucket://runs/toy")
    with pytest.raises(RemoteError, match=r"bucket://runs/toy/links\.json cannot be read"):
        copies.cached_folder("bucket://runs/toy/stages/00-sft")
    assert copies.links_in(b'{"../../x": "a", "..": "b", "00-sft": "c"}', "") == {"00-sft": "c"}


def test_state_goes_once_the_stage_is_there(tmp_path, machine, monkeypatch):
    store = RemoteStore("bucket://s")

    def train(folder):
        (folder / "metrics.jsonl").write_text("{}\n")
        store.saving(folder)
        with Checkpoints(store.state(folder)) as checkpoints:
            checkpoints.save(1, state_at(1))
        assert bucket(tmp_path, "s", f".state-{sft().hash}", "checkpoint", "1", "files.json").exists()
        assert bucket(tmp_path, "s", f".state-{sft().hash}", "metrics.jsonl").read_text() == "{}\n"

    state, put = bucket(tmp_path, "s", f".state-{sft().hash}"), copies.put_folder

    def put_stage(*given, last):
        put(*given, last=last)
        assert (state / "checkpoint" / "1").exists()  # still: the stage has only now come there

    monkeypatch.setattr(copies, "put_folder", put_stage)
    with monkeypatch.context() as patch:
        patch.setattr(RemoteStore, "_tidy", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            store.build(sft(), train, keep_state=False)
    assert bucket(tmp_path, "s", sft().hash, "stage.json").exists() and any(path.is_file() for path in state.rglob("*"))
    store.build(sft(), train, keep_state=False)  # found, and what the killed process left is removed
    assert not any(path.is_file() for path in state.rglob("*")) and not copies.work_folder(store.state_of(store.find(sft()))).exists()


def test_a_store_that_cannot_be_reached_does_not_end_a_run_whose_stage_is_finished(machine, monkeypatch):
    asked = []

    def remove(url):
        asked.append(url)
        raise RemoteError("connection reset by peer")

    monkeypatch.setattr(remote, "remove", remove)
    store = RemoteStore("bucket://s")
    assert store.build(sft(), made("x"), keep_state=False).record["result"] == {"text": "x"}
    assert asked == [f"bucket://s/.state-{sft().hash}"]
    assert store.build(sft(), made("x"), keep_state=False).cached and len(asked) == 1  # a found one costs no time


def test_data_at_a_url(machine, monkeypatch):
    memory = fsspec.filesystem("memory")
    for n in (0, 1):
        memory.pipe(f"/data/train-0000{n}-of-00002.jsonl", f'{{"prompt": "p{n}"}}\n'.encode())
    memory.pipe("/data/_SUCCESS", b"")
    for source in ("memory://data", "memory://data/train-*.jsonl"):
        assert [row for _, row in iter_rows(source)] == [{"prompt": "p0"}, {"prompt": "p1"}]
    (one,) = source_files("memory://data/train-00000-of-00002.jsonl")
    assert one.read_text() == '{"prompt": "p0"}\n' and one.name == "train-00000-of-00002.jsonl"
    memory.pipe("/data/train-00000-of-00002.jsonl", b'{"prompt": "other"}\n')  # fetched anew: it is another file by now
    assert [row for _, row in iter_rows("memory://data/train-00000-of-00002.jsonl")] == [{"prompt": "other"}]
    with pytest.raises(FileNotFoundError, match=r"memory://data/none\.jsonl"):
        source_files("memory://data/none.jsonl")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://b/x", "fsspec does not know this protocol"),
        ("gs://b/x", r"pip install 'jaxrlhf\[gcs\]' \(package gcsfs\)"),
        ("s3://b/x", r"pip install 'jaxrlhf\[s3\]' \(package s3fs\)"),
    ],
)
def test_what_is_missing_is_named(url, message):
    if url.startswith(("gs", "s3")) and any(shutil.which(name) or _installed(name) for name in ("gcsfs", "s3fs")):
        pytest.skip("gcsfs or s3fs is installed here")
    with pytest.raises(RemoteError, match=message):
        remote.check_writable(url)


def _installed(name):
    from importlib.util import find_spec

    return find_spec(name) is not None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (type("DefaultCredentialsError", (Exception,), {})("none found"), "gcloud auth application-default login"),
        (PermissionError("denied"), "do not allow it"),
        (FileNotFoundError("bucket b"), "Is the bucket's name right"),
        (OSError("404 NoSuchBucket"), "Is the bucket's name right"),
    ],
)
def test_errors_of_a_store_say_what_to_do(error, message, monkeypatch):
    class Store(fsspec.AbstractFileSystem):
        protocol = "gs"

        def pipe_file(self, path, value, **rest):
            raise error

    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (Store(), "b/x"))
    with pytest.raises(RemoteError, match=message):
        remote.write("gs://b/x", b"")


RUN = """
import sys, json, logging, jax, bucket
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
logging.basicConfig(level=logging.WARNING, format="%(message)s")
from jaxrlhf.recipe import from_mapping
from jaxrlhf.pipeline.run import run
print(run(from_mapping(json.loads(sys.argv[2])), until="sft"))
"""


def started(raw, work, tmp_path, **environment):
    cache = str(jax.config.jax_compilation_cache_dir)
    known = {"BUCKET_ROOT": str(tmp_path / "bucket"), "JAXRLHF_WORK": str(tmp_path / work), "JAX_PLATFORMS": "cpu"}
    known["PYTHONPATH"] = os.pathsep.join([str(Path(object_store.__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", RUN, cache, json.dumps(raw)], env=os.environ | known | environment, capture_output=True, text=True
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_killed_while_it_puts_goes_on_on_another_machine(tiny_mapping, tmp_path, machine, capsys):
    """Killed in the middle of a checkpoint's upload; the second machine has an empty disk and ends with the same bits and lines."""
    changes = {"checkpoint__every": 1, "log__recompiles": "error"}
    raw = tiny_mapping("bucket://b/runs", **changes)
    killed = started(raw, "one", tmp_path, BUCKET_END="checkpoint/2/files.json")
    assert killed.returncode == 9, killed.stderr
    assert bucket(tmp_path, "b", "runs", "tiny", "config.yaml").exists()
    half = next(bucket(tmp_path, "b", "runs", ".stages").glob(".state-*/checkpoint/2/files.json"))
    half.unlink()  # an object store shows whole files only
    done = started(raw, "two", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "goes on from step 1 of 3" in done.stderr
    whole = started(tiny_mapping(tmp_path / "whole", **changes), "three", tmp_path)
    assert whole.returncode == 0, whole.stderr

    run, local = "bucket://b/runs/tiny", tmp_path / "whole" / "tiny"
    strip = [
        {k: v for k, v in line.items() if not k.startswith("time/")}
        for line in lines(bucket(tmp_path, "b", "runs", "tiny", "metrics.jsonl"))
    ]
    assert strip == [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines(local / "metrics.jsonl")]
    links = json.loads(bucket(tmp_path, "b", "runs", "tiny", "links.json").read_text())
    assert list(links) == ["00-tokenizer", "01-sft"]
    stage = bucket(tmp_path, "b", "runs", ".stages", links["01-sft"].rsplit("/", 1)[1])
    assert lines(stage / "metrics.jsonl") == lines(local / "stages" / "01-sft" / "metrics.jsonl")  # the first machine's step among them
    assert not list(bucket(tmp_path, "b", "runs", ".stages").glob(".state-*/checkpoint/*/files.json"))

    machine("four")
    import jaxrlhf

    there, here = jaxrlhf.load(f"{run}/stages/01-sft"), jaxrlhf.load(local / "stages" / "01-sft")
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(there.params), jax.tree.leaves(here.params), strict=True))
    assert copies.cached_folder(f"{run}/stages/01-sft") == copies.cached_folder(links["01-sft"])

    from jaxrlhf.cli import main

    assert main(["report", run]) == 0
    assert f"report: {run}/report.html" in capsys.readouterr().out
    assert "tiny" in bucket(tmp_path, "b", "runs", "tiny", "report.html").read_text()
    fetched = [path.name for path in copies.work_folder(f"{run}#report").rglob("*")]
    assert "stage.json" in fetched and not any(name.endswith(".safetensors") for name in fetched)


def test_a_folder_of_files_at_a_url_is_fetched_once_for_each_content(machine):
    memory = fsspec.filesystem("memory")
    memory.pipe("/m/config.json", b"{}")
    first = copies.cached_folder("memory://m")
    assert first == copies.cached_folder("memory://m/") and [path.name for path in first.iterdir()] == ["config.json"]
    memory.pipe("/m/config.json", b'{"another": 1}')
    assert (copies.cached_folder("memory://m") / "config.json").read_bytes() == b'{"another": 1}'
    assert (first / "config.json").read_bytes() == b"{}"
    with pytest.raises(FileNotFoundError, match="memory://none: no such folder"):
        copies.cached_folder("memory://none")


def test_a_store_that_cannot_be_written_ends_the_run_before_it_begins(tiny_config, machine):
    from jaxrlhf.pipeline.run import run

    with pytest.raises(RemoteError, match="nosuch://b"):
        run(tiny_config("nosuch://b/runs"), until="sft")


def test_processes_that_do_not_see_one_store_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "index", lambda: 1)
    monkeypatch.setattr(distributed, "is_leader", lambda: False)
    monkeypatch.setattr(distributed, "agree", lambda value, what: ".seen-by-all-7")
    passed = []
    monkeypatch.setattr(distributed, "barrier", passed.append)
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(RemoteError, match=f"process 1 does not see {folder} of process 0: .* on a shared file system or at gs://"):
            check_seen_by_all(folder, patience=0.1)
    (tmp_path / ".seen-by-all-7").touch()
    check_seen_by_all(tmp_path)
    assert len(passed) == 1 and (tmp_path / ".seen-by-all-7").exists()  # the leader's to remove


def test_a_record_of_another_stage_is_still_refused(tmp_path, machine):
    store = RemoteStore("bucket://s")
    done = store.build(sft(), made("x"))
    os.rename(done.folder, store.root / sft(4).hash)
    with pytest.raises(StageError, match="the folder was renamed"):
        store.find(sft(4))
