"""Show the other processes that this one is alive, and notice when one of them is not."""

import itertools
import os
import socket
import sys
import threading
import time
from contextlib import suppress

from jaxrlhf.distributed.membership import coordinator_client, count, index

HEARTBEAT = 30  # seconds without a heartbeat after which JAX declares a process dead, and ends the others
STATUS_OF_OTHERS = 75  # exit status of a process that ends because another one did
PERIOD = 2.0  # seconds between two checks of the others
SILENT = 12.0  # seconds without a new counter after which a process is reported as silent
AGAIN = "Start all processes again with the same command: the run goes on from its last checkpoint."


def end_process(status: int) -> None:
    """Exit without the exit hooks: JAX's would wait for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def say(text: str) -> None:
    print(f"jaxrlhf: {text}", file=sys.stderr, flush=True)


class Watchdog:
    """A thread that counts up a key of this process at the coordinator and reads those of the others."""

    def __init__(self) -> None:
        import jax

        self._client, self._me, self._count = coordinator_client(), index(), count()
        self._lost = jax.errors.JaxRuntimeError  # the coordinator is gone, or has disconnected
        self._period = max(PERIOD, self._count / 64)  # one coordinator answers all
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._heard: dict[int, tuple[str, float]] = {}  # process → (its last counter, when it was new)
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
            except self._lost:  # JAX ends this process now
                return
            except Exception as error:  # an error here must not stop the watchdog
                say(f"could not check the other processes ({error!r}); trying again.")
                failed = None
            if failed and not self._stopped.is_set():
                say(failed)
                self.acknowledge()
                end_process(STATUS_OF_OTHERS)
            if self._stopped.wait(self._period):
                return

    def stop(self) -> None:
        self._stopped.set()

    def announce(self, message: str) -> None:
        """Tell the others that this process ends because of `message`."""
        self.stop()
        with suppress(self._lost):
            self._client.key_value_set(f"jaxrlhf/failed/{self._me}", message)
            self._until_all_heard()

    def acknowledge(self) -> None:
        """Tell the leader that this process ends because another one did."""
        with suppress(self._lost):
            self._client.key_value_set(f"jaxrlhf/heard/{self._me}", "", allow_overwrite=True)
            self._until_all_heard()

    def _until_all_heard(self) -> None:
        """The coordinator's values end with the leader, so it waits until all but the failed process have read them."""
        deadline = time.monotonic() + 2 * self._period + 1
        while self._me == 0 and time.monotonic() < deadline and len(self._client.key_value_dir_get("jaxrlhf/heard/")) < self._count - 1:
            time.sleep(0.1)

    def lost_peer(self) -> str | None:
        """Why another process is gone, in a sentence; None while all are alive."""
        try:
            if failed := self._failed():
                self.stop()
                return failed
        except self._lost:
            return f"process 0, which runs the coordinator, is gone. {AGAIN}"
        with self._lock:
            silent = sorted(self._silent)
        return f"{' and '.join(map(self._called, silent))} went silent. {AGAIN}" if silent else None

    def _failed(self) -> str | None:
        for key, message in self._client.key_value_dir_get("jaxrlhf/failed/"):
            number = int(key.rsplit("/", 1)[1])
            if number != self._me:
                return f"{self._called(number)} ended: {message}"
        return None

    def _listen(self) -> None:
        """Report, once, each process whose counter has not changed for SILENT seconds; whether it is dead, JAX decides."""
        now = time.monotonic()
        counters = {int(key.rsplit("/", 1)[1]): counter for key, counter in self._client.key_value_dir_get("jaxrlhf/alive/")}
        with self._lock:
            for number, counter in counters.items():
                if self._heard.get(number, ("", 0.0))[0] != counter:
                    self._heard[number] = counter, now
            silent = {n for n, (_, when) in self._heard.items() if n != self._me and now - when > SILENT + self._period}
            fresh, self._silent = silent - self._silent, silent
        for number in sorted(fresh):
            say(f"{self._called(number)} is silent for {SILENT:.0f} s; if it is gone, JAX ends this one within {HEARTBEAT} s. {AGAIN}")

    def _called(self, number: int) -> str:
        if number not in self._names:
            named = dict(self._client.key_value_dir_get("jaxrlhf/name/"))
            self._names[number] = named.get(f"jaxrlhf/name/{number}", f"process {number}")
        return self._names[number]
