"""Show the progress of a command that is not a run."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.types import Progress


@contextmanager
def shown(what: str, first: str = "compiling") -> Iterator[Progress]:
    """A progress bar on standard error with the time left; nothing is kept."""
    with tempfile.TemporaryDirectory() as scratch, RunLog(scratch) as log:
        yield log.progress(what, first=first)
