"""Write to a terminal, a pipe or a file that may go away or lack characters: what is shown never decides about a result."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


class Shown:
    """A stream that drops what it cannot write, and keeps the first reason why in `lost`. `stream` None: there is no terminal."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream
        self.lost: Exception | None = None

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Each at once, and until the stream is lost: lines may take long to make, and nobody waits for the rest."""
        for line in lines:
            self.write(line)
            self.flush()
            if self.lost is not None:
                break

    def flush(self) -> None:
        self._try("flush")

    def _try(self, what: str, *text: str) -> None:
        if self._stream is None or self.lost is not None:
            return
        try:
            getattr(self._stream, what)(*text)
        except (OSError, ValueError) as error:  # ValueError: closed, or characters that it lacks
            self.lost = error
            with suppress(OSError, ValueError):  # what it still holds would fail again when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def shown_output() -> Iterator[Shown]:
    """Both streams as such, with "?" or an escape for a character that an encoding lacks; standard output, to ask what was lost of it."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        with suppress(AttributeError, OSError, ValueError):  # not every stream that Python code puts there can
            stream.reconfigure(errors=errors)  # type: ignore[union-attr]
    out: Any = Shown(sys.stdout)
    err: Any = Shown(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield out
        finally:
            out.flush()
            err.flush()
