"""The import rules of docs/architecture.md, read from the source with `ast`."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxrlhf"
ORDER = (
    (
        "types",
        "rng",
        "plugins",
        "config",
        "recipe",
        "hlo_text",
        "hlo",
        "compilation",
        "cluster",
        "processes",
        "remote",
        "runlog",
        "checkpoint",
        "layout",
        "engines",
        "sharding",
    ),
    ("data",),
    ("losses",),
    ("steps",),
    ("models",),
    ("rollouts",),
    ("scorers",),
    ("offline",),
    ("evaluation",),
    ("algorithms",),
    ("run",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
ALLOWED = {"types": set(), "rng": set(), "losses": {"types", "losses"}, "steps": {"types", "losses", "steps"}}
COLLECTIVES = {"psum", "pmean", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "psum_scatter", "axis_index"}
BANNED = {"utils", "util", "common", "base", "core", "helpers", "helper", "manager", "misc"}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """ "losses/kl.py" → "losses"; the package's own __init__ is the door, and may see everything."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every absolute module (and module.name) that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the module's full name."
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(path: Path) -> set[str]:
    """Every attribute chain like jax.lax.psum in a file."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path):
    here, names = part(path), imports(path)
    ours = {name.split(".")[1] for name in names if name.startswith("jaxrlhf.")}
    outside = {name.split(".")[0] for name in names}
    if here:
        assert here in RANK, f"jaxrlhf/{here} has no place in the order; give it one in docs/architecture.md and here."
        assert {other for other in ours if RANK[other] > RANK[here]} == set()
        assert ours <= ALLOWED.get(here, ours)
        assert "cli" not in ours or here == "cli"
    if here == "data":
        assert "models" not in ours
    assert "flax" not in outside or here == "models"
    uses_sharding = any(name.startswith("jax.sharding") for name in names | dotted(path))
    assert not uses_sharding or here in ("layout", "engines", "sharding")
    assert not outside & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "torch"} or path.name == "embed.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_and_words(path):
    assert not {part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts} & BANNED
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
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
