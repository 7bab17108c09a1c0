"""A guard that names what compiles in the middle of a loop.

Every jitted function is compiled once for each set of shapes, dtypes and placements it is called with. That is meant in the first step of
a loop. Later it stops all devices for as long as the first step did, and nothing in the figures says why.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

_log = logging.getLogger(__name__)

Mode = Literal["warn", "error", "off"]
SHOWN = 5  # recompilations a loop describes; the others it counts
ARGUMENTS = 3  # of a recompilation, that are named

_EVENT = "/jax/core/compile/backend_compile_duration"
_LOGGER = logging.getLogger("jax._src.interpreters.pxla")
_LINE = "Compiling %s with global shapes and types %s"


class RecompileError(RuntimeError):
    """Something compiled after the first step of a loop, and `log.recompiles` is "error"; the message says what and why."""


@dataclass(frozen=True)
class Compilation:
    """One program that was compiled, or read from the cache of compiled programs: its name, its arguments, and the seconds it took.

    `shapes` like "int32[8,40]", `places` like "UnspecifiedValue" (where the caller left it to JAX) or a sharding, `names` like
    "batch.prompt_BL": one of each for every argument that the program uses, in order. Empty where this JAX does not tell them.
    """

    graph: str
    shapes: tuple[str, ...]
    places: tuple[str, ...]
    names: tuple[str, ...]
    seconds: float = 0.0

    @property
    def signature(self) -> tuple[Any, ...]:
        return self.graph, self.shapes, self.places


@dataclass(eq=False)
class CompileWatch:
    """What one loop, or one stage, compiled. Counting costs nothing until something is compiled.

    The first step is the warm-up: it compiles what it needs. What compiles from the second one on is said once for each graph with its
    shapes, through `say`, or raised (`mode` "error"). Where `widths` is set, batches come in several widths (`data.bucket`): a graph
    that compiles for another width is named as such and is no fault.
    """

    mode: Mode = "warn"
    say: Callable[[str], None] = _log.warning
    widths: int = 0
    seconds: float = 0.0  # spent on compiling so far
    seen: list[Compilation] = field(default_factory=list)
    _told: set[Any] = field(default_factory=set)
    _judged: int = 0  # how many of `seen` were looked at
    _warm: bool = False
    _late: int = 0
    _late_seconds: float = 0.0
    _thread: int = field(default_factory=threading.get_ident)

    def start(self) -> CompileWatch:
        _watching.add(self)
        return self

    def stop(self) -> None:
        """End the watch; what was too much to describe is summed up."""
        _watching.discard(self)
        if self.mode == "warn" and self._late > SHOWN:
            self.say(f"{self._late} compilations after the first step in all, {_brief(self._late_seconds)}; {SHOWN} are named above.")

    def step(self, n: int) -> None:
        """Step `n` was dispatched. Raises RecompileError where `mode` is "error" and it compiled something it should not have."""
        if self._judged == len(self.seen):
            self._warm = True
            return
        fresh, self._judged = self.seen[self._judged :], len(self.seen)
        if self._warm and self.mode != "off":
            for number, compilation in enumerate(fresh, start=self._judged - len(fresh)):
                self._judge(n, compilation, self.seen[:number])
        self._warm = True

    def _judge(self, n: int, new: Compilation, before: list[Compilation]) -> None:
        old = _closest(new, [one for one in before if one.graph == new.graph])
        first_time = new.signature not in self._told
        self._told.add(new.signature)
        if self.widths and old is not None and _other_widths(old, new):
            if first_time:
                self.say(f"step {n}: {new.graph} compiled for another width ({_changes(old, new)}), {_brief(new.seconds)}; "
                         f"data.bucket {self.widths} makes a program for each width.")  # fmt: skip
            return
        text = f"step {n}: {explain(old, new)}"
        if self.mode == "error":
            raise RecompileError(f"{text} This is an error because log.recompiles is error; with warn the run goes on.")
        self._late += 1
        self._late_seconds += new.seconds
        if first_time and self._late <= SHOWN:
            self.say(text)


def explain(old: Compilation | None, new: Compilation) -> str:
    """What was compiled, what differs from the last time, why that is and what to do about it."""
    if old is None:
        shown = ", ".join(new.shapes[:ARGUMENTS]) + (", …" if len(new.shapes) > ARGUMENTS else "")
        return (f"compiled only now: {new.graph} of {shown or 'no arguments'}, {_brief(new.seconds)}. It was not called in the first step; "
                "call it there, or outside the loop.")  # fmt: skip
    return f"compiled again: {new.graph}, {_brief(new.seconds)}: {_changes(old, new) or 'the same arguments'}. {_cause(old, new)}"


def _brief(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.2g} s"


def _differing(old: Compilation, new: Compilation) -> list[int]:
    pairs = zip(zip(old.shapes, old.places, strict=False), zip(new.shapes, new.places, strict=False), strict=False)
    return [number for number, (before, now) in enumerate(pairs) if before != now]


def _changes(old: Compilation, new: Compilation) -> str:
    """ "batch.prompt_BL int32[8,32] → int32[8,40]", and so on."""
    if len(old.shapes) != len(new.shapes):
        return f"{len(old.shapes)} arguments → {len(new.shapes)}"
    differ = sorted(_differing(old, new), key=lambda number: old.shapes[number] == new.shapes[number])  # shapes first
    parts = []
    for number in differ[:ARGUMENTS]:
        name = new.names[number] if number < len(new.names) else f"argument {number + 1}"
        kind = "shapes" if old.shapes[number] != new.shapes[number] else "places"
        parts.append(f"{name} {_place(getattr(old, kind)[number])} → {_place(getattr(new, kind)[number])}")
    more = len(differ) - len(parts)
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")


def _place(text: str) -> str:
    return "wherever it is" if text == "UnspecifiedValue" else text.replace(", memory_kind=device", "")


def _cause(old: Compilation, new: Compilation) -> str:
    if len(old.shapes) != len(new.shapes):
        return "The trees differ in structure: give every step the same fields."
    differ = _differing(old, new)
    if not differ:
        return "The function is a new one (make it once, outside the loop), or a field that it does not use has changed."
    shapes = [(old.shapes[number], new.shapes[number]) for number in differ if old.shapes[number] != new.shapes[number]]
    if not shapes:
        return "The same shapes lie elsewhere, or are committed to a device now: place them as the first step had them (sharding.place)."
    if any(_dtype(before) != _dtype(now) for before, now in shapes):
        return "Another dtype (weak: a Python number is among them): cast it before the step."
    if any(_dims(before)[:1] != _dims(now)[:1] for before, now in shapes):
        return "Another number of rows: fill the last batch up."
    return "Rows of another width: pad them to one, or cut them to few (data.bucket)."


def _dtype(shape: str) -> str:
    return re.sub(r"\[.*?\]", "", shape)


def _dims(shape: str) -> list[str]:
    found = re.search(r"\[(.*?)\]", shape)
    return found[1].split(",") if found and found[1] else []


def _other_widths(old: Compilation, new: Compilation) -> bool:
    """Whether the two differ in nothing but axes after the first."""
    differ = _differing(old, new)
    if len(old.shapes) != len(new.shapes) or not differ:
        return False
    return all(
        _dtype(old.shapes[number]) == _dtype(new.shapes[number])
        and len(_dims(old.shapes[number])) == len(_dims(new.shapes[number]))
        and _dims(old.shapes[number])[:1] == _dims(new.shapes[number])[:1]
        for number in differ
    )


def _closest(new: Compilation, before: list[Compilation]) -> Compilation | None:
    """The one that differs in the fewest arguments; of equals the latest."""
    if not before:
        return None
    return min(reversed(before), key=lambda old: (len(old.shapes) != len(new.shapes), len(_differing(old, new))))


@contextmanager
def count_compilations() -> Iterator[CompileWatch]:
    """Count the seconds that the block spends on compiling, in the thread that opened it."""
    watch = CompileWatch("off").start()
    try:
        yield watch
    finally:
        watch.stop()


@contextmanager
def ignore_compilations() -> Iterator[None]:
    """What the block compiles is no part of a step: a library that cuts arrays to write them, say."""
    _watching._latest.apart = True
    try:
        yield
    finally:
        _watching._latest.apart = False


class _Watching(logging.Filter):
    """The watches that are open. While there is one, JAX's logger and its event of compilation are listened to.

    The logger tells the graph and its arguments and the event tells the seconds; both come from the thread that compiles, in this order.
    """

    def __init__(self) -> None:
        super().__init__()
        self._watches: list[CompileWatch] = []
        self._latest = threading.local()
        self._levels = (logging.NOTSET, logging.WARNING)  # of JAX's logger: its own, and the one in effect
        self._lock = threading.Lock()

    def add(self, watch: CompileWatch) -> None:
        import jax

        with self._lock:
            if not self._watches:
                self._levels = _LOGGER.level, _LOGGER.getEffectiveLevel()
                _LOGGER.setLevel(logging.DEBUG)
                _LOGGER.addFilter(self)
                jax.monitoring.register_event_duration_secs_listener(self._event)
            self._watches.append(watch)

    def discard(self, watch: CompileWatch) -> None:
        import jax

        with self._lock:
            if not any(one is watch for one in self._watches):
                return
            self._watches = [one for one in self._watches if one is not watch]
            if not self._watches:
                _LOGGER.removeFilter(self)
                _LOGGER.setLevel(self._levels[0])
                with suppress(AssertionError, ValueError):  # where someone has cleared all listeners
                    jax.monitoring.unregister_event_duration_listener(self._event)

    def filter(self, record: logging.LogRecord) -> bool:
        """Note what is about to be compiled; the line goes on to the handlers only where it would have without us."""
        if str(record.msg).startswith(_LINE):
            self._latest.compilation = _parsed(record)
        return record.levelno >= self._levels[1]

    def _event(self, event: str, duration_secs: float, **facts: Any) -> None:
        if event != _EVENT or getattr(self._latest, "apart", False):
            return
        latest: Compilation | None = getattr(self._latest, "compilation", None)
        self._latest.compilation = None
        graph = str(facts.get("fun_name", "a function"))
        told = latest if latest is not None and latest.graph in (graph, f"jit({graph})") else Compilation(graph, (), (), ())
        compilation = Compilation(told.graph, told.shapes, told.places, told.names, duration_secs)
        for watch in self._watches:
            if watch._thread == threading.get_ident():
                watch.seen.append(compilation)
                watch.seconds += duration_secs


_watching = _Watching()


def _parsed(record: logging.LogRecord) -> Compilation | None:
    """The compilation that a line of JAX's logger announces; None where it is of another make."""
    if not isinstance(record.args, tuple) or len(record.args) != 3:
        return None
    graph, arguments, places = record.args
    if not isinstance(arguments, list | tuple) or not isinstance(places, list | tuple):
        return None
    return Compilation(str(graph), tuple(_shape(one) for one in arguments), tuple(map(str, places)), _names(len(arguments)))


def _shape(argument: Any) -> str:
    """ShapedArray(float32[], weak_type=True) → "float32[] weak"."""
    text = str(argument).removeprefix("ShapedArray(").removesuffix(")")
    return text.replace(", weak_type=True", " weak")


def _names(count: int) -> tuple[str, ...]:
    """The names of the program's arguments, from the call that is compiling it: JAX keeps them beside the program and logs them nowhere."""
    frame = sys._getframe()
    while frame := frame.f_back:
        program = frame.f_locals.get("closed_jaxpr")
        if program is not None:
            names = getattr(getattr(program, "jaxpr", program).debug_info, "arg_names", None) or ()
            return ("constant",) * (count - len(names)) + tuple(map(str, names)) if len(names) <= count else ()
    return ()
