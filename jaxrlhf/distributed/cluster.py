"""Find out whether this process is one of several, and how it reaches the others. Runs before JAX is imported."""

import os
import socket
import time
from typing import NamedTuple

ENVIRONMENT = {"coordinator": "JAX_COORDINATOR_ADDRESS", "num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}


class ProcessError(RuntimeError):
    """Processes that cannot reach each other or have diverged; the message says why and what to do."""


class Group(NamedTuple):
    """How this process reaches the others; JAX gets what is None from `cluster`."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    cluster: str | None


def requested_group(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> Group | None:
    """The group that the arguments, else the environment (ENVIRONMENT), else a cluster describe; None for a single process.

    `num_processes` 1 is a single process wherever it runs. Raises ProcessError for values that cannot be. Does not import JAX.
    """
    coordinator = coordinator or os.environ.get(ENVIRONMENT["coordinator"]) or None
    count = _number("num_processes", num_processes)
    number = _number("process_id", process_id)
    if count is not None and count < 1:
        raise ProcessError(f"num_processes is {count}; it must be at least 1.")
    if count == 1 and (number or 0) == 0:
        return None
    cluster = _cluster()
    given = {"coordinator": coordinator, "num_processes": count, "process_id": number}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return Group(None, None, None, cluster) if cluster else None
    if missing and cluster is None:
        have = ", ".join(f"--{name} {value}" for name, value in given.items() if value is not None)
        raise ProcessError(
            f"{have} alone does not make a group of processes: --{' and --'.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing (or {', '.join(ENVIRONMENT[name] for name in missing)} in the environment). "
            "Every process needs the same coordinator and number of processes, and a process_id of its own; in SLURM and on TPU pods it "
            "needs none of them."
        )
    if number is not None and not 0 <= number < (count if count is not None else number + 1):
        raise ProcessError(f"process_id is {number} of {count} processes; they are numbered from 0 to {count - 1 if count else '…'}.")
    if coordinator is not None:
        _address(coordinator)
    return Group(coordinator, count, number, cluster if missing else None)


def check_alone(command: str) -> None:
    """Raise ProcessError where several processes were started for a command that runs in one.

    On TPU machines that is allowed: each machine of a pod can run such a command by itself.
    """
    group = requested_group()
    if group is not None and group.cluster in (None, "SLURM", "Open MPI"):
        count = group.num_processes or os.environ.get("SLURM_NTASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE")
        raise ProcessError(
            f"jaxrlhf {command} is one process, and this is one of {count}: start it once (srun --ntasks=1). "
            "Only run, sft, reward and ppo work in several processes."
        )


def _number(name: str, given: int | None) -> int | None:
    text = os.environ.get(ENVIRONMENT[name]) if given is None else str(given)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ProcessError(f"{name} (from {ENVIRONMENT[name]}) is {text!r}; give a whole number.") from None


def _address(coordinator: str) -> tuple[str, int]:
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ProcessError(f"coordinator is {coordinator!r}; give host:port, where process 0 runs and a port that is free there.")
    return host.strip("[]"), int(port)


def _cluster() -> str | None:
    """The cluster in which JAX finds the other processes by itself; None where there is none, or only one process."""
    env = os.environ
    if _several(env.get("SLURM_NTASKS")) and {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= env.keys():
        return "SLURM"
    if _several(env.get("OMPI_COMM_WORLD_SIZE")):
        return "Open MPI"
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    if _several(env.get("MEGASCALE_NUM_SLICES")) or "," in hosts:
        return "TPU slice"
    if not hosts and "TPU_SKIP_MDS_QUERY" not in env and _tpu_machine():
        return "TPU pod"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "Kubernetes"
    return None


def _several(count: str | None) -> bool:
    return count is not None and count.isdigit() and int(count) > 1


def _tpu_machine() -> bool:
    """Whether this is a Cloud TPU machine, which may be one of a pod: JAX asks its metadata server."""
    from importlib.util import find_spec

    chips = os.path.exists("/dev/accel0") or (os.path.isdir("/dev/vfio") and len(os.listdir("/dev/vfio")) > 1)
    return chips and find_spec("libtpu") is not None


def check_free(coordinator: str) -> None:
    """Raise ProcessError where the port is taken: JAX may crash if it cannot listen."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that a finished run still holds in TIME_WAIT is free
        try:
            probe.bind(("", _address(coordinator)[1]))
        except OSError as error:
            raise ProcessError(
                f"process 0 cannot listen at {coordinator} ({error.strerror}): the port is taken, maybe by another run; name another "
                "one in --coordinator."
            ) from error


def wait_for(coordinator: str, timeout: int) -> None:
    """Wait until process 0 answers: if it never does, JAX would end this process without an exception."""
    host, port = _address(coordinator)
    deadline, reason = time.monotonic() + timeout, ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5):
                return
        except OSError as error:
            reason = str(error)
        time.sleep(0.2)
    raise ProcessError(
        f"process 0 does not answer at {host}:{port} for {timeout} s ({reason}): start it too, check the address, and "
        "check that its port is open."
    )


def devices_of_task() -> list[int] | None:
    """All GPUs of the node for a SLURM task that is alone on it: JAX gives every task one GPU. None elsewhere."""
    tasks, gpus = os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""), os.environ.get("SLURM_GPUS_ON_NODE", "")
    alone = tasks == "1" or tasks.startswith("1(x")
    if not alone or not gpus.isdigit() or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    return list(range(int(gpus)))
