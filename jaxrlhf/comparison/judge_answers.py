"""What a judge has said, on disk: one JSON object a line, appended and synced, so that a killed evaluation loses nothing it was told."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


class AnswerError(RuntimeError):
    """A file of answers that cannot be read or is in use; the message says which line and what to do."""


class AnswerFile:
    """The answers in one file by their `key`; a context manager that holds the file for this process alone.

    `found` are the answers. `failed` are the lines, any number of one key, that tell what a question took which got no answer in the end
    (a field `failed` says why): they are there for the account and to be read, and the question is asked again.

    A last line that a kill tore is cut off (it is asked again), or given the line end it lacks where it is whole. Any other damage raises
    AnswerError: a line in the middle that is no JSON, or two answers to one question.
    """

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        self.failed: list[dict[str, Any]] = []

    def __enter__(self) -> AnswerFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise AnswerError(f"{self.path} is being written by another process; wait for it, or give another output folder.") from None
        except OSError:  # a filesystem without locks
            pass
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        whole, _, torn = self._file.read().rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            if line.strip():
                self._take(line, number)
        if not torn:
            return
        try:
            self._take(torn, whole.count(b"\n") + 2)
            self._append(b"\n")
        except AnswerError:
            os.ftruncate(self._file.fileno(), len(whole) + 1 if whole else 0)
            os.fsync(self._file.fileno())

    def _take(self, line: bytes, number: int) -> None:
        try:
            answer = json.loads(line)
            key = answer["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise AnswerError(
                f"{self.path}:{number} is no stored answer ({error}); delete that line, and the question is asked again."
            ) from error
        if "failed" in answer:
            self.failed.append(answer)
            return
        if key in self.found:
            raise AnswerError(f"{self.path}:{number} answers a question a second time (key {key}); delete one of the two lines.")
        self.found[key] = answer

    def add(self, answer: dict[str, Any]) -> None:
        """Store one answer, or the account of a failure; when this returns, it is on the disk."""
        line = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        if "failed" in answer:
            self.failed.append(answer)
        else:
            self.found[answer["key"]] = answer
        self._append(line)

    def _append(self, data: bytes) -> None:
        while data:  # a write may be short
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())
