"""How values become text: cells and tables of Markdown, durations, and the numbers that JSON lacks."""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_NOT_IN_JSON = ("NaN", "Infinity", "-Infinity")


def escape_markdown(text: str) -> str:
    """Text of unknown origin for one cell of a Markdown table: no markup, link, HTML or line break of its own survives.

    Line breaks show as ⏎, other control and direction-changing characters as their code; a space at either end stays one.
    """
    text = re.sub(r"\r\n|[\r\n\v\f\x85\u2028\u2029]", "⏎", text).replace("\t", " ")
    text = "".join(f"U+{ord(c):04X}" if unicodedata.category(c) in ("Cc", "Cs") or c in _BIDI else c for c in text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]()#!|~$@^])", r"\\\1", text)
    return text.strip(" ") or "(empty)"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], first: str = "---", others: str = "---") -> str:
    """A table of cells that are Markdown already. `first` and `others` align the columns: `---:` is right."""
    rule = [first, *[others] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def too_narrow(left_out: Sequence[str], where: str) -> str:
    """What a table leaves out, whose names may hold commas, and where it stands."""
    return f"This screen is too narrow for {' '.join('; '.join(left_out).split())}. {where} has all."


def format_duration(seconds: float) -> str:
    """40 s, 12 min, 3.5 h."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def as_strict_json(value: Any) -> Any:
    """`value` as JSON has it, the numbers it lacks as the strings "NaN", "Infinity" and "-Infinity", which `float` reads."""
    return json.loads(json.dumps(value), parse_constant=str)


def with_numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    """An object of such JSON with its numbers again: json.loads(text, object_hook=with_numbers)."""
    return {name: float(value) if value in _NOT_IN_JSON else value for name, value in found.items()}
