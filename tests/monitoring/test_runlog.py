import json
import os
import pty
import subprocess
import sys
import types
from io import StringIO

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxrlhf.monitoring.metrics_file import FILE, read, scalars
from jaxrlhf.monitoring.runlog import RunLog


def lines(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def quiet(folder, **options):
    return RunLog(folder, plain=True, file=StringIO(), **options)


def test_one_object_a_step_with_plain_numbers(tmp_path):
    with quiet(tmp_path) as log, log.stage("reward", round=2, total_steps=2) as stage:
        stage.step(1, {"loss/reward": jnp.float32(0.5), "count": jnp.int32(7), "on": np.bool_(True), "note": "x", "none": None})
        stage.step(2, {"loss/reward": 0.25})
    assert lines(tmp_path) == [
        {"stage": "reward", "round": 2, "step": 1, "loss/reward": 0.5, "count": 7, "on": True, "note": "x", "none": None},
        {"stage": "reward", "round": 2, "step": 2, "loss/reward": 0.25},
    ]


def test_a_step_is_written_when_the_next_one_has_been_dispatched(tmp_path):
    with quiet(tmp_path) as log:
        stage = log.stage("sft")
        stage.step(1, {"loss": 1.0})
        assert lines(tmp_path) == []
        stage.step(2, {"loss": 2.0})
        assert [line["step"] for line in lines(tmp_path)] == [1]  # and it is on disk, not in a buffer
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_numbers_that_json_lacks_are_valid_json_and_float_reads_them(tmp_path):
    with quiet(tmp_path) as log:
        log.stage("ppo").step(1, {"a": jnp.nan, "b": jnp.float32(jnp.inf), "c": -float("inf"), "d": jnp.bfloat16(1.5)})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / FILE).read_text(), parse_constant=refuse)
    assert (line["a"], line["b"], line["c"], line["d"]) == ("NaN", "Infinity", "-Infinity", 1.5)
    assert np.isnan(float(line["a"])) and float(line["b"]) == np.inf and float(line["c"]) == -np.inf


def test_only_scalars_and_no_reserved_names(tmp_path):
    with pytest.raises(ValueError, match=r"metric loss has shape \[2\]; log a scalar"):
        scalars({"loss": jnp.ones(2)})
    with quiet(tmp_path) as log, pytest.raises(ValueError, match="may not be called stage, round, step"):
        log.stage("sft").step(1, {"step": 3})


def test_a_resumed_stage_forgets_the_steps_it_takes_again_and_only_those(tmp_path):
    with quiet(tmp_path) as log:
        for name, round in (("sft", None), ("reward", 1), ("reward", 2)):
            stage = log.stage(name, round=round)
            for n in (1, 2, 3):
                stage.step(n, {"x": n})
    with open(tmp_path / FILE, "a") as file:
        file.write('{"stage": "reward", "round": 2, "st')  # killed while writing
    with quiet(tmp_path) as log:
        assert len(lines(tmp_path)) == 9
        log.stage("reward", round=2, start=1).step(2, {"x": 20})
    assert [(x["stage"], x["round"], x["step"], x["x"]) for x in lines(tmp_path)] == [
        *(("sft", None, n, n) for n in (1, 2, 3)),
        *(("reward", 1, n, n) for n in (1, 2, 3)),
        ("reward", 2, 1, 1),
        ("reward", 2, 2, 20),
    ]


BROKEN = (b"nonsense\n", b"\xff\xfe\x00\n", b"\0\0\0\n", b"[]\n", b"{}\n", b'{"stage": 1, "round": null, "step": 1}\n', b"[" * 9999 + b"\n")


def test_lines_that_are_no_metrics_are_left_out_and_said(tmp_path, caplog):
    """Of whatever kind: metrics.jsonl never decides about a run. A line ends in \\n, not where Unicode ends one (U+2028)."""
    good = [b'{"stage": "a", "round": null, "step": %d, "note": "\xe2\x80\xa8"}\n' % n for n in range(len(BROKEN) + 1)]
    (tmp_path / FILE).write_bytes(b"".join(a + b for a, b in zip(good, (*BROKEN, b'{"stage": "a"'), strict=True)))
    assert [line["step"] for line in read(tmp_path / FILE)] == list(range(len(good)))
    with quiet(tmp_path) as log:
        log.stage("b").step(1, {})
        log.stage("b").step(2, {"x": 1})
    assert [line["step"] for line in map(json.loads, (tmp_path / FILE).read_bytes().splitlines())] == [*range(len(good)), 2]
    assert f"{tmp_path / FILE}: {len(BROKEN)} lines that are no metrics are left out." in caplog.text


