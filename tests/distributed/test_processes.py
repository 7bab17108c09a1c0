"""How a process finds the others of its group, and how they agree and end together: real processes over the loopback device."""

import os
import socket
import subprocess
import sys

import pytest

from jaxrlhf import cli, distributed
from jaxrlhf.distributed import ProcessError, cluster, group, watchdog
from jaxrlhf.distributed.cluster import ENVIRONMENT, Group, devices_of_task, requested_group
from jaxrlhf.distributed.launch import environment_of, free_port

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip
CLUSTERS = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION", "JAX_")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in list(os.environ):
        if name.startswith(CLUSTERS) and name != "JAX_COMPILATION_CACHE_DIR":
            monkeypatch.delenv(name)


def test_a_process_stands_alone_and_pays_nothing():
    """JAX is not even imported by the question, and its backend not started by agreeing."""
    code = (
        "import sys; from jaxrlhf import distributed; from jaxrlhf.distributed.cluster import requested_group;"
        "assert requested_group() is None and not distributed.start();"
        "assert 'jax' not in sys.modules;"
        "value = object(); assert distributed.agree(value, 'a value') is value and distributed.is_leader() and distributed.count() == 1;"
        "distributed.barrier('here'); distributed.finish(); distributed.abort(3, 'goes on');"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SLURM, Group(None, None, None, "SLURM")),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, None),  # inside a job script, outside srun
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, None),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "node1:1234"}, Group("node1:1234", None, None, "SLURM")),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, Group(None, None, None, "Open MPI")),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, Group(None, None, None, "TPU slice")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_NUM_SLICES": "2"}, Group(None, None, None, "TPU slice")),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # any pod
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, Group(None, None, None, "Kubernetes")),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:12", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"},
            Group("host:12", 3, 2, None),
        ),
    ],
)
def test_where_the_others_are_found(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert requested_group() == expected


def test_a_tpu_machine_may_be_one_of_a_pod(monkeypatch):
    monkeypatch.setattr(cluster, "_tpu_machine", lambda: True)
    assert requested_group() == Group(None, None, None, "TPU pod")
    assert requested_group(num_processes=1) is None
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert requested_group() is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"process_id": 2}, "process_id 2 alone does not make a group of processes: --coordinator and --num_processes are missing"),
        ({"coordinator": "host:12", "num_processes": 2}, "--process_id is missing"),
        ({"coordinator": "host:12", "num_processes": 2, "process_id": 2}, "process_id is 2 of 2 processes; they are numbered from 0 to 1"),
        ({"coordinator": "host:12", "num_processes": 2, "process_id": -1}, "process_id is -1"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "coordinator is 'host'; give host:port"),
        ({"coordinator": "host:99999", "num_processes": 2, "process_id": 0}, "give host:port"),
        ({"coordinator": "host:12", "num_processes": 0, "process_id": 0}, "num_processes is 0"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ProcessError, match=message):
        requested_group(**given)


def test_a_number_in_the_environment_is_one(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT["num_processes"], "two")
    with pytest.raises(ProcessError, match="num_processes \\(from JAX_NUM_PROCESSES\\) is 'two'"):
        requested_group()


@pytest.mark.parametrize("command", ["sweep", "embed", "nearest", "evaluate", "report", "generate", "launch"])
def test_what_is_one_process_is_not_several(monkeypatch, capsys, command):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert cli.main([command, "--help"]) == 1
    assert f"jaxrlhf {command} is one process, and this is one of 2: start it once" in capsys.readouterr().err


def test_a_task_alone_on_its_node_has_all_its_gpus(monkeypatch):
    assert devices_of_task() is None
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    for tasks, devices in (("1", list(range(8))), ("1(x2)", list(range(8))), ("8(x2)", None), ("16", None)):
        monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
        assert devices_of_task() == devices


def test_processes_that_cannot_meet(monkeypatch):
    port = free_port()
    with pytest.raises(ProcessError, match=f"process 0 does not answer at 127.0.0.1:{port} for 1 s .*refused"):
        distributed.start(f"127.0.0.1:{port}", 2, 1, timeout=1)
    with pytest.raises(ProcessError, match="JAX was in use before"):
        import jax

        jax.devices()
        distributed.start(f"127.0.0.1:{port}", 2, 0, timeout=1)
    assert not distributed.is_grouped()


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ProcessError, match=f"process 0 cannot listen at {address} .*: the port is taken"):
            distributed.start(address, 2, 0, timeout=5)


