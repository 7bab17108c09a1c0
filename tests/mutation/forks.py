"""Test runs in forks of a process that has imported what the package imports: a mutant costs its tests, not the seconds before them."""

import contextlib
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import hypothesis

COPIED = ("jaxrlhf", "tests", "configs", "benchmarks", "docs", "README.md", "Makefile", "pyproject.toml")
IMPORT_ALL = """
import importlib, pkgutil, sys, pytest, scipy.stats, scipy.special, hypothesis.extra.numpy
import jaxrlhf
for found in pkgutil.walk_packages(jaxrlhf.__path__, "jaxrlhf."):
    importlib.import_module(found.name)
print(*(name for name in sys.modules if name.split(".")[0] not in ("jaxrlhf", "__main__")))
"""


class Job(NamedTuple):
    """A test run: what `file` holds instead (None: the tree as it is), which tests, and for how many seconds."""

    id: str
    file: str | None
    source: str | None
    tests: tuple[str, ...]
    timeout: float


class Outcome(NamedTuple):
    """`passed`, or what killed it: "a test", "the time limit" or "the signal N"."""

    job: Job
    passed: bool
    killer: str
    seconds: float
    output: str


def warm_up(tree: Path, cache: Path) -> None:
    """Import here all that the package imports, and nothing of the package itself. The compilation cache is keyed by the whole program:
    what a mutant does not change is read from it, what it changes is compiled. Mutants never write to it."""
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1",
        "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    names = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=tree, check=True, capture_output=True, text=True).stdout.split()
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:  # a submodule that only its package makes
            continue
    # The same examples for every mutant, and none too slow: a busy machine kills nothing.
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, deadline=None)
    hypothesis.settings.load_profile("mutants")


def copy_of(root: Path, tree: Path) -> Path:
    """A fresh copy of the tree at `root`, which itself is never changed."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("runs"))
        elif (root / name).exists():
            shutil.copy2(root / name, tree / name)
    return tree


def run_all(jobs: Iterator[Job], trees: list[Path], *, first: bool = False) -> Iterator[Outcome]:
    """The outcomes of jobs as they end, as many at once as there are trees. `first`: of an unchanged tree, which keeps what it compiles."""
    free, running = list(trees), {}
    try:
        while True:
            while free and (job := next(jobs, None)) is not None:
                tree = free.pop()
                running[_start(job, tree, first)] = (job, tree, time.monotonic())
            if not running:
                return
            time.sleep(0.05)
            for pid, (job, tree, since) in list(running.items()):
                seconds = time.monotonic() - since
                ended, status = os.waitpid(pid, os.WNOHANG)
                late = not ended and seconds > job.timeout
                if ended or late:
                    _end(pid, reap=late)
                    del running[pid]
                    free.append(tree)
                    yield _outcome(job, tree, None if late else status, seconds)
    finally:
        for pid in running:
            _end(pid, reap=True)


def _outcome(job: Job, tree: Path, status: int | None, seconds: float) -> Outcome:
    output = (tree / "output.txt").read_text(errors="replace")
    if job.file is not None:
        shutil.copy2(tree / "kept.py", tree / "jaxrlhf" / job.file)
    if status is None:
        return Outcome(job, False, "the time limit", seconds, output)
    code = os.waitstatus_to_exitcode(status)
    if code in (0, 1, 2) or code < 0:  # 2: the tests could not be imported
        killer = f"the signal {-code}" if code < 0 else "a test" if code else ""
        return Outcome(job, code == 0, killer, seconds, output)
    raise RuntimeError(f"pytest ended with {code} on {' '.join(job.tests)}:\n{output}")


def _start(job: Job, tree: Path, first: bool) -> int:
    if job.file is not None and job.source is not None:
        file = tree / "jaxrlhf" / job.file
        shutil.copy2(file, tree / "kept.py")
        file.write_text(job.source)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 3
        os.setsid()  # first of all: what ends a process ends its session
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            code = _child(job, tree, first)
        finally:
            os._exit(code)
    return pid


def _child(job: Job, tree: Path, first: bool) -> int:
    import jax
    import pytest

    os.chdir(tree)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(stream, "wb", 0), write_through=True) for stream in (1, 2))
    sys.path.insert(0, str(tree))
    at_least = 0.0 if first else 1e9
    sys.dont_write_bytecode = not first  # a mutant's is older than the file that comes after it, by less than a second
    os.environ |= {"PYTHONPATH": str(tree), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(at_least)}
    os.environ |= {} if first else {"PYTHONDONTWRITEBYTECODE": "1"}
    jax.config.update("jax_persistent_cache_min_compile_time_secs", at_least)
    return int(pytest.main(["-x", "--tb=line", "-p", "no:cacheprovider", "-p", "no:warnings", f"--rootdir={tree}", *job.tests]))


def _end(pid: int, *, reap: bool) -> None:
    """End the process and all it started, which share its session."""
    for end in (os.killpg, os.kill) if reap else (os.killpg,):
        with contextlib.suppress(ProcessLookupError):
            end(pid, signal.SIGKILL)
    if reap:
        os.waitpid(pid, 0)
