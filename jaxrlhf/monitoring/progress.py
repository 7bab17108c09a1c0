"""Show the progress of a command that is not a run."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.types import Progress


@contextmanager
def shown(what: str) -> Iterator[Progress]:
    """A progress bar on standard error with the time left; nothing is kept."""
    with tempfile.TemporaryDirectory() as scratch, RunLog(scratch) as log:
        stage = None

        def report(done: int, total: int) -> None:
            nonlocal stage
            if stage is None:
                stage = log.stage(what, total_steps=total)
                stage.phase("compiling")
            if done:
                stage.step(done, {})
            if done == total:
                stage.close()

        yield report
