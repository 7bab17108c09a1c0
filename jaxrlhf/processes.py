"""Several processes that work as one: how they find each other, agree on what to do, and end together.

`jax.distributed` is the engine: its coordinator, in process 0, knows the processes, keeps the small values they exchange, hears their
heartbeats and ends those that are left when one is silent for HEARTBEAT seconds. What is added here: an ordinary exception in one process
ends the others too, and whoever watches is told which process is gone. Process 0 is the leader: it decides, locks, writes and logs. In a
process that stands alone `agree` and `barrier` do nothing, and nothing here touches JAX.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import threading
import time
from base64 import b64decode, b64encode
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from jaxrlhf.cluster import Group, ProcessError, check_free, devices_of_task, wait_for, wanted

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

HEARTBEAT = 30  # seconds without a sign of life after which jax takes a process for dead, and ends the others
START_TIMEOUT = 300  # seconds that processes wait for each other at the start
SHUTDOWN_TIMEOUT = 60  # seconds between the first and the last process at the end
PATIENCE_MS = 7 * 24 * 3600 * 1000  # one process may work alone for long; that it lives, the heartbeat says
STATUS_OF_OTHERS = 75  # exit status of a process that ends because another one did
PERIOD = 2.0  # seconds between two looks at the others
SILENT = 12.0  # seconds without a word after which a process is said to be silent
AGAIN = "Start all processes again with the same command: the run goes on from its last checkpoint."
_PIECE = 500_000  # characters of a value that travel in one message
_ROWS = 16384  # of a table that travel at a time

_numbers = itertools.count()  # of agreements and barriers, which all processes pass in the same order
_watch: _Watch | None = None


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, *, timeout: int = START_TIMEOUT
) -> bool:
    """Join the other processes, if there are any; whether there are. Before anything else is asked of JAX.

    Arguments as `wanted` takes them; `timeout` is how many seconds the processes wait for each other. Raises ProcessError where they
    cannot meet.
    """
    global _watch
    group = wanted(coordinator, num_processes, process_id)
    if group is None:
        return False
    import jax

    if jax.distributed.is_initialized():
        return count() > 1
    if group.coordinator is not None and group.process_id is not None:
        check_free(group.coordinator) if group.process_id == 0 else wait_for(group.coordinator, timeout)
    patience = threading.Timer(20, _say, [f"still waiting for the other processes ({timeout} s at most)"])
    patience.daemon = True
    patience.start()
    try:
        # Otherwise SIGTERM would only be noted, and a process that a scheduler wants to end would go on until it is killed.
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
    _watch = _Watch()
    sys.excepthook = _told_to_others(sys.excepthook)
    return True


def _told_to_others(shown: Callable[..., Any]) -> Callable[..., None]:
    """What becomes of an exception that nobody has caught: it is shown, and ends the others too."""

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        shown(kind, error, trace)
        leave(1, f"{kind.__name__}: {error}")

    return hook


def _not_started(group: Group, error: Exception) -> str:
    where = group.coordinator or f"found through {group.cluster}"
    if "before any JAX" in str(error) or "backend" in str(error):
        return "JAX was in use before the processes were joined; call jaxrlhf.processes.start() before anything else."
    alone = " A process that is to run alone is started with --num_processes 1." if group.cluster else ""
    return f"the processes could not be joined ({where}): {error or repr(error)}.{alone}"


def count() -> int:
    """How many processes there are."""
    jax = _joined()
    return 1 if jax is None else jax.process_count()


def index() -> int:
    """The number of this process; 0 is the leader."""
    jax = _joined()
    return 0 if jax is None else jax.process_index()


def _joined() -> Any:
    """The module jax where it has joined this process with others, else None; a process that has not imported it stands alone."""
    jax = sys.modules.get("jax")
    return jax if jax is not None and jax.distributed.is_initialized() else None


def is_leader() -> bool:
    """Whether this process decides, writes and logs; a process that stands alone does."""
    return index() == 0


def agree(value: Any, what: str = "a value") -> Any:
    """The leader's `value` (anything JSON takes) in every process; what the others pass is ignored.

    All processes call it, in the same order. `what` names the place; ProcessError where a process is at another one.
    """
    if count() == 1:
        return value
    key, client = f"jaxrlhf/agree/{next(_numbers)}", _client()
    if is_leader():
        text = json.dumps({"what": what, "value": value}, ensure_ascii=True)
        pieces = [text[n : n + _PIECE] for n in range(0, len(text), _PIECE)]
        for n, piece in enumerate(pieces):
            client.key_value_set(f"{key}/{n}", piece)
        client.key_value_set(key, str(len(pieces)))
        return json.loads(text)["value"]
    pieces = int(client.blocking_key_value_get(key, PATIENCE_MS))
    told = json.loads("".join(client.blocking_key_value_get(f"{key}/{n}", PATIENCE_MS) for n in range(pieces)))
    if told["what"] != what:
        raise ProcessError(
            f"process {index()} is at {what!r} and process 0 at {told['what']!r}: they do not do the same. Start all with the same "
            "command, config, code and data."
        )
    return told["value"]


def agree_on_columns(columns: dict[str, np.ndarray] | None, what: str) -> dict[str, np.ndarray]:
    """`agree` for arrays by name, to the bit; None from the others. For what lies on a disk that they may not see."""
    if count() == 1 and columns is not None:
        return columns
    import numpy as np

    packed = {name: (x.dtype.str, x.shape, b64encode(x.tobytes()).decode()) for name, x in (columns or {}).items()}
    told = agree(packed, what).items()
    return {name: np.frombuffer(b64decode(text), dtype).reshape(shape).copy() for name, (dtype, shape, text) in told}


def agree_on_rows(rows_ND: np.ndarray | None, what: str) -> np.ndarray:
    """The leader's float32 [N, D] in every process, where that is too much for `agree`: from device to device, a block at a time."""
    if count() == 1 and rows_ND is not None:
        return rows_ND
    import numpy as np
    from jax.experimental.multihost_utils import broadcast_one_to_all

    n, width = agree(None if rows_ND is None else list(rows_ND.shape), what)
    given = np.zeros((0, width), np.float32) if rows_ND is None else rows_ND
    blocks = []
    for start in range(0, n, _ROWS):
        block = np.zeros((min(_ROWS, n - start), width), np.float32)
        here = given[start : start + _ROWS]
        block[: len(here)] = here
        blocks.append(np.asarray(broadcast_one_to_all(block)))
    return np.concatenate([np.zeros((0, width), np.float32), *blocks])