def test_after_a_resume_the_lines_are_in_the_order_of_the_stages(tmp_path):
    stored = tmp_path / "store"
    with quiet(tmp_path / "run") as log:
        log.stage("sft", folder=stored).step(1, {"x": 1})
        log.stage("reward", round=1, folder=tmp_path / "partial").step(1, {"x": 2})  # stopped here
    with quiet(tmp_path / "run") as log:
        log.replay(stored / FILE, "sft")
        log.stage("reward", round=1, start=1, folder=tmp_path / "partial").step(2, {"x": 3})
    assert [(line["stage"], line["step"]) for line in lines(tmp_path / "run")] == [("sft", 1), ("reward", 1), ("reward", 2)]


@pytest.mark.parametrize("lost", ["run", "partial"])
def test_an_interrupted_stages_lines_are_in_both_files_again(tmp_path, lost):
    """Whichever of the two is gone; but the lines of an earlier config's stage, which are others, are not taken."""
    with quiet(tmp_path / "run") as log:
        stage = log.stage("sft", folder=tmp_path / "partial")
        for n in (1, 2):
            stage.step(n, {"x": n})
    (tmp_path / lost / FILE).unlink()
    with quiet(tmp_path / "run") as log:
        log.stage("sft", start=2, folder=tmp_path / "partial").step(3, {"x": 3})
    expected = [{"stage": "sft", "round": None, "step": n, "x": n} for n in (1, 2, 3)]
    assert lines(tmp_path / "run") == lines(tmp_path / "partial") == expected
    with open(tmp_path / "run" / FILE, "w") as file:
        file.writelines(json.dumps(line | {"x": -1}) + "\n" for line in expected)
    with quiet(tmp_path / "run") as log:
        log.stage("sft", start=2, folder=tmp_path / "partial").close()
    assert lines(tmp_path / "run") == expected[:2]


def test_the_lines_of_a_shared_stage_reach_every_run(tmp_path):
    shared = tmp_path / "store"
    with quiet(tmp_path / "one") as log:
        log.stage("reward", round=1, folder=shared).step(1, {"loss": 0.5})
    assert lines(tmp_path / "one") == lines(shared)
    with quiet(tmp_path / "two") as log:
        for _ in range(2):  # twice is once: a resumed run replays again
            assert log.replay(shared / FILE, "other", round=3) == 1
        assert log.replay(shared / "absent.jsonl", "absent") == 0
    assert lines(tmp_path / "two") == [{"stage": "other", "round": 3, "step": 1, "loss": 0.5}]


def test_plain_output_says_what_is_going_on_at_a_measured_pace(tmp_path):
    out = StringIO()
    with RunLog(tmp_path, plain=True, every=3600, file=out) as log, log.stage("reward", round=1, total_steps=50) as stage:
        stage.phase("compiling [100%]")
        for n in range(1, 51):
            stage.phase("sampling")
            stage.step(n, {"loss/reward": 0.5, "z": 1.0, "rollout/kl": 2.0}, tokens=1000)
        stage.note("kept 3 rows")
    said = out.getvalue().splitlines()
    assert said[0] == "round 1 reward: step 0/50  compiling [100%]"
    assert said[1] == "round 1 reward: step 0/50  sampling"
    assert said[2] == "round 1 reward: step 1/50"
    assert said[3].startswith("round 1 reward: step 50/50  ") and "tokens/s" in said[3] and "loss/reward 0.5  rollout/kl 2" in said[3]
    assert said[4:] == ["round 1 reward: kept 3 rows"]


def test_the_last_step_is_shown_with_its_own_figures(tmp_path):
    out = StringIO()
    with RunLog(tmp_path, plain=True, every=0, file=out) as log, log.stage("sft", total_steps=2) as stage:
        stage.step(1, {"loss/sft": 4.0})
        stage.step(2, {"loss/sft": 3.0})
    assert next(line for line in out.getvalue().splitlines() if "step 2/2" in line).endswith("loss/sft 3")


def test_a_phase_between_dispatch_and_line_is_shown_at_its_own_step(tmp_path):
    """Held-out rows are looked at after step 2 and before its line."""
    out = StringIO()
    with RunLog(tmp_path, plain=True, every=0, file=out) as log, log.stage("sft", total_steps=3) as stage:
        stage.step(1, {})
        stage.dispatched(2)
        stage.phase("held-out rows")
        stage.step(2, {})
    assert [" ".join(line.split()[1:3]) for line in out.getvalue().splitlines() if "held-out rows" in line] == ["step 2/3"]