GROUP = """
import json, sys
from jaxrlhf import distributed
from jaxrlhf.distributed import exchange
assert distributed.start(timeout=300)
me = distributed.index()
told = distributed.agree({"numbers": [1, 2.5, None], "text": "ü" * 300_000} if me == 0 else "ignored", "first")
assert told == {"numbers": [1, 2.5, None], "text": "ü" * 300_000} and distributed.count() == 2 and distributed.is_leader() == (me == 0)
distributed.barrier("both here")

# Each process has a disk of its own; what was kept before lies on the leader's alone.
import pathlib
import numpy as np
from jaxrlhf.algorithms.frft import _kept_on_disk
from jaxrlhf.offline import vectors
from jaxrlhf.data.columns import cached_columns
from jaxrlhf.offline.logprobs import NAMES
disk = pathlib.Path(sys.argv[1]) / str(me)
calls = []
def compute():
    calls.append(me)
    return {name: np.array([-0.1, 1e-7], np.float32) for name in ("chosen_logp", "rejected_logp")}
for again in (False, True):
    found = cached_columns(disk / "logps", ["a", "b"], NAMES, {"model": "m"}, compute)
    assert found["chosen_logp"].tobytes() == compute()["chosen_logp"].tobytes() and found["rejected_logp"].dtype == np.float32
    assert _kept_on_disk(disk / "texts.json", lambda: calls.append(me) or ["ü", "b"]) == ["ü", "b"]
assert len(calls) == 4 and (disk / "logps").exists() == (disk / "texts.json").exists() == (me == 0), calls

class Encoder:
    def embed(self, texts, report):
        calls.append(len(texts))
        return np.array([[len(text), ord(text[0])] for text in texts], np.float32)

identity = dict.fromkeys(vectors.EncoderIdentity._fields, "x") | {"backend": "flax"}
vectors.encoder_identity = lambda *a, **k: vectors.EncoderIdentity(**identity)
vectors.open_encoder = lambda *a, **k: Encoder()
exchange._ROWS = 2
for texts, computed in ((["a", "bb", "a", "ccc", "d"], 4), (["ccc", "ee"], 1), (["bb"], 0)):
    calls.clear()
    got = vectors.embed_cached(texts, folder=disk / "vectors", mesh="all processes")
    assert got.vectors.tolist() == [[len(text), ord(text[0])] for text in texts] and len(got) == len(texts), got.vectors
    assert got.embedded == computed and sum(calls) == computed and (disk / "vectors").exists() == (me == 0)

distributed.agree(me, f"place {me}")  # a script that does not catch it
distributed.barrier("only the leader comes here")
"""


def test_a_group_agrees_and_ends_together(tmp_path):
    """What the leader has on its disk the others hear from it. A process that is at another place says so and ends; the leader, which
    waits for it, is told and ends too."""
    port = free_port()
    started = [
        subprocess.Popen([sys.executable, "-c", GROUP, str(tmp_path)], env=environment_of(n, 2, 1, port), stderr=subprocess.PIPE, text=True)
        for n in (0, 1)
    ]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [watchdog.STATUS_OF_OTHERS, 1]
    assert "process 1 of 2 (pid " in said[0] and "ended: ProcessError: process 1 is at 'place 1' and process 0 at 'place 0'" in said[0]


def test_the_leader_that_ends_because_of_another_goes_last():
    """What the others read goes with it: it waits until all but the one that failed know."""

    class Client:
        def __init__(self):
            self.keys, self.looks = {}, 0

        def key_value_set(self, key, value, allow_overwrite=False):
            self.keys[key] = value

        def key_value_dir_get(self, folder):
            self.looks += 1
            if self.looks == 4:  # process 1 lets itself be heard
                self.key_value_set("jaxrlhf/heard/1", "")
            return [(key, value) for key, value in self.keys.items() if key.startswith(folder)]

    def looks(client, me, count):
        watch = object.__new__(watchdog.Watchdog)
        watch._client, watch._me, watch._count, watch._period, watch._lost = client, me, count, 300.0, OSError
        watch.acknowledge()
        return client.looks

    assert looks(Client(), 0, 3) == 4
    assert looks(Client(), 1, 3) == 0 and looks(Client(), 0, 2) == 1  # nobody is waited for


def test_whose_error_it_is(monkeypatch):
    """An error of the runtime may be another process's end: the others are looked at. One with a message of its own is this one's."""

    class JaxRuntimeError(RuntimeError):
        pass

    class Gone:
        def lost_peer(self):
            return "process 1 ended"

    broken = JaxRuntimeError("Connection closed by peer")
    assert distributed.failure_elsewhere(broken) is None  # nobody else is there
    monkeypatch.setattr(group, "_watchdog", Gone())
    assert distributed.failure_elsewhere(broken) == "process 1 ended"
    assert distributed.failure_elsewhere(ValueError("batch_size 3")) is None
    caused = RuntimeError("cannot write checkpoint")
    caused.__cause__ = broken
    assert distributed.failure_elsewhere(caused) == "process 1 ended"
