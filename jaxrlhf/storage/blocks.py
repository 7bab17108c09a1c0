"""Finished blocks of a pass over a table: what a pass has computed is kept on disk as it goes, and the next attempt goes on behind it.

    .stages/.blocks/HASH/PASS/00000000-00000032.npz      results of batches 0 to 31, behind the sha256 of the rest of the file

`HASH` names all that the stage depends on, `PASS` one of its passes and the rows that it reads. They go when the stage is finished.
"""

import hashlib
import io
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from jaxrlhf import distributed
from jaxrlhf.distributed.stops import Looks, Stopped
from jaxrlhf.files import write_whole
from jaxrlhf.types import Progress

APART = 60.0  # seconds of work after which a block is stored
Results = tuple[np.ndarray, ...]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a pass are kept, by the leader; None: nowhere."""

    folder: Path | None = None

    def of(self, name: str, *inputs: np.ndarray | Sequence[str]) -> "Blocks":
        """Those of the pass `name`, one of several, over these inputs."""
        if self.folder is None:
            return self
        digest = hashlib.sha256()
        for one in inputs:
            digest.update(np.ascontiguousarray(one).data if isinstance(one, np.ndarray) else json.dumps(one).encode())
        return Blocks(self.folder / f"{re.sub('[^a-zA-Z0-9]+', '-', name)}-{digest.hexdigest()[:20]}")

    def remove(self) -> None:
        """Called where the result is stored whole."""
        if self.folder is not None and distributed.is_leader():
            shutil.rmtree(self.folder, ignore_errors=True)

    def collect(self, total: int, compute: Callable[[int], Iterator[Results]], *, progress: Progress | None = None) -> Results:
        """The results of the batches 0 … `total` − 1 ≥ 0 of a pass, array by array in one; all processes call it.

        `compute(n)` yields those of batch n, n + 1, …: the same bits wherever it begins. They are stored every minute, at the end, and
        where the run is told to stop: then Stopped is raised behind the batch in work. A damaged block is computed again.
        """
        stored, parts, at = self._stored(), [], 0
        if progress:
            progress(0, total)
        with Looks() as looks:
            while at < total:
                if at in stored:
                    at, results = stored[at]
                    parts.append(results)
                    if progress:
                        progress(at, total)
                    continue
                until, first, waiting = min((start for start in stored if start > at), default=total), at, []
                begun = time.monotonic()
                for results in islice(compute(at), until - at):
                    waiting.append(results)
                    at += 1
                    stop = None if self.folder is None else looks.at(at).stop
                    if progress:
                        progress(at, total)
                    if stop is not None or at == until or time.monotonic() - begun >= APART:
                        parts.append(_joined(waiting))
                        self._store(first, at, parts[-1])
                        first, waiting, begun = at, [], time.monotonic()
                    if stop is not None:
                        raise Stopped(stop, f"batch {at} of {total} of a pass is stored")
        return _joined(parts)

    def _store(self, first: int, stop: int, results: Results) -> None:
        if self.folder is None or not distributed.is_leader():
            return
        file = io.BytesIO()
        np.savez(file, *results)
        write_whole(self.folder / f"{first:08d}-{stop:08d}.npz", hashlib.sha256(file.getvalue()).digest() + file.getvalue())

    def _stored(self) -> dict[int, tuple[int, Results]]:
        """First batch → (batch behind the last one, results) of every block."""
        if self.folder is None:
            return {}
        found, leads = {}, distributed.is_leader()
        for path in sorted(self.folder.glob("*.npz")) if leads else ():
            content = path.read_bytes()
            if hashlib.sha256(content[32:]).digest() != content[:32]:
                _log.warning("%s is damaged; it is computed again.", path)
                path.unlink()
                continue
            with np.load(io.BytesIO(content[32:]), allow_pickle=False) as arrays:
                found[int(path.stem[:8])] = int(path.stem[9:]), tuple(arrays[name] for name in arrays.files)
        for first, stop in distributed.agree([(first, stop) for first, (stop, _) in found.items()], "the blocks of a pass"):
            told = {str(n): array for n, array in enumerate(found[first][1])} if leads else None
            found[first] = stop, tuple(distributed.agree_on_columns(told, "a block").values())
        return found


NOWHERE = Blocks()


def _joined(parts: Sequence[Results]) -> Results:
    return tuple(np.concatenate(side) for side in zip(*parts, strict=True))
