"""The rules of docs/architecture.md, read from the source with `ast`."""

import ast
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxrlhf"
# From the ground up: a room may import the rooms of the floors below it. What shares a line stands side by side: neither imports the other.
FLOORS = (
    ("types", "rng", "plugins", "files", "formatting"),
    ("config",),
    ("recipe",),
    ("distributed", "monitoring", "sharding"),
    ("storage",),
    ("data", "losses"),
    ("steps",),
    ("models",),
    ("rollouts",),
    ("scorers",),
    ("offline",),
    ("evaluation",),
    ("algorithms",),
    ("pipeline", "report"),
    ("sweep", "plan", "comparison"),
    ("preflight",),
    ("commands",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(FLOORS) for name in names}
# Narrower than the floors.
ONLY = {
    "types": set(),
    "rng": set(),
    "files": set(),
    "formatting": set(),
    "losses": {"types"},
    "steps": {"types", "losses"},
    "report": {"evaluation", "files", "formatting"},
}
PIPELINE = (("inputs",), ("stages",), ("checks", "summary", "table"), ("loop",), ("foresight",), ("run",))
MOST_FILES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 14, 300, 60
COLLECTIVES = {"psum", "pmean", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "psum_scatter", "axis_index"}
BANNED = {"utils", "util", "common", "base", "core", "helpers", "helper", "manager", "misc"}
FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def room(path: Path) -> str:
    """ "losses/kl.py" → "losses"; the package's own __init__ is the door, and may see everything."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


@cache
def imports(path: Path) -> frozenset[str]:
    """Every absolute module (and module.name) that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the module's full name."
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def imported_files(path: Path) -> set[Path]:
    """The files of the package that a file imports; a folder's __init__ for what is imported through it."""
    found = set()
    for name in imports(path):
        if not name.startswith("jaxrlhf."):
            continue
        parts = name.split(".")[1:]
        for length in (len(parts), len(parts) - 1):
            place = PACKAGE.joinpath(*parts[:length])
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            if length and file.exists():
                found.add(file)
                break
    return found - {path}


def folder_arrows() -> dict[str, set[str]]:
    """Folder (or file of the root) → those it imports, at every depth: siblings alone, for a folder contains what is in it."""
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        for other in imported_files(path):
            here, there = (one.relative_to(PACKAGE).with_suffix("").parts for one in (path, other))
            shared = next((n for n, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), None)
            if shared is not None and "__init__" not in (here[shared], there[shared]):
                arrows.setdefault("/".join(here[: shared + 1]), set()).add("/".join(there[: shared + 1]))
    return arrows


def circle(arrows: dict) -> list | None:
    """A circle of a graph, if it has one."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        found = next((c for c in map(visit, sorted(arrows.get(node, ()))) if c), None)
        path.pop()
        done.add(node)
        return found

    return next((c for c in map(visit, sorted(arrows)) if c), None)


def dotted(path: Path) -> set[str]:
    """Every attribute chain like jax.lax.psum in a file."""
    return {ast.unparse(node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here, names = room(path), imports(path)
    ours = {name.split(".")[1] for name in names if name.startswith("jaxrlhf.")} - {here}
    outside = {name.split(".")[0] for name in names}
    if here:
        assert here in RANK, f"jaxrlhf/{here} has no floor; give it one in docs/architecture.md and here."
        assert {other for other in ours if RANK[other] >= RANK[here]} == set()
        assert ours <= ONLY.get(here, ours)
    assert "flax" not in outside or here == "models"
    uses_sharding = any(name.startswith("jax.sharding") for name in names | dotted(path))
    assert not uses_sharding or here == "sharding"
    assert not outside & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "torch"} or path.name == "encoders.py"
    if here == "report":
        assert not outside & {"jax", "flax", "transformers", "datasets"}


def test_the_pipeline_points_down_too():
    rank = {name: n for n, names in enumerate(PIPELINE) for name in names}
    for path in (PACKAGE / "pipeline").rglob("*.py"):
        here = path.relative_to(PACKAGE / "pipeline").parts[0].removesuffix(".py")
        for name in imports(path):
            there = [*name.split("."), "", ""][2] if name.startswith("jaxrlhf.pipeline.") else here
            if "__init__" not in (here, there) and there != here:
                assert rank[there] < rank[here], f"{path}: {name}"


def test_no_circles():
    files = {str(path.relative_to(PACKAGE)): {str(other.relative_to(PACKAGE)) for other in imported_files(path)} for path in FILES}
    assert circle(files) is None
    assert circle(folder_arrows()) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_sizes():
    folders = Counter(path.parent for path in FILES)
    assert {str(folder.relative_to(PACKAGE)): n for folder, n in folders.items() if n > MOST_FILES} == {}
    assert {str(path.relative_to(PACKAGE)): n for path in FILES if (n := len(path.read_text().splitlines())) > MOST_LINES} == {}
    functions = [
        (f"{path.relative_to(PACKAGE)}:{node.name}", node.end_lineno - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1)
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert {name: lines for name, lines in functions if lines > MOST_LINES_OF_A_FUNCTION} == {}


def test_distributed_imports_no_jax():
    import subprocess

    code = "import sys, jaxrlhf.distributed; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", sorted((PACKAGE / "commands").glob("*.py")), ids=lambda path: path.name)
def test_a_command_parses_and_prints(path):
    """Two functions that the command line calls; no JAX of its own but for how many devices there are."""
    if path.name in ("__init__.py", "usage.py", "recipe_arguments.py"):
        return
    defined = {node.name for node in tree_of(path).body if isinstance(node, ast.FunctionDef)}
    assert {"add_arguments", "main"} <= defined
    used = {name.split("(")[0] for name in dotted(path) if name.startswith("jax.")}
    assert used <= {"jax.device_count", "jax.devices", "jax.config", "jax.config.update"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_and_words(path):
    assert not {part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts} & BANNED
    assert ast.get_docstring(tree_of(path)) or not path.read_text().strip(), f"{path} does not say what it is for"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{path}:{node.value.lineno}: runs foreign code."
    if str(path.relative_to(PACKAGE)) not in ("losses/masked.py", "steps/accumulate.py"):
        used = {
            name for name in dotted(path) | imports(path) if name.startswith(("jax.lax.", "lax.")) and name.split(".")[-1] in COLLECTIVES
        }
        assert not used, f"{path}: collectives belong in losses/masked.py and steps/accumulate.py"


def test_the_rules_see_what_they_forbid(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from jax.sharding import Mesh\n    import flax.linen as nn\n    return jax.lax.psum(1, 'data')\n")
    assert imports(bad) == {"jax.sharding.Mesh", "flax.linen"}
    assert "jax.lax.psum" in dotted(bad)


def test_the_core_imports_without_torch():
    """pyproject's core has no torch; only the optional extras bring it."""
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    core = text.split("dependencies = [")[1].split("]\n")[0]
    assert "torch" not in core and "sentence-transformers" not in core and "orbax-checkpoint" in core


PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_page_draws_these_floors():
    picture = PAGE.split("## The floors")[1].split("```")[1]
    drawn = [[word for word in line.split() if word in RANK] for line in picture.splitlines() if line.strip()]
    assert [set(floor) for floor in reversed(drawn)] == [set(floor) for floor in FLOORS]


def test_the_page_lists_every_room_and_names_what_is_there():
    tree = PAGE.split("## The tree")[1].split("```")[1]
    rooms = {room(path) for path in FILES} - {""}
    assert {word.rstrip("/").removesuffix(".py") for word in re.findall(r"(?:^|  )([a-z]+(?:/|\.py))", tree, re.MULTILINE)} == rooms
    named = set(re.findall(r"`([a-z_/]+(?:\.py|/))`", PAGE)) - {"tests/test_architecture.py"}
    assert len(named) > 40 and {name for name in named if not (PACKAGE / name).exists() and not (PACKAGE.parent / name).exists()} == set()


def test_the_walks_name_functions_of_these_files():
    rows = re.findall(r"^\| \d+ \|.*\| `([a-z_/]+\.py)` \| `(\w+)` \|$", PAGE, re.MULTILINE)
    rows += [(file, name) for name, file in re.findall(r"`(\w+)` in\s+`([a-z_/]+\.py)`", PAGE)]
    rows += re.findall(r"`([a-z_/]+\.py)`, `(\w+)`", PAGE) + re.findall(r"`([a-z_/]+\.py)` \(`(\w+)[.`]", PAGE)
    assert len(rows) >= 30
    for file, name in rows:
        defined = {getattr(node, "name", None) or ast.unparse(getattr(node, "target", node)) for node in tree_of(PACKAGE / file).body}
        assert name in defined, f"docs/architecture.md: {file} has no {name}"
