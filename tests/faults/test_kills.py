"""Real SIGKILLs of real processes: at random moments, on another number of devices, and with the checkpoints at a URL and an empty disk."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from attack import content, differing
from tiny_run import TINY

import jaxrlhf

GOLDEN = Path(__file__).parents[1] / "golden"
KILLS, CHAINS = 50, 5

# argv: compilation cache, recipe, devices, and where to die: "stage step" of a checkpoint, or nothing.
PROCESS = """
import sys, json, os, signal, logging, jax
cache, recipe, devices, *where = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
logging.basicConfig(level=logging.WARNING, format="%(message)s")
if "BUCKET_ROOT" in os.environ:
    import bucket
from jaxrlhf import sharding
from jaxrlhf.sharding import mesh
from jaxrlhf.storage.checkpoint import Checkpoints
from jaxrlhf.recipe import from_mapping
from jaxrlhf.pipeline.run import run
make, save = sharding.make_mesh, Checkpoints.save
mesh.make_mesh = lambda *axes: make(*axes, devices=jax.devices()[: int(devices)])

def save_and_die(self, step, state, meta=None):
    save(self, step, state, meta)
    if where and where[0] in str(list(state.params)) and step == int(where[1]):
        self.wait()
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.save = save_and_die
print("up", flush=True)
run(from_mapping(json.loads(recipe)))
"""


def recipe(output, **changes) -> dict:
    raw = copy.deepcopy(TINY) | {"output": str(output), "rounds": 1, "method": "ocrm", "checkpoint": {"every": 1}} | changes
    raw["ppo"] |= {"total_episodes": 96}
    return raw


def process(raw, devices=1, where=(), **environment) -> subprocess.Popen:
    path = os.pathsep.join([str(GOLDEN), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-c", PROCESS, str(jax.config.jax_compilation_cache_dir), json.dumps(raw), str(devices), *map(str, where)]
    return subprocess.Popen(
        words, env=os.environ | {"PYTHONPATH": path} | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(started: subprocess.Popen) -> int:
    _, said = started.communicate()
    assert started.returncode in (0, -signal.SIGKILL), said
    return started.returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "runs"
    assert ended(process(recipe(output))) == 0
    return output


@pytest.mark.parametrize("chain", range(CHAINS))
def test_killed_at_random_moments(tmp_path, whole, chain):
    """Each process is killed some time after its imports; where the run has ended before, the next one begins a new folder."""
    moments, kills, ends = random.Random(chain), 0, 0
    while kills < KILLS // CHAINS or not ends:
        started = process(recipe(tmp_path / str(ends)))
        assert started.stdout is not None
        assert started.stdout.readline() == "up\n"
        if kills < KILLS // CHAINS:
            time.sleep(moments.uniform(0.0, 4.0))
            started.send_signal(signal.SIGKILL)
        if ended(started):
            kills += 1
            continue
        assert differing(content(tmp_path / str(ends) / ".stages"), content(whole / ".stages")) == []
        ends += 1


def test_killed_on_eight_devices_goes_on_on_four_and_one(tmp_path, whole):
    raw = recipe(tmp_path, mesh={"data": -1})
    assert ended(process(raw, 8, ("layers", 2))) == -signal.SIGKILL
    assert ended(process(raw, 4, ("policy", 3))) == -signal.SIGKILL
    assert ended(process(raw, 1)) == 0
    agrees(tmp_path / "tiny", whole / "tiny")


@pytest.mark.parametrize("seed", range(2))
def test_checkpoints_at_a_url_and_an_empty_disk_each_time(tmp_path, whole, seed):
    raw, places = recipe("bucket://b/runs"), random.Random(seed)
    machine = {"BUCKET_ROOT": str(tmp_path / "bucket")}
    for number, where in enumerate([("layers", places.randint(1, 3)), ("policy", places.randint(1, 3)), ("policy", places.randint(4, 6))]):
        assert ended(process(raw, 1, where, JAXRLHF_WORK=str(tmp_path / f"disk{number}"), **machine)) == -signal.SIGKILL
    assert ended(process(raw, 1, JAXRLHF_WORK=str(tmp_path / "last"), **machine)) == 0
    stages = json.loads((tmp_path / "bucket" / "b" / "runs" / "tiny" / "links.json").read_text())
    for name, url in stages.items():
        there = tmp_path / "bucket" / url.removeprefix("bucket://")
        here = whole / "tiny" / "stages" / name
        for path in sorted(here.rglob("*.safetensors")) + sorted(here.rglob("*.parquet")):
            assert (there / path.relative_to(here)).read_bytes() == path.read_bytes(), f"{name}/{path.name}"


def agrees(one: Path, other: Path) -> None:
    """The same rows, and float32 within 1e-6: another number of devices adds in another order."""
    for stage in sorted((other / "stages").iterdir()):
        if (stage / "model.safetensors").exists():
            loaded = [jax.tree.leaves(jaxrlhf.load(run / "stages" / stage.name).params) for run in (one, other)]
            for a, b in zip(*loaded, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)
