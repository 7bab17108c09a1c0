"""Start, finish and abort a group of processes that work as one.

`jax.distributed` does the work: its coordinator, in process 0, knows the processes, stores the small values they exchange, receives their
heartbeats, and ends all others when one is silent for HEARTBEAT seconds. Added here: an exception in one process ends the others too, and
their messages name the process that is gone.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from jaxrlhf.distributed.cluster import Group, ProcessError, check_free, devices_of_task, requested_group, wait_for
from jaxrlhf.distributed.exchange import barrier
from jaxrlhf.distributed.membership import count
from jaxrlhf.distributed.watchdog import HEARTBEAT, PERIOD, SILENT, Watchdog, end_process, say

if TYPE_CHECKING:
    from collections.abc import Callable

START_TIMEOUT = 300  # seconds that processes wait for each other at the start
SHUTDOWN_TIMEOUT = 60  # seconds between the first and the last process at the end
_watchdog: Watchdog | None = None


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, *, timeout: int = START_TIMEOUT
) -> bool:
    """Join the other processes, if there are any; whether there are. Call it before any other use of JAX.

    Arguments as in `requested_group`; `timeout`: seconds that the processes wait for each other. Raises ProcessError where they cannot
    connect.
    """
    global _watchdog
    group = requested_group(coordinator, num_processes, process_id)
    if group is None:
        return False
    import jax

    if jax.distributed.is_initialized():
        return count() > 1
    if group.coordinator is not None and group.process_id is not None:
        check_free(group.coordinator) if group.process_id == 0 else wait_for(group.coordinator, timeout)
    patience = threading.Timer(20, say, [f"still waiting for the other processes ({timeout} s at most)"])
    patience.daemon = True
    patience.start()
    try:
        # Its notice is SIGTERM, which `stops` hears; with the service JAX would record it and go on until it is killed.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            group.coordinator,
            group.num_processes,
            group.process_id,
            local_device_ids=devices_of_task(),
            cluster_detection_method=None if group.cluster else "deactivate",
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    except Exception as error:
        raise ProcessError(_not_started(group, error)) from error
    finally:
        patience.cancel()
    if count() == 1:
        return False
    _watchdog = Watchdog()
    sys.excepthook = _told_to_others(sys.excepthook)
    return True


def _told_to_others(shown: Callable[..., Any]) -> Callable[..., None]:
    """An excepthook that shows an uncaught exception and ends the other processes too."""

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        shown(kind, error, trace)
        abort(1, f"{kind.__name__}: {error}")

    return hook


def _not_started(group: Group, error: Exception) -> str:
    where = group.coordinator or f"found through {group.cluster}"
    if "before any JAX" in str(error) or "backend" in str(error):
        return "JAX was in use before the processes were joined; call jaxrlhf.distributed.start() before anything else."
    alone = " Start a single process with --num_processes 1." if group.cluster else ""
    return f"the processes could not be joined ({where}): {error or repr(error)}.{alone}"


def finish() -> None:
    """End a successful run in every process: wait for each other and disconnect. Does nothing in a single process."""
    if _watchdog is None:
        return
    import jax

    barrier("end")
    _watchdog.stop()
    jax.distributed.shutdown()


def failure_elsewhere(error: BaseException) -> str | None:
    """The message for an `error` that another process caused by ending; None where the error is this process's own.

    Waits until the others are known to be alive or not, at most SILENT + 2 · PERIOD seconds.
    """
    if _watchdog is None or not _from_between(error):
        return None
    deadline = time.monotonic() + SILENT + 2 * PERIOD
    while time.monotonic() < deadline:
        if found := _watchdog.lost_peer():
            return found
        time.sleep(0.2)
    return None


def _from_between(error: BaseException | None) -> bool:
    """Whether the JAX runtime raised it, as it does for a broken collective."""
    while error is not None:
        if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_grouped() -> bool:
    """Whether `start` has joined this process with others."""
    return _watchdog is not None


def abort(status: int, message: str | None = None) -> None:
    """End this process and the others of its group, which show `message` (None: another process ended first).

    Returns in a single process.
    """
    if _watchdog is None:
        return
    if message is not None:
        _watchdog.announce(message)
    else:
        _watchdog.acknowledge()
    end_process(status)
