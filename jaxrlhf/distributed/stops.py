"""Stop when asked: SIGTERM (of a scheduler, or as notice of a preemption) and Ctrl-C end a run behind its next step or batch.

    with heard():                             a command
        with Looks(minutes=10) as looks:      a loop
            for n in …:
                …
                save, stop = looks.at(n)
                if save:
                    …
                    looks.saved()
                if stop is not None:
                    raise Stopped(stop, f"saved at step {n}")

Between two loops, and before the first step of one, nothing would be saved: there a signal raises Stopped at once, and a second one does so
everywhere. Of several processes each may be told; the leader decides for all, at steps that all know, about a second apart.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

from jaxrlhf.distributed.exchange import agree, barrier
from jaxrlhf.distributed.membership import coordinator_client, count, index, is_leader

SIGNALS = (signal.SIGTERM, signal.SIGINT)
APART = 1.0  # seconds between two looks of several processes (or one step, where that takes longer), and between two signals
_KEY = "jaxrlhf/stop/"

_asked: list[int] = []  # the signals that came, since `heard`
_heard: list[float] = []  # when the last one did
_holding: list["Looks"] = []  # the loop that will save before it stops


class Stopped(SystemExit):
    """A run that ends because it was told to; `code` is 128 + the signal's number. `where`: what was saved, None where it ends at once."""

    def __init__(self, number: int, where: str | None = None):
        super().__init__(128 + number)
        self.code: int = 128 + number
        self.signal, self.where = signal.Signals(number).name, where


class Look(NamedTuple):
    save: bool
    stop: int | None  # the signal to stop for, once it is saved


@contextmanager
def heard() -> Iterator[None]:
    """Hear SIGTERM and Ctrl-C as described above, in the main thread; what a shell has a process ignore stays ignored."""
    _asked.clear()
    alone = threading.current_thread() is not threading.main_thread()
    before = {} if alone else {number: how for number in SIGNALS if (how := signal.getsignal(number)) is not None}  # None: not Python's
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _hear)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def ignored() -> None:
    """Ignore the signals from now on: the process is about to end."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _hear(number: int, frame: FrameType | None) -> None:
    del frame
    if _asked and time.monotonic() - _heard[0] < APART:  # one request may come by two ways: to the process and to its group
        return
    _heard[:] = [time.monotonic()]
    _asked.append(number)
    if not _holding or len(_asked) > 1:
        raise Stopped(number)
    # Not print: the signal may have come in the middle of one.
    os.write(2, b"\njaxrlhf: stopping after this step or batch is saved; once more stops at once.\n")


class Looks:
    """Whether a loop is to save or stop, asked after every step.

    It saves after so many `minutes` by the leader's clock, every so many steps (None: not for that), at the last one, and before it stops.
    """

    def __init__(self, minutes: float | None = None, every: int | None = None, last: int | None = None):
        self._seconds, self._every, self._last = None if minutes is None else 60 * minutes, every, last
        self._saved = self._looked = time.monotonic()
        self._at, self._next, self._told = 0, 0, False

    def __enter__(self) -> "Looks":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self in _holding:
            _holding.remove(self)
        if kind is None and _asked:  # it came behind the last look
            raise Stopped(_asked[0])

    def at(self, n: int) -> Look:
        """The decision after step `n`, in all processes the same; no device is waited for."""
        if self not in _holding:
            _holding.append(self)
            self._at = n - 1
        late, stop = self._decided() if count() == 1 else self._agreed(n)
        return Look(late or stop is not None or n == self._last or (self._every is not None and n % self._every == 0), stop)

    def saved(self) -> None:
        """What there was is saved: the minutes begin again."""
        barrier("saved")
        self._saved = time.monotonic()

    def _decided(self) -> tuple[bool, int | None]:
        late = self._seconds is not None and time.monotonic() - self._saved >= self._seconds
        return late, _asked[0] if _asked else None

    def _agreed(self, n: int) -> tuple[bool, int | None]:
        """The leader's decision, at the steps that it has named; between them there is none."""
        if _asked and not self._told:
            coordinator_client().key_value_set(f"{_KEY}{index()}", str(_asked[0]), allow_overwrite=True)
            self._told = True
        if n < self._next:
            return False, None
        now, (late, stop) = time.monotonic(), self._decided()
        if is_leader() and stop is None:
            stop = next((int(number) for _, number in coordinator_client().key_value_dir_get(_KEY)), None)
        # Twice as far at most: a device that is handed its first steps has not yet done them.
        further = int(APART * (n - self._at) / max(now - self._looked, 1e-6))
        further = max(1, min(further, 2 * (n - self._at)))
        late, stop, self._next = agree([late, stop, n + further], "whether to save or stop")
        self._at, self._looked = n, now
        return late, stop
