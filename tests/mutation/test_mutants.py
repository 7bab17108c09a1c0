"""The tool of `make mutants` on a module of a few lines: which changes it makes, and what a test run in a fork says of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray", reason="pip install -e '.[mutants]'")
sys.path.insert(0, str(Path(__file__).parent))

from mutants import mutants_of
from run import Equivalent

SOURCE = '''"""A module of 3 lines."""

def share(part: "int | 4", whole, *, scale=2) -> "float < 3":
    if part < 0:
        raise ValueError(f"{part} < {0}")
    return dict(value=pow(part, 0) / whole, **{"σ": scale})
'''


def made(*operators, seed=0):
    return list(mutants_of("share.py", SOURCE, operators, seed))


def test_one_change_each_and_none_in_strings_annotations_and_signatures():
    division, *none = made("ReplaceBinaryOperator_Div_Mul", "ReplaceBinaryOperator_Mul_Div", "ReplaceBinaryOperator_BitOr_BitAnd")
    assert division.becomes == 'return dict(value=pow(part, 0) * whole, **{"σ": scale})' and division.line == 6 and not none
    assert [mutant.becomes for mutant in made("ReplaceComparisonOperator_Lt_LtE")] == ["if part <= 0:"]
    assert {(mutant.line, mutant.becomes.replace(" ", "")) for mutant in made("NumberReplacer") if mutant.line == 4} == {
        (4, "ifpart<1:"), (4, "ifpart<-1:"),
    }  # fmt: skip
    assert sorted(mutant.line for mutant in made("NumberReplacer")) == [3, 3, 4, 4, 6, 6]
    assert not made("AddNot")  # of a comparison: that is another comparison
    assert len(made("ReplaceBinaryOperator_Div_Mul", "ReplaceBinaryOperator_Div_Mul")) == 1


def test_arguments_and_entries():
    last = SOURCE.splitlines()[-1].strip()
    dropped = [mutant.becomes for mutant in made("DropArgument")]
    assert [text.replace(" ", "") for text in dropped] == ['returndict(**{"σ":scale})', "returndict(value=pow(part,0)/whole)"]
    assert [mutant.becomes for mutant in made("SwapArguments")] == [last.replace("part, 0", " 0,part")]
    assert [mutant.becomes for mutant in made("DropEntry")] == [last.replace('"σ": scale', "")]
    assert not list(mutants_of("most.py", "most = jnp.maximum(a, max(b, c))", ["SwapArguments"], 0))  # the same in either order
    assert all(compile(mutant.source, "share.py", "exec") for mutant in made("DropArgument", "SwapArguments", "DropEntry"))


def test_the_draw_stays_while_its_lines_do_and_the_id_does_not():
    names = ("NumberReplacer", "DropArgument")
    moved = list(mutants_of("share.py", "import os\n" + SOURCE, names, 0))
    assert [m.draw for m in moved] == [m.draw for m in made(*names)] and len({m.draw for m in moved}) == len(moved)
    assert not {m.id for m in moved} & {m.id for m in made(*names)}
    assert [m.draw for m in made(*names, seed=1)] != [m.draw for m in made(*names)]


def test_a_kind_of_equivalents_is_told_by_what_alone_differs():
    known = Equivalent({}, {r"strict=\s*\w+": "equal lengths"})
    source = "both = zip(a, b, strict=True)"
    dropped, loosened, swapped = mutants_of("both.py", source, ["DropArgument", "ReplaceTrueWithFalse", "SwapArguments"], 0)
    assert [known.reason(mutant) for mutant in (dropped, loosened, swapped)] == ["equal lengths", "equal lengths", None]
    single = Equivalent({("both.py", source, swapped.becomes): "sets"}, {})
    assert [single.reason(mutant) for mutant in (dropped, swapped)] == [None, "sets"]


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
import jax, pytest
from forks import Job, copy_of, run_all
root, work = Path({root!r}), Path({work!r})
tree = copy_of(root, work / "tree")
jobs = [Job(name, "share.py", source, ("tests/test_share.py",), 60.0 if name != "endless" else 1.0) for name, source in {sources!r}]
for outcome in run_all(iter(jobs), [tree]):
    print(outcome.job.id, outcome.passed, outcome.killer, sep="|")
print((tree / "jaxrlhf" / "share.py").read_text() == (root / "jaxrlhf" / "share.py").read_text())
"""


def test_runs_in_forks_on_a_copy(tmp_path):
    """A survivor, one killed by a test, one that cannot be imported, one that never ends; the tree is as it was."""
    root = tmp_path / "root"
    for folder in ("jaxrlhf", "tests"):
        (root / folder).mkdir(parents=True)
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (root / "jaxrlhf" / "__init__.py").touch()
    (root / "jaxrlhf" / "share.py").write_text("def half(x):\n    return x / 2\n")
    (root / "tests" / "test_share.py").write_text("from jaxrlhf.share import half\n\ndef test_half():\n    assert half(4) == 2\n")
    sources = [
        ("same", "half = lambda x: x * 0.5"),
        ("other", "half = lambda x: x"),
        ("none", "def half("),
        ("endless", "import time; time.sleep(60)"),
    ]
    program = PROGRAM.format(here=str(Path(__file__).parent), root=str(root), work=str(tmp_path / "work"), sources=sources)
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    said = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout.split("\n")
    assert said[:5] == ["same|True|", "other|False|a test", "none|False|a test", "endless|False|the time limit", "True"]