def barrier(name: str) -> None:
    """Return once all processes are here. All call it, in the same order."""
    if count() > 1:
        _client().wait_at_barrier(f"jaxrlhf/barrier/{next(_numbers)}/{name}", PATIENCE_MS)


def finish() -> None:
    """The end of a run that went well, in every process: wait for each other and let go. Nothing, in a process that stands alone."""
    if _watch is None:
        return
    import jax

    barrier("end")
    _watch.stop()
    jax.distributed.shutdown()


def because_of_another(error: BaseException) -> str | None:
    """What to say where `error` has its cause in another process: that one's end. None where the error is this process's own.

    Waits until it is known, at most SILENT seconds and a look.
    """
    if _watch is None or not _from_between(error):
        return None
    deadline = time.monotonic() + SILENT + 2 * PERIOD
    while time.monotonic() < deadline:
        if found := _watch.gone():
            return found
        time.sleep(0.2)
    return None


def _from_between(error: BaseException | None) -> bool:
    """Whether the runtime raised it, and not a `raise` statement with a message for users: a collective that broke looks like that."""
    while error is not None:
        if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
            return True
        error = error.__cause__ or error.__context__
    return False


def together() -> bool:
    """Whether `start` has joined this process with others."""
    return _watch is not None


def leave(status: int, message: str | None = None) -> None:
    """End this process of a group, and with it the others, who are told `message` (None: it ends because of another). Returns where the
    process stands alone."""
    if _watch is None:
        return
    if message is not None:
        _watch.tell(message)
    else:
        _watch.heard()
    _end(status)


