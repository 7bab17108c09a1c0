"""Checks one after the other, each a function; one that throws is a red line of its own and ends nothing."""

import json
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
PACKAGE, STANDARD = (f"{Path(str(module.__file__)).parent}/" for module in (jaxrlhf, traceback))


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
    """Every check of every arm, once where arms agree in all it reads; `shown` is called with each as it is done. A fault that has been
    told is not told again by what stumbles over the same thing."""
    checks: list[Check] = []
    for look in looks:
        known: dict[str, tuple[Found | None, float]] = {}
        lines: dict[Found, list[str]] = {}
        for arm, subject in subjects.items():
            key = repr([subject.part(name) for name in look.reads])
            if key not in known:
                with console.status(f"{look.section}: {look.name}"):
                    known[key] = timed(look, subject)
            if (found := known[key][0]) is not None:
                lines.setdefault(found, []).append(arm)
        seconds = sum(one[1] for one in known.values())
        for found, arms in lines.items():
            if found.colour == RED and (first := next((one for one in checks if one.figure == found.figure), None)):
                found = Found(UNCHECKED, f"for the same reason as {first.name!r}")
            checks.append(Check(look.section, look.name, tuple(arms) if len(arms) < len(subjects) else (), *found, seconds / len(lines)))
            shown(checks[-1])
    return checks


def timed(look: Look, subject: Any) -> tuple[Found | None, float]:
    """What the check found, its own error included, and how long it took."""
    start = time.perf_counter()
    try:
        found = look.function(subject)
    except Exception as error:
        place = where(error)
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
        found = Found(RED, f"{type(error).__name__}: {text}" if place else text, place)
    return found, time.perf_counter() - start


def where(error: BaseException) -> str:
    """The last line of the user's own code that the error came through, else of ours; "" where the package raised it, for users to read."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [one for one in frames if one.filename.startswith(PACKAGE)]
    own = [one for one in frames if not one.filename.startswith((PACKAGE, STANDARD, "<")) and "site-packages" not in one.filename]
    if not own and frames[-1] in ours and (frames[-1].line or "").startswith("raise"):
        return ""
    last = (own or ours or frames)[-1]
    return f"{last.filename}:{last.lineno}: {last.line}"


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
