"""One run by two processes of two devices each, over the loopback device: against one process with four, and killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
import yaml
from safetensors.numpy import load_file

from jaxrlhf.monitoring.metrics_file import read
from jaxrlhf.pipeline.run import run
from jaxrlhf.storage.record import read_record

# `jaxrlhf launch`, but process 1 dies of a real SIGKILL when the checkpoint of the second step is on its way.
KILLED = """
import sys
from jaxrlhf.distributed.launch import launch
member = '''
import os, signal, sys
from jaxrlhf.storage.checkpoint import Checkpoints
from jaxrlhf.cli import main
save = Checkpoints.save
def save_and_die(self, step, *given):
    save(self, step, *given)
    if step == 2 and os.environ["JAX_PROCESS_ID"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = save_and_die
sys.exit(main(sys.argv[1:]))
'''
sys.exit(launch([sys.executable, "-c", member, *sys.argv[1:]], 2, 2, grace=5))
"""
LAUNCH = ["-m", "jaxrlhf.cli", "launch", "--processes", "2", "--devices_per_process", "2"]
METHOD = {"rounds": 1, "ppo__total_episodes": 32}  # benchmarks/two_processes.py has OCRM, two rounds, and a kill in the middle of PPO


class Outcome(NamedTuple):
    status: int
    folder: Path
    out: str
    err: str


def together(recipe: dict[str, Any], command: str, how: list[str]) -> Outcome:
    """What comes of two processes that run `jaxrlhf COMMAND` on a recipe."""
    folder = Path(recipe["output"])
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"])}
    words = [sys.executable, *how, command, str(folder / "recipe.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=1800)
    return Outcome(done.returncode, folder / "tiny", done.stdout, done.stderr)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_mapping) -> Outcome:
    done = together(tiny_mapping(tmp_path_factory.mktemp("whole"), checkpoint={"every": 2}, **METHOD), "run", LAUNCH)
    assert done.status == 0, done.err
    return done


def figures(folder: Path) -> dict[tuple[str, int | None, int], dict[str, float]]:
    lines = read(folder / "metrics.jsonl")
    places = [(line["stage"], line["round"], line["step"]) for line in lines]
    assert len(set(places)) == len(places), "each step is logged once"
    of_results = [{name: x for name, x in line.items() if "/" in name and not name.startswith("time/")} for line in lines]
    return dict(zip(places, of_results, strict=True))


def test_two_processes_are_one_with_as_many_devices(tmp_path, whole, tiny_config):
    alone = run(tiny_config(tmp_path, **METHOD))
    assert "run folder:" in whole.out
    first, second = figures(alone), figures(whole.folder)
    assert first.keys() == second.keys() and len(first) == 7
    for place, line in first.items():
        assert second[place] == pytest.approx(line, rel=1e-4, abs=1e-4), place
    rounds = [json.loads((folder / "summary.json").read_text())["rounds"] for folder in (alone, whole.folder)]
    for one, two in zip(*rounds, strict=True):
        numbers = {name: x for name, x in one.items() if isinstance(x, int | float) and name != "seconds"}
        assert {name: two[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-4) and one.keys() == two.keys()
    # The same files, each once: nothing of the second process's scratch, of checkpoints, or of a stage that is not finished.
    left, right = (sorted(str(path.relative_to(folder)) for path in folder.glob("stages/*/*")) for folder in (alone, whole.folder))
    assert left == right and not any("checkpoint" in name for name in right)
    assert not list((whole.folder.parent / ".stages").glob(".partial-*"))


def test_a_process_is_killed_and_the_same_command_goes_on(tmp_path, whole, tiny_mapping):
    recipe = tiny_mapping(tmp_path, checkpoint={"every": 1}, **METHOD)
    killed = together(recipe, "sft", ["-c", KILLED])
    assert killed.status == 128 + signal.SIGKILL
    assert "process 1 of 2 (pid " in killed.err and "is gone: signal 9, SIGKILL" in killed.err
    assert "the run goes on from its last checkpoint" in killed.err.splitlines()[-1]
    assert not (killed.folder / "stages" / "01-sft").exists()
    resumed = together(recipe, "sft", LAUNCH)
    assert resumed.status == 0 and "goes on from step" in resumed.err
    stages = [outcome.folder / "stages" / "01-sft" for outcome in (whole, resumed)]
    assert [read_record(stage)["resumed"] for stage in stages] == [False, True]
    a, b = (load_file(stage / "model.safetensors") for stage in stages)
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)
    assert [line["step"] for line in read(resumed.folder / "metrics.jsonl")] == [1, 2, 3]
