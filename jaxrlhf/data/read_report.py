"""What a reader or the tokenizer stage kept, dropped and changed: nothing leaves a data set without a name here."""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from jaxrlhf.files import write_lines


class DataError(ValueError):
    """Data that cannot be used as it is; the message names the row, the rule and the way out."""


@dataclass
class ReadReport:
    """The account of one pass over a data set.

    kept: number of rows that came through.
    dropped: (source, reason) of every row that did not; a reason reads "category: detail".
    counts: things that were changed or noticed without dropping a row ("prompts truncated", "duplicate ids renamed", …).
    rows: positions, in the input, of the kept rows (tokenisation only): `[pairs[i].id for i in report.rows]` are the ids of a table.
    """

    kept: int = 0
    dropped: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    rows: list[int] = field(default_factory=list)

    def reasons(self) -> Counter[str]:
        """Number of dropped rows by category."""
        return Counter(reason.split(":")[0] for _, reason in self.dropped)

    def summary(self, limit: int = 5, *, rest: str = "the reasons count them, and mending these names the next") -> str:
        """A few lines for the screen: counts by reason, and the first `limit` dropped rows by name; `rest` says where the others are."""
        head = f"rows: {self.kept} kept, {len(self.dropped)} dropped"
        if self.dropped:
            head += " (" + ", ".join(f"{n} {reason}" for reason, n in self.reasons().most_common()) + ")"
        lines = [head, *(f"  {name}: {n}" for name, n in sorted(self.counts.items()) if n)]
        lines += [f"  {source}: {reason}" for source, reason in self.dropped[:limit]]
        if len(self.dropped) > limit:
            lines.append(f"  … and {len(self.dropped) - limit} more; {rest}")
        return "\n".join(lines)

    def say(self, name: str = "") -> None:
        """The summary on standard error, after `name`, where a row was dropped."""
        if self.dropped:
            print(f"{name}{self.summary()}", file=sys.stderr)

    def write(self, path: str | Path) -> None:
        """Every dropped row as one JSON object a line, {"source", "reason"}; the file appears whole or not at all."""
        write_lines(path, (json.dumps({"source": source, "reason": reason}, ensure_ascii=False) + "\n" for source, reason in self.dropped))
