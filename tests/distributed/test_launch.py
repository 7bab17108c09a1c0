"""The launcher and the watcher, on processes that are no runs."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from jaxrlhf import cli
from jaxrlhf.distributed import launch as launch_module
from jaxrlhf.distributed.launch import launch

# What a process waits for is a file that another one makes, never the clock: how fast they start is the machine's affair.
WHO = """
import os, signal, sys, time
from pathlib import Path

me = int(os.environ["JAX_PROCESS_ID"])

def wait_for(*files):
    while not all(Path(file).exists() for file in files):
        time.sleep(0.01)

"""


def launched(code, capfd, processes=2, **options):
    status = launch([sys.executable, "-c", WHO + code], processes, **options)
    out, err = capfd.readouterr()
    return status, out, err


def test_the_leader_is_heard_and_the_devices_are_shared(capfd):
    code = (
        "print('[Gloo] Rank 0 is connected to 1 peer ranks'); print(me, os.environ['JAX_NUM_PROCESSES'], "
        "os.environ['JAX_NUM_CPU_DEVICES'], os.environ['JAX_LOCAL_DEVICE_IDS']); print('to the error stream', file=sys.stderr)"
    )
    status, out, err = launched(code, capfd, devices=4)
    assert (status, out, err) == (0, "0 2 4 0,1,2,3\n", "to the error stream\n")


def test_who_is_gone_is_said_and_the_others_are_ended(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = (
        "print(f'I am {me}', flush=True); Path(str(me)).touch(); wait_for(*'012')\n"
        "me == 1 and os.kill(os.getpid(), signal.SIGKILL); time.sleep(600)"
    )
    status, out, err = launched(code, capfd, processes=3, grace=1)
    assert status == 128 + 9
    assert out == "I am 0\n"  # the last words of the one that is gone stand in the message
    assert "process 1 of 3 (pid " in err and "is gone: signal 9, SIGKILL" in err and "  | I am 1\n" in err
    last = err.splitlines()[-1]
    assert "process 1 of 3 went first" in last and "process 0 (signal 15, SIGTERM), process 2 (signal 15, SIGTERM) ended" in last
    assert "with the same command: the run goes on from its last checkpoint." in last


def test_the_one_that_ended_because_of_another_is_not_blamed(capfd, tmp_path, monkeypatch):
    """jax aborts a process whose peer is gone, and a process that was told of an error ends with a status of its own."""
    monkeypatch.chdir(tmp_path)
    members = []

    class Member(launch_module.Member):
        def __init__(self, *given):
            super().__init__(*given)
            members.append(self)

    def sleep(seconds):
        if seconds > launch_module._TICK:  # another has been seen to be gone: now the one whose fault it is ends too
            (tmp_path / "seen").touch()
            members[2].process.wait()
        time.sleep(seconds)

    monkeypatch.setattr(launch_module, "Member", Member)
    monkeypatch.setattr(launch_module, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    code = "wait_for(*['seen'] * (me == 2)); (sys.exit(75), 0) if me == 0 else os.abort() if me == 1 else sys.exit('mine')"
    status, _, err = launched(code, capfd, processes=3)
    assert status == 1 and "process 2 of 3 (pid " in err and "  | mine\n" in err
    assert "Fix the cause" in err.splitlines()[-1]


def test_a_process_that_does_not_hear_is_killed(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); me or Path('deaf').touch(); "
    code = deaf + "wait_for('deaf') if me else time.sleep(600); sys.exit(3)"
    status, _, err = launched(code, capfd, grace=0.5)
    assert status == 3 and "process 0 (signal 9, SIGKILL" in err and "(by SIGKILL)" in err


def test_ctrl_c_ends_all():
    code = WHO + "print(os.getpid(), flush=True); time.sleep(600)"
    # A shell starts what it puts in the background deaf to SIGINT, and tests that run there hand that down: here it is heard.
    inner = (
        "import signal, sys; from jaxrlhf.distributed.launch import launch; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.exit(launch([sys.executable, '-c', {code!r}], 2, grace=5))"
    )
    process = subprocess.Popen([sys.executable, "-c", inner], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "stopped; the same command goes on" in err
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_process_that_dies_of_another_signal_when_told_to_stop_is_stopped(number):
    code = f"signal.signal(signal.SIGTERM, lambda *given: os.kill(os.getpid(), {int(number)})); print('up', flush=True); time.sleep(600)"
    inner = (
        f"import sys; from jaxrlhf.distributed.launch import launch\nsys.exit(launch([sys.executable, '-c', {WHO + code!r}], 1, grace=5))"
    )
    process = subprocess.Popen([sys.executable, "-c", inner], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143 and "stopped; the same command goes on" in err and "is gone" not in err


def test_a_process_that_jax_ends_has_a_watcher():
    code = (
        "import os, sys; from jaxrlhf.distributed.launch import watched; status = watched()\n"
        "if status is None: os.abort()\n"
        "assert 'jax' not in sys.modules; sys.exit(status)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAXRLHF_LAUNCHED"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 128 + signal.SIGABRT
    assert "ended: signal 6, SIGABRT. JAX ends a process when another one of its group is gone" in done.stderr
    assert "Start all processes again with the same command" in done.stderr


def test_ctrl_c_in_a_terminal_reaches_the_watched_process_once():
    """The terminal sends it to both; a second one would cut short what the first one began."""
    code = (
        "import signal, sys, time; from jaxrlhf.distributed.launch import watched; status = watched(); seen = []\n"
        "if status is not None: sys.exit(status)\n"
        "signal.signal(signal.SIGINT, lambda *given: seen.append(given))\n"
        "print('ready', flush=True)\n"
        "while not seen: time.sleep(0.05)\n"
        "time.sleep(1)  # for a second one, which would come at about the same time\n"
        "print('interrupted', len(seen), flush=True)"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.pop("JAXRLHF_LAUNCHED", None)
        os.execv(sys.executable, [sys.executable, "-c", code])
    said = b""
    with suppress(OSError):  # the end
        while part := os.read(terminal, 1000):
            said += part
            if said.endswith(b"ready\r\n"):
                os.write(terminal, b"\x03")
    assert os.waitpid(pid, 0)[1] == 0 and b"interrupted 1" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "2", "sweep", "c.yaml"], "jaxrlhf launch … sweep: give one of run, sft, reward, ppo CONFIG.yaml"),
        (["--processes", "2"], "launch … nothing"),
        (["--processes", "0", "run", "c.yaml"], "--processes 0"),
    ],
)
def test_what_cannot_be_launched(words, message, capsys):
    assert cli.main(["launch", *words]) == 1
    assert message in capsys.readouterr().err


def test_on_a_machine_with_gpus_their_share_is_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert cli.main(["launch", "--processes", "2", "run", "c.yaml"]) == 1
    assert "give --devices_per_process" in capsys.readouterr().err


def test_sigterm_goes_to_all_and_they_are_waited_for(tmp_path):
    """They take longer than the grace of a failure: what they save is not cut short."""
    code = WHO + (
        "signal.signal(signal.SIGTERM, lambda *given: (time.sleep(0.5), Path(f'saved-{me}').touch(), sys.exit(143)))\n"
        "Path(f'ready-{me}').touch(); time.sleep(600)"
    )
    inner = f"import sys; from jaxrlhf.distributed.launch import launch; sys.exit(launch([sys.executable, '-c', {code!r}], 2, grace=0.1))"
    process = subprocess.Popen([sys.executable, "-c", inner], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while len(list(tmp_path.glob("ready-*"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143 and "stopped; the same command goes on" in err and "is gone" not in err
    assert len(list(tmp_path.glob("saved-*"))) == 2
