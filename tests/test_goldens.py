"""Every stored golden is what its script makes today.

The convention: `tests/golden/make_*.py` runs as a script in an environment with torch and writes its JSON files beside itself. Floats may
differ by rounding, everything else is equal; `made_with` (versions) is not compared.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
SCRIPTS = sorted(path.name for path in GOLDEN.glob("make_*.py"))


def differences(stored, made, path=""):
    """Where two JSON values differ, as lines of text."""
    if type(stored) is not type(made):
        return [f"{path}: {stored!r} became {made!r}"]
    if isinstance(stored, dict):
        keys = [f"{path}: keys {sorted(stored.keys() ^ made.keys())}"] if stored.keys() != made.keys() else []
        return keys + [
            line for key in stored.keys() & made.keys() - {"made_with"} for line in differences(stored[key], made[key], f"{path}/{key}")
        ]
    if isinstance(stored, list):
        if len(stored) != len(made):
            return [f"{path}: {len(stored)} items became {len(made)}"]
        return [line for n, pair in enumerate(zip(stored, made, strict=True)) for line in differences(*pair, f"{path}/{n}")]
    same = math.isclose(stored, made, rel_tol=1e-5, abs_tol=1e-5) if isinstance(stored, float) else stored == made
    return [] if same or (stored != stored and made != made) else [f"{path}: {stored!r} became {made!r}"]


@pytest.mark.parity
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_makes_the_golden(script, tmp_path):
    pytest.importorskip("torch")
    copy = tmp_path / "golden"
    shutil.copytree(GOLDEN, copy, ignore=shutil.ignore_patterns("*.json", "__pycache__"))
    ran = subprocess.run([sys.executable, copy / script], cwd=copy, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    made = sorted(copy.glob("*.json"))
    assert made, f"{script} wrote no JSON beside itself"
    for path in made:
        found = differences(json.loads((GOLDEN / path.name).read_text()), json.loads(path.read_text()))
        assert not found, f"{path.name}: {len(found)} differences, the first {found[:5]}"


def test_every_golden_has_its_script_and_differences_are_seen():
    assert {path.stem for path in GOLDEN.glob("*.json")} == {name.removeprefix("make_").removesuffix(".py") for name in SCRIPTS}
    stored = {"made_with": 1, "x": [1.0, 2, True, float("nan")], "s": "a"}
    assert differences(stored, {"made_with": 2, "x": [1.000001, 2, True, float("nan")], "s": "a"}) == []
    for made in (
        {"x": stored["x"], "s": "a"},
        stored | {"x": [1.001, 2, True, 0.0]},
        stored | {"x": [1.0]},
        stored | {"s": "b"},
        stored | {"s": 1},
    ):
        assert differences(stored, made)
