"""Count what JAX compiles, and say what compiles in the middle of a training loop.

`jax.jit` compiles a function once for each set of shapes, dtypes and placements it is called with. In the first step of a loop that is
expected. Later it stops all devices for as long as the first step did, and no metric says why.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

_log = logging.getLogger(__name__)

Mode = Literal["warn", "error", "off"]
SHOWN = 5  # compilations of a loop that get a line each; the others are summed up at its end
EXPLAIN = "JAX_EXPLAIN_CACHE_MISSES"  # environment variable of JAX: log which argument changed

_EVENT = "/jax/core/compile/backend_compile_duration"
_ignoring = threading.local()  # `.on` inside of ignore_compilations


class RecompileError(RuntimeError):
    """Something compiled after the first step of a loop, and `log.recompiles` is "error"."""


@dataclass(frozen=True)
class Compilation:
    """One program that was compiled, or read from the cache of compiled programs."""

    graph: str  # "jit(step)"
    seconds: float


@dataclass(eq=False)
class CompileWatch:
    """Record what the thread that made it compiles between `start` and `stop`; a step that compiles nothing costs nothing.

    The first step is the warm-up. What compiles from the second one on gets a line through `say`, or raises (`mode` "error"). With
    `widths` (`data.bucket`) a graph compiles once for each width of the batches: one that has compiled before is then no error.
    """

    mode: Mode = "warn"
    say: Callable[[str], None] = _log.warning
    widths: int = 0
    seen: list[Compilation] = field(default_factory=list)
    _checked: int = 0  # how many of `seen` belong to earlier steps
    _warm: bool = False
    _late: list[Compilation] = field(default_factory=list)
    _thread: int = field(default_factory=threading.get_ident)

    @property
    def seconds(self) -> float:
        """Spent on compiling so far."""
        return sum(one.seconds for one in self.seen)

    def start(self) -> CompileWatch:
        import jax  # here, as the store of finished stages needs no JAX

        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def stop(self) -> None:
        """Stop recording, and sum up the compilations that got no line."""
        import jax

        with suppress(AssertionError, ValueError):  # somebody has cleared all listeners
            jax.monitoring.unregister_event_duration_listener(self._listen)
        if len(self._late) > SHOWN:
            total = _brief(sum(one.seconds for one in self._late))
            self.say(f"{len(self._late)} compilations after the first step in all, {total}; the first {SHOWN} are named above.")

    def step(self, n: int) -> None:
        """Step `n` was dispatched. Raises RecompileError where `mode` is "error" and it compiled what it should not have."""
        first, self._checked = self._checked, len(self.seen)
        if self._warm and self.mode != "off":
            for number in range(first, self._checked):
                self._report(n, self.seen[number], {one.graph for one in self.seen[:number]})
        self._warm = True

    def _report(self, n: int, new: Compilation, before: set[str]) -> None:
        text, fault = f"step {n}: {new.graph} compiled again, {_brief(new.seconds)}", True
        if new.graph not in before:
            text = f"step {n}: {new.graph} compiled, {_brief(new.seconds)}, and was not called in the first step; call it there, or before."
        elif self.widths:
            text, fault = f"{text}, for another width of the batch: data.bucket {self.widths} makes one program a width.", False
        else:
            text += f": an argument has changed, or the function is a new one. Run again with {EXPLAIN}=1, and JAX logs what differs."
        if fault and self.mode == "error":
            raise RecompileError(f"{text} With log.recompiles: warn the run goes on.")
        self._late.append(new)
        if len(self._late) <= SHOWN:
            self.say(text)

    def _listen(self, event: str, duration_secs: float, **facts: Any) -> None:
        if event == _EVENT and self._thread == threading.get_ident() and not getattr(_ignoring, "on", False):
            self.seen.append(Compilation(str(facts.get("fun_name", "a function")), duration_secs))


def _brief(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.2g} s"


@contextmanager
def count_compilations() -> Iterator[CompileWatch]:
    """Count the compilations of the block and their seconds, in the thread that opened it."""
    watch = CompileWatch("off").start()
    try:
        yield watch
    finally:
        watch.stop()


@contextmanager
def ignore_compilations() -> Iterator[None]:
    """Do not count what the block compiles: no part of a step, like a library that slices arrays to write them."""
    _ignoring.on = True
    try:
        yield
    finally:
        _ignoring.on = False
