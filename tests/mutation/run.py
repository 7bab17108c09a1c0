"""`make mutants`: how many small changes of the code the tests see. Development, in README.md, is the manual.

    python tests/mutation/run.py [--only losses/kl.py …] [--jobs 2] [--report]

What is mutated, by which operators and with which tests stands in pyproject.toml, [tool.mutants]; what no test can see, and why, in
equivalent.toml. Results are kept in .cache/mutants/session.sqlite, a session of Cosmic Ray (`cr-html` shows it): a run that was killed goes
on where it was, a survivor is tried again when its tests have changed, a mutant of a changed file is a new one.
"""

import argparse
import fcntl
import hashlib
import re
import shutil
import signal
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult
from forks import Job, Outcome, copy_of, run_all, warm_up
from mutants import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".cache" / "mutants"
SHARE = 0.95  # of those that are not equivalent, killed


def chosen(config: dict, only: list[str]) -> list[Mutant]:
    """All mutants of the folders under `whole`, then of the others the `sample` that comes first in a seeded order, in that order: what
    an ended run has tried of them is a sample too."""

    def of(folders: list[str]) -> list[Mutant]:
        files = sorted(file for folder in folders for file in (ROOT / "jaxrlhf" / folder).rglob("*.py"))
        each = ((str(file.relative_to(ROOT / "jaxrlhf")), file.read_text()) for file in files)
        return [mutant for name, source in each for mutant in mutants_of(name, source, config["operators"], config["seed"])]

    sampled = sorted(of(config["sampled"]), key=lambda mutant: mutant.draw)[: config["sample"]]
    return [m for m in of(config["whole"]) + sampled if not only or any(m.module.startswith(name) for name in only)]


def tests_of(module: str, table: dict[str, list[str]]) -> tuple[str, ...]:
    """The longest name in the table that the module starts with."""
    return tuple(table[max((name for name in table if module.startswith(name)), key=len)])


@cache
def hash_of(tests: tuple[str, ...]) -> str:
    """Of the tests as they are when this starts, which are those that run."""
    files = sorted(file for name in tests for file in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("test_*.py")))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def results_of(session: WorkDB) -> dict[str, WorkResult]:
    return {item.job_id: result for item, result in session.completed_work_items}


class Equivalent(NamedTuple):
    """equivalent.toml: single mutants, and kinds of them by what alone differs."""

    single: dict[tuple[str, str, str], str]
    kinds: dict[str, str]

    @classmethod
    def read(cls) -> "Equivalent":
        listed = tomllib.loads((Path(__file__).parent / "equivalent.toml").read_text())
        single = {(one["module"], one["was"], text): one["why"] for one in listed["equivalent"] for text in one["becomes"]}
        return cls(single, {kind["pattern"]: kind["why"] for kind in listed["kind"]})

    def reason(self, mutant: Mutant) -> str | None:
        """Why no test can see it, where that is known."""
        for pattern, why in self.kinds.items():
            was, becomes = (re.sub(r"[\s,]", "", re.sub(pattern, "", text)) for text in (mutant.was, mutant.becomes))
            if was == becomes:
                return why
        return self.single.get((mutant.module, mutant.was, mutant.becomes))


def pending(mutants: list[Mutant], results: dict[str, WorkResult], table: dict, equivalent: Equivalent) -> list[Mutant]:
    """Those without a result, and survivors whose tests are others than then."""

    def settled(mutant: Mutant) -> bool:
        result = results.get(mutant.id)
        tests = hash_of(tests_of(mutant.module, table))
        return equivalent.reason(mutant) is not None or (result is not None and (result.is_killed or result.output.startswith(tests)))

    return [mutant for mutant in mutants if not settled(mutant)]


