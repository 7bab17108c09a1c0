"""`make faults`: all tests in this folder have its mark, and one that has passed on this code is not run again: a killed run goes on."""

import hashlib
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PASSED = ROOT / ".cache" / "faults" / "passed.txt"
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # attack.py


def pytest_collection_modifyitems(items):
    known = set(PASSED.read_text().splitlines()) if PASSED.exists() else set()
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("faults")
            if line_of(item) in known:
                item.add_marker(pytest.mark.skip(reason=f"passed before on this code; {PASSED} lists it"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" and report.passed and item.path.is_relative_to(HERE):
        PASSED.parent.mkdir(parents=True, exist_ok=True)
        with PASSED.open("a") as file:
            file.write(line_of(item) + "\n")
    return report


def line_of(item: pytest.Item) -> str:
    return f"{code(item.path)} {item.nodeid}"


@cache
def code(test: Path) -> str:
    """A digest of the package, of this test's file and of what the tests share."""
    shared = [(ROOT / "jaxrlhf", "*.py"), (ROOT / "tests" / "golden", "*.py"), (HERE, "[!t]*.py")]
    files = [*(file for folder, names in shared for file in sorted(folder.rglob(names))), test]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
