"""Every file of a finished run and of its store damaged in five ways: the next run has the same bits, or one line names the file."""

import copy
import random
import shutil
from pathlib import Path

import pytest
import yaml
from attack import content, devices, differing, run_quietly
from tiny_run import TINY

from jaxrlhf.cli import main

DAMAGES = ("missing", "empty", "cut", "flipped", "garbage")


def damage(path: Path, how: str) -> None:
    was, random_of = path.read_bytes(), random.Random(path.name)
    match how:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(was[: len(was) // 2])
        case "flipped":
            at = random_of.randrange(len(was)) if was else 0
            path.write_bytes(was[:at] + bytes([was[at] ^ 16]) + was[at + 1 :] if was else b"\x10")
        case "garbage":
            path.write_bytes(random_of.randbytes(max(len(was), 16)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its output folder, the recipe, and all files of it that are no links."""
    base = tmp_path_factory.mktemp("finished")
    raw = copy.deepcopy(TINY) | {"output": str(base / "runs"), "rounds": 1, "method": "ocrm"}
    (base / "recipe.yaml").write_text(yaml.safe_dump(raw))
    with devices(1):
        run_quietly(raw)
    shutil.copytree(base / "runs", base / "kept", symlinks=True)
    return base


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_of_a_finished_run(finished, how, capsys, caplog):
    output, kept = finished / "runs", finished / "kept"
    expected, faults = content(kept / ".stages"), []
    files = [
        path.relative_to(kept) for path in sorted(kept.rglob("*")) if path.is_file() and not path.is_symlink() and not linked(path, kept)
    ]
    for name in files:
        shutil.rmtree(output)
        shutil.copytree(kept, output, symlinks=True)
        damage(output / name, how)
        caplog.clear()
        faults += [f"{how} {name}: {fault}" for fault in faults_of(output, finished / "recipe.yaml", name, expected, capsys, caplog)]
    assert len(files) > 30
    assert not faults, "\n".join(faults)


def linked(path: Path, root: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents if parent.is_relative_to(root))


def faults_of(output: Path, recipe: Path, name: Path, expected: dict, capsys, caplog) -> list[str]:
    try:
        with devices(1):
            status = main(["run", str(recipe)])
    except Exception as error:
        return [f"a traceback, {type(error).__name__}: {error}"]
    said = capsys.readouterr().err
    if status:
        line = next((line for line in said.splitlines() if line.startswith("jaxrlhf: ")), "")
        return [] if name.name in line or name.parent.name in line else [f"exit {status} and no line that names it: {said[-300:]!r}"]
    others = differing(content(output / ".stages"), expected)
    if others == [f"{name.parent.name}/metrics.jsonl"] and name.name == "metrics.jsonl":  # no result depends on it: a warning is enough
        named = f"{name.parent.name}/metrics.jsonl" in said + caplog.text
        return [] if named else ["a stage's metrics are damaged, and nothing says so"]
    if others == [str(name.relative_to(".stages"))] and name.parts[0] == ".stages":  # the run did not read it again: `verify` does
        found = main(["verify", str(output)])
        return [] if found == 1 and str(name) in capsys.readouterr().out else ["verify does not name it"]
    return [f"silently other content of {others}"] if others else []