def _end(status: int) -> None:
    """Without the hooks that run at exit: jax's would wait for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _say(text: str) -> None:
    print(f"jaxrlhf: {text}", file=sys.stderr, flush=True)


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


class _Watch:
    """Tells the others that this process lives, and hears whether they do."""

    def __init__(self) -> None:
        import jax

        self._client, self._me, self._count = _client(), index(), count()
        self._lost = jax.errors.JaxRuntimeError  # the coordinator is gone, or has let go
        self._period = max(PERIOD, self._count / 64)  # the coordinator answers all of them
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._heard: dict[int, tuple[str, float]] = {}  # process → (its last word, when it was new)
        self._silent: set[int] = set()
        self._names: dict[int, str] = {}
        name = f"process {self._me} of {self._count} (pid {os.getpid()} on {socket.gethostname()})"
        self._client.key_value_set(f"jaxrlhf/name/{self._me}", name)
        threading.Thread(target=self._run, name="jaxrlhf-processes", daemon=True).start()

    def _run(self) -> None:
        for n in itertools.count():
            try:
                self._client.key_value_set(f"jaxrlhf/alive/{self._me}", str(n), allow_overwrite=True)
                self._listen()
                failed = self._failed()
            except self._lost:  # jax ends this process now
                return
            except Exception as error:  # a fault of this watch must not make it deaf
                _say(f"could not look after the other processes ({error!r}); trying again.")
                failed = None
            if failed and not self._stopped.is_set():
                _say(failed)
                self.heard()
                _end(STATUS_OF_OTHERS)
            if self._stopped.wait(self._period):
                return

    def stop(self) -> None:
        self._stopped.set()

    def tell(self, message: str) -> None:
        """Let the others know that this process ends because of `message`."""
        self.stop()
        with suppress(self._lost):
            self._client.key_value_set(f"jaxrlhf/failed/{self._me}", message)
            self._until_all_heard()

    def heard(self) -> None:
        """Let the leader know that this process ends because another one did."""
        with suppress(self._lost):
            self._client.key_value_set(f"jaxrlhf/heard/{self._me}", "", allow_overwrite=True)
            self._until_all_heard()

    def _until_all_heard(self) -> None:
        """What the others read goes with the leader, which waits until all know, but the one that failed."""
        deadline = time.monotonic() + 2 * self._period + 1
        while self._me == 0 and time.monotonic() < deadline and len(self._client.key_value_dir_get("jaxrlhf/heard/")) < self._count - 1:
            time.sleep(0.1)

    def gone(self) -> str | None:
        """Why another process is gone, in a sentence; None as long as all are there."""
        try:
            if failed := self._failed():
                self.stop()
                return failed
        except self._lost:
            return f"process 0, through which the processes talk, is gone. {AGAIN}"
        with self._lock:
            silent = sorted(self._silent)
        return f"{' and '.join(map(self._called, silent))} cannot be heard any more. {AGAIN}" if silent else None

    def _failed(self) -> str | None:
        for key, message in self._client.key_value_dir_get("jaxrlhf/failed/"):
            number = int(key.rsplit("/", 1)[1])
            if number != self._me:
                return f"{self._called(number)} ended: {message}"
        return None

    def _listen(self) -> None:
        """Whose word is not new for SILENT seconds is said to be silent, once; whether it is dead, jax decides."""
        now = time.monotonic()
        words = {int(key.rsplit("/", 1)[1]): word for key, word in self._client.key_value_dir_get("jaxrlhf/alive/")}
        with self._lock:
            for number, word in words.items():
                if self._heard.get(number, ("", 0.0))[0] != word:
                    self._heard[number] = word, now
            silent = {n for n, (_, when) in self._heard.items() if n != self._me and now - when > SILENT + self._period}
            fresh, self._silent = silent - self._silent, silent
        for number in sorted(fresh):
            _say(
                f"{self._called(number)} cannot be heard for {SILENT:.0f} s; if it is gone, jax ends this one within {HEARTBEAT} s. {AGAIN}"
            )

    def _called(self, number: int) -> str:
        if number not in self._names:
            named = dict(self._client.key_value_dir_get("jaxrlhf/name/"))
            self._names[number] = named.get(f"jaxrlhf/name/{number}", f"process {number}")
        return self._names[number]
