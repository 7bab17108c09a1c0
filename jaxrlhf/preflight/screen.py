"""Checks one after the other, each a function; one that throws is a red line of its own and ends nothing."""

import json
import linecache
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

import jaxrlhf
from jaxrlhf.formatting import as_strict_json

GREEN, YELLOW, RED, UNCHECKED = "green", "yellow", "red", "not checked"
STYLE = {GREEN: "green", YELLOW: "bold yellow", RED: "bold red", UNCHECKED: "dim"}
PACKAGE = Path(jaxrlhf.__file__).parent


class Found(NamedTuple):
    """What a check says: its colour, the figure with its n, and what to do where it is not green."""

    colour: str
    figure: str
    advice: str = ""


class Look(NamedTuple):
    """A check: `function(subject)` gives what it found, None where the recipe has nothing of the kind. `reads` names the parts of the
    config (`Subject.part`) that the answer depends on: arms that agree in them are looked at once."""

    section: str
    name: str
    function: Callable[[Any], Found | None]
    reads: tuple[str, ...]


class Check(NamedTuple):
    """One line of the screen; `arms` are those it is true of, none where it is of all."""

    section: str
    name: str
    arms: tuple[str, ...]
    colour: str
    figure: str
    advice: str
    seconds: float


def run_looks(looks: Sequence[Look], subjects: Mapping[str, Any], shown: Callable[[Check], Any], console: Console) -> list[Check]:
    """Every check of every arm, those that agree once; `shown` is called with each as it is done. A fault that has been told is not told
    again by what needs the same thing."""
    checks: list[Check] = []
    for look in looks:
        groups: dict[str, list[str]] = {}
        for arm, subject in subjects.items():
            groups.setdefault(repr([subject.part(name) for name in look.reads]), []).append(arm)
        for arms in groups.values():
            with console.status(f"{look.section}: {look.name}"):
                found, seconds = timed(look, subjects[arms[0]])
            if found is None:
                continue
            if found.colour == RED and (first := next((one for one in checks if one.figure == found.figure), None)):
                found = Found(UNCHECKED, f"for the same reason as {first.name!r}")
            checks.append(Check(look.section, look.name, tuple(arms) if len(arms) < len(subjects) else (), *found, seconds))
            shown(checks[-1])
    return checks


def timed(look: Look, subject: Any) -> tuple[Found | None, float]:
    """What the check found, its own error included, and how long it took."""
    start = time.perf_counter()
    try:
        found = look.function(subject)
    except Exception as error:
        found = Found(RED, told(error), where(error))
    return found, time.perf_counter() - start


def told(error: BaseException) -> str:
    """The message; with the kind of error where no one wrote it for users."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return text if type(error).__module__.startswith("jaxrlhf.") or where(error) == "" else f"{type(error).__name__}: {text}"


def where(error: BaseException) -> str:
    """The last line of the user's own code, or of an operation of ours, that the error came through; "" for what this package raises."""
    frames = traceback.extract_tb(error.__traceback__)
    if frames and Path(frames[-1].filename).is_relative_to(PACKAGE) and (frames[-1].line or "").lstrip().startswith("raise"):
        return ""
    outside = [one for one in frames if not any(part in one.filename for part in ("site-packages", "<", "/lib/python")) or not one.line]
    own = [one for one in outside if not Path(one.filename).is_relative_to(PACKAGE)]
    last = (own or outside or frames)[-1]
    return f"{last.filename}:{last.lineno}: {linecache.getline(last.filename, last.lineno or 0).strip()}"


class Screen:
    """Lines as they come, then a summary: words beside colours, for terminals of any width."""

    def __init__(self, console: Console):
        self.console, self.section = console, ""

    def line(self, check: Check) -> None:
        if check.section != self.section:
            self.section = check.section
            self.console.print(Text(check.section, style="bold"))
        row = Table.grid(padding=(0, 1))
        row.add_column(width=11)
        row.add_column(width=17)
        row.add_column(ratio=1)
        said = Text(check.figure + (f" [{', '.join(check.arms)}]" if check.arms else ""))
        if check.advice:
            said.append(f"\n-> {check.advice}", style=STYLE[check.colour])
        row.add_row(Text(f" {check.colour}", style=STYLE[check.colour]), Text(check.name), said)
        self.console.print(row)

    def summary(self, checks: Sequence[Check]) -> None:
        counts = [f"{n} {colour}" for colour in STYLE if (n := sum(one.colour == colour for one in checks))]
        slow = sorted(checks, key=lambda one: -one.seconds)[:4]
        times = ", ".join(f"{one.name} {one.seconds:.1f} s" for one in slow)
        self.console.print(Text(f"{', '.join(counts)}, in {sum(one.seconds for one in checks):.0f} s ({times})"))


def as_json(checks: Sequence[Check]) -> str:
    return json.dumps(as_strict_json([one._asdict() for one in checks]), indent=1, ensure_ascii=False) + "\n"