def run(mutants: list[Mutant], config: dict, session: WorkDB, equivalent: Equivalent, jobs: int) -> None:
    table = config["tests"]
    todo = pending(mutants, results_of(session), table, equivalent)
    if not todo:
        return
    known = {item.job_id for item in session.work_items}
    session.add_work_items(_item(mutant) for mutant in todo if mutant.id not in known)
    print(f"{len(todo)} of {len(mutants)} mutants to try; importing", flush=True)
    first = copy_of(ROOT, WORK / "tree0")
    warm_up(first, WORK / "jax")
    sets = sorted({tests_of(mutant.module, table) for mutant in todo})
    seconds = {}
    for outcome in run_all(iter([Job("", None, None, tests, 3600.0) for tests in sets]), [first], first=True):
        if not outcome.passed:
            sys.exit(f"without any mutant, {' '.join(outcome.job.tests)} fails by {outcome.killer}:\n{outcome.output}")
        seconds[outcome.job.tests] = outcome.seconds
        print(f"unchanged: {outcome.seconds:5.0f} s  {' '.join(outcome.job.tests)}", flush=True)
    trees = [first, *(Path(shutil.copytree(first, WORK / f"tree{n}", dirs_exist_ok=True)) for n in range(1, jobs))]
    by_id, started = {mutant.id: mutant for mutant in todo}, time.monotonic()
    waiting = (_job(mutant, tests_of(mutant.module, table), seconds) for mutant in todo)
    for done, outcome in enumerate(run_all(waiting, trees), start=1):
        mutant = by_id[outcome.job.id]
        session.set_result(mutant.id, _result(mutant, outcome))
        left = (time.monotonic() - started) / done * (len(todo) - done) / 60
        said = f"killed by {outcome.killer}" if not outcome.passed else "SURVIVED"
        print(f"{done:4d}/{len(todo)} {outcome.seconds:4.0f} s, {left:3.0f} min left  {said}: {mutant}", flush=True)


def _job(mutant: Mutant, tests: tuple[str, ...], seconds: dict) -> Job:
    return Job(mutant.id, mutant.module, mutant.source, tests, 3 * seconds[tests] + 60)


def _item(mutant: Mutant) -> WorkItem:
    place = ((mutant.line, 0), (mutant.line, 1))
    return WorkItem.single(mutant.id, MutationSpec(f"jaxrlhf/{mutant.module}", mutant.operator, 0, *place))


def _result(mutant: Mutant, outcome: Outcome) -> WorkResult:
    survived = TestOutcome.SURVIVED if outcome.passed else TestOutcome.KILLED
    output = f"{hash_of(outcome.job.tests)}\n{outcome.killer}\n{outcome.output[-2000:]}"
    return WorkResult(WorkerOutcome.NORMAL, output, survived, f"- {mutant.was}\n+ {mutant.becomes}")


def report(mutants: list[Mutant], results: dict[str, WorkResult], equivalent: Equivalent) -> Iterator[str]:
    """The table by folder, then what lives and why."""
    counts: dict[str, Counter] = {}
    alive, excused = [], []
    for mutant in sorted(mutants):
        result, why = results.get(mutant.id), equivalent.reason(mutant)
        state = "equivalent" if why else "not tried" if result is None else "killed" if result.is_killed else "survived"
        for name in (mutant.module.split("/")[0], "all"):
            counts.setdefault(name, Counter())[state] += 1
        if state == "survived":
            alive.append(f"    {mutant}")
        if why:
            excused.append(f"    {mutant}\n    because {why}")
    states = ("killed", "survived", "equivalent", "not tried")
    yield "| folder | mutants | " + " | ".join(states) + " | killed of what is not equivalent |"
    yield "|---" * 7 + "|"
    for name in sorted(counts, key=lambda name: (name == "all", name)):
        count = counts[name]
        tried = count["killed"] + count["survived"]
        share = f"{count['killed'] / tried:.1%}" if tried else ""
        yield f"| {name} | {count.total()} | " + " | ".join(str(count[state]) for state in states) + f" | {share} |"
    yield from ("", f"{len(alive)} survivors:", *alive, "", f"{len(excused)} equivalent:", *excused)
    used = {(mutant.module, mutant.was, mutant.becomes) for mutant in mutants}
    yield from (f"equivalent.toml names a mutant that is not one: {key}" for key in equivalent.single if key not in used)
    if not alive and not counts["all"]["not tried"]:
        yield "Every mutant was killed or is equivalent."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="files or folders below jaxrlhf/")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--report", action="store_true", help="say what is known and try nothing")
    given = parser.parse_args()
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutants"]
    equivalent = Equivalent.read()
    WORK.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends with it
    lock = (WORK / "lock").open("w")
    try:
        if not given.report:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"{WORK} is in use by another run of this; wait for it, or end it and start again: it goes on where it was.")
    session = WorkDB(WORK / "session.sqlite", WorkDB.Mode.create)
    mutants = chosen(config, given.only)
    if not given.report:
        run(mutants, config, session, equivalent, given.jobs)
    results = results_of(session)
    print(*report(mutants, results, equivalent), sep="\n")
    tried = [results[m.id].is_killed for m in mutants if m.id in results and equivalent.reason(m) is None]
    if not given.report and sum(tried) < SHARE * len(tried):
        sys.exit(f"{sum(tried)} of {len(tried)} mutants were killed, less than {SHARE:.0%}")


if __name__ == "__main__":
    main()
