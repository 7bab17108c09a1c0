"""Checks one after the other, each a function; one that throws is a red line of its own and ends nothing."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

import jaxrlhf

GREEN, YELLOW, RED, UNCHECKED = "green", "yellow", "red", "not checked"
STYLE = {GREEN: "green", YELLOW: "bold yellow", RED: "bold red", UNCHECKED: "dim"}
NOT_THE_USERS = (*(f"{Path(str(module.__file__)).parent}/" for module in (jaxrlhf, traceback)), "<")


class Found(NamedTuple):
    """What a check says: its colour, the figure with its n, and what to do where it is not green."""

    colour: str
    figure: str
    advice: str = ""


class Look(NamedTuple):
    """A check: `function(subject)` gives what it found, None where the recipe has nothing of the kind. `reads` names the parts of the
    config (`Subject.part`) that the answer depends on: of arms that agree in them the first is looked at."""

    section: str
    name: str
    function: Callable[[Any], Found | None]
    reads: tuple[str, ...]


class Check(NamedTuple):
    """One line of the screen; `arm` is "" where the recipe has one alone."""

    arm: str
    section: str
    name: str
    colour: str
    figure: str
    advice: str


def run_looks(looks: Sequence[Look], subjects: Mapping[str, Callable[[], Any]]) -> Iterator[Check]:
    """Every check of every arm, as it is done. `subjects` makes what is looked at, one arm after the other: each may hold models."""
    done: set[str] = set()
    faults: dict[str, str] = {}  # what a red line says → the check that said it first
    for arm, make in subjects.items():
        subject = make()
        for look in looks:
            key = repr([look.name, *(subject.part(name) for name in look.reads)])
            if key in done or (found := outcome(look, subject)) is None:
                continue
            done.add(key)
            if found.colour == RED and (first := faults.setdefault(found.figure, look.name)) != look.name:
                found = Found(UNCHECKED, f"for the same reason as {first!r}")
            yield Check(arm if len(subjects) > 1 else "", look.section, look.name, *found)


def outcome(look: Look, subject: Any) -> Found | None:
    """What the check found; an error is red, with the line of the user's own code that it came through."""
    try:
        return look.function(subject)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [one for one in frames if not one.filename.startswith(NOT_THE_USERS) and "site-packages" not in one.filename]
        place = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else ""
        return Found(RED, f"{type(error).__name__}: {error}", place)


def shown(checks: Iterable[Check], console: Console) -> list[Check]:
    """The checks, each printed as it comes, and their counts: words beside colours, for terminals of any width."""
    found: list[Check] = []
    for check in checks:
        if not found or (found[-1].arm, found[-1].section) != (check.arm, check.section):
            console.print(Text(": ".join(filter(None, (check.arm, check.section))), style="bold"))
        row = Table.grid(padding=(0, 1))
        for width in (11, 17, None):
            row.add_column(width=width, ratio=None if width else 1)
        said = Text(check.figure)
        if check.advice:
            said.append(f"\n-> {check.advice}", style=STYLE[check.colour])
        row.add_row(Text(f" {check.colour}", style=STYLE[check.colour]), Text(check.name), said)
        console.print(row)
        found.append(check)
    counts = [f"{n} {colour}" for colour in STYLE if (n := sum(one.colour == colour for one in found))]
    console.print(Text(", ".join(counts)))
    return found