def test_the_time_left_does_not_count_the_first_step(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("jaxrlhf.monitoring.runlog.time.monotonic", lambda: now[0])
    out = StringIO()
    with RunLog(tmp_path, plain=True, every=0, file=out) as log:
        stage = log.stage("sft", total_steps=1810)
        for n in (5, 10):  # every fifth step is logged
            now[0] = 100.0 + 2 * n  # compiling took 100 s, a step takes 2 s
            stage.step(n, {}, tokens=5 * 500)
    assert "sft: step 10/1810  1:00:00 left  250 tokens/s" in out.getvalue()


# It is drawn now and then, by a thread: the process goes on when the test has seen what it waits for (or never will).
TERMINAL = """
import sys, time
from pathlib import Path
from jaxrlhf.monitoring.runlog import RunLog
def until_seen(step):
    end = time.monotonic() + 120
    while not Path(sys.argv[1], f"seen-{step}").exists() and time.monotonic() < end:
        time.sleep(0.02)
with RunLog(sys.argv[1]) as log, log.stage("policy", round=2, total_steps=3) as stage:
    stage.phase("compiling")
    until_seen(0)
    for n in (1, 2, 3):
        stage.step(n, {"loss/ppo": n / 4}, tokens=100)
        until_seen(n)
    log.note("[bold] is no markup")
"""
SHOWN = {0: ("compiling", "0/3"), 1: ("1/3",), 2: ("2/3",), 3: ("3/3", "tokens/s", "loss/ppo 0.75")}


def test_a_terminal_gets_a_live_display(tmp_path):
    leader, follower = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "30"}
    process = subprocess.Popen([sys.executable, "-c", TERMINAL, str(tmp_path)], stdout=follower, stderr=follower, env=env)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
        for step, words in SHOWN.items():
            if all(word.encode() in shown for word in words):
                (tmp_path / f"seen-{step}").touch()
    os.close(leader)
    assert process.wait() == 0, shown.decode()
    text = shown.decode()
    for expected in ("round 2 policy", "compiling", "0/3", "3/3", "tokens/s", "loss/ppo 0.75", "[bold] is no markup", "\x1b["):
        assert expected in text, text


def test_tensorboard_gets_a_run_a_stage(tmp_path):

    with quiet(tmp_path, tensorboard=True) as log:
        log.stage("reward", round=1).step(4, {"loss/reward": jnp.float32(0.5), "name": "text"})
    (path,) = (tmp_path / "tensorboard" / "reward-r1").iterdir()
    content, at, seen = path.read_bytes(), 0, []
    while at < len(content):  # a record: length, its checksum, the event, its checksum
        size = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + size])
        seen += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        at += 16 + size
    assert seen == [(4, "loss/reward", 0.5)]


def test_wandb_is_imported_only_when_asked_and_a_run_is_continued(tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "abc"

        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append((name, *args, kwargs))

    def init(**arguments):
        calls.append(("init", arguments))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", None)
    with quiet(tmp_path / "none"):
        pass
    with pytest.raises(ImportError, match=r"pip install 'jaxrlhf\[wandb\]'"):
        quiet(tmp_path, wandb={})
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for n in (1, 2):
        with quiet(tmp_path, wandb={"project": "p"}) as log:
            log.stage("ppo", round=1, start=n - 1).step(n, {"loss": 0.5, "text": "x"})
    assert calls[0] == ("init", {"dir": str(tmp_path), "project": "p"})
    assert calls[1] == ("define_metric", "ppo-r1/*", {"step_metric": "ppo-r1/step"})
    assert calls[2] == ("log", {"ppo-r1/loss": 0.5, "ppo-r1/step": 1}, {}) and calls[3][0] == "finish"
    assert calls[4] == ("init", {"dir": str(tmp_path), "id": "abc", "resume": "allow", "project": "p"})


def test_no_folder_writes_and_shows_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLog(None, tensorboard=True, wandb={}) as log, log.stage("sft", folder=tmp_path / "stage") as stage:
        stage.phase("compiling")
        stage.step(1, {"loss": 1.0})
        log.note("hello")
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_a_pass_without_metrics_is_shown_and_not_kept(tmp_path):
    file = StringIO()
    with RunLog(tmp_path, tensorboard=True, file=file) as log, log.stage("sampling", total_steps=2) as stage:
        stage.step(1, {}, tokens=5)
        stage.step(2, {}, tokens=5)
    assert read(tmp_path / FILE) == [] and not (tmp_path / "tensorboard").exists()
    assert "sampling: step 2/2" in file.getvalue()


def test_lines_of_an_earlier_config_go(tmp_path):
    with RunLog(tmp_path, file=StringIO()) as log:
        for name, round in (("sft", None), ("reward", 1), ("reward", 2)):
            with log.stage(name, round=round) as stage:
                stage.step(1, {"loss": 1.0})
        log.keep_only({("sft", None), ("reward", 1)})
    assert [(line["stage"], line["round"]) for line in read(tmp_path / FILE)] == [("sft", None), ("reward", 1)]
