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

    name: str
    function: Callable[[Any], Found | None]
    reads: tuple[str, ...]


Line = tuple[str, str, Found]  # (arm, check, what it found) of the screen


def run_looks(looks: Sequence[Look], subjects: Mapping[str, Callable[[], Any]]) -> Iterator[Line]:
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
            yield arm, look.name, found


def outcome(look: Look, subject: Any) -> Found | None:
    """What the check found; an error is red, with the line of the user's own code that it came through."""
    try:
        return look.function(subject)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [one for one in frames if not one.filename.startswith(NOT_THE_USERS) and "site-packages" not in one.filename]
        place = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else ""
        return Found(RED, f"{type(error).__name__}: {error}", place)


def shown(lines: Iterable[Line], console: Console) -> list[Found]:
    """Each line printed as it comes, under the name of its arm, and their counts: words beside colours, for terminals of any width."""
    all_found: list[Found] = []
    last = None
    for arm, name, found in lines:
        if arm != last:
            console.print(Text(arm, style="bold"))
        last = arm
        row = Table.grid(padding=(0, 1))
        row.add_column(width=12)
        row.add_column(width=17)
        row.add_column(ratio=1)
        said = Text(found.figure)
        if found.advice:
            said.append(f"\n-> {found.advice}", style=STYLE[found.colour])
        row.add_row(Text(f" {found.colour}", style=STYLE[found.colour]), Text(name), said)
        console.print(row)
        all_found.append(found)
    counts = [f"{n} {colour}" for colour in STYLE if (n := sum(one.colour == colour for one in all_found))]
    console.print(Text(", ".join(counts)))
    return all_found
