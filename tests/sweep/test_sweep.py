"""A sweep: what it shares, what it does with a run that fails, and that killed and called again it gives the same table."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import pytest
import yaml

from jaxrlhf.formatting import format_duration
from jaxrlhf.monitoring.metrics_file import read
from jaxrlhf.pipeline.table import read_summaries
from jaxrlhf.recipe import ConfigError, from_mapping
from jaxrlhf.report.arms import COLUMNS, collect
from jaxrlhf.storage.record import read_record
from jaxrlhf.sweep import sweep as module
from jaxrlhf.sweep.sweep import failure_lines, jobs_of, read_sweep, seconds_left, seeds_of, sweep

pytestmark = pytest.mark.usefixtures("one_device")

ARMS = {
    "ppo": {"method": "ppo"},
    "one-round": {"method": "ppo", "rounds": 1},
    "broken": {"method": "retrain", "row": {"reward_update": "a_broken_update:update"}},
    "retrain": {"method": "retrain"},
}
BROKEN = "def update(context, pairs):\n    raise RuntimeError(f'no update for seed {context.config.seed}')\n"


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """A folder beside the config, with an update that fails when it is called."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "a_broken_update.py").write_text(BROKEN)
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def raw(tmp_path_factory, tiny_mapping, plugins):
    return lambda name: tiny_mapping(tmp_path_factory.mktemp(name), arms=ARMS, sft_seed=0, checkpoint={"every": 1, "keep": 1})


@pytest.fixture(scope="module")
def finished(raw) -> Path:
    return sweep(from_mapping(raw("whole")), (0, 1))


def built(folder: Path) -> Counter:
    """How many stages of each function are in the store."""
    store = folder.parent / ".stages"
    return Counter(read_record(path)["function"] for path in store.iterdir() if (path / "stage.json").exists())


def table_of(folder: Path) -> dict:
    """sweep.json without what the clock and the place say."""
    body = json.loads((folder / "sweep.json").read_text())
    for arm in body["arms"].values():
        del arm["figures"]["seconds"]
    for run in body["runs"]:
        run["figures"].pop("seconds")
        run |= {"seconds": None, "folder": None, "rounds": [{k: v for k, v in row.items() if k != "seconds"} for row in run["rounds"]]}
    return body


def test_what_arms_and_seeds_have_in_common_is_built_once(finished):
    """One text, one π_SFT and one evaluation of it; per seed one set of pairs, one first round, and per arm what is its own."""
    assert built(finished) == {
        "tokenizer": 1, "sft": 1, "pairs": 2, "reward": 2 + 2, "update": 2, "ppo": 2 + 2 * 2, "evaluation": 1 + 2 + 2 * 2,
    }  # fmt: skip
    seeds = [read_summaries(finished / f"seed-{seed}") for seed in (0, 1)]
    assert seeds[0]["ppo"]["rounds"][0]["gold"] == seeds[1]["ppo"]["rounds"][0]["gold"]
    assert seeds[0]["ppo"]["rounds"][2]["gold"] != seeds[1]["ppo"]["rounds"][2]["gold"]
    assert {summary["seed"] for summary in seeds[1].values()} == {1}


def test_a_run_that_fails_is_recorded_and_the_others_go_on(finished, capsys):
    done = read_sweep(finished)
    states = {(run.seed, run.arm): run.state for run in done.runs}
    assert states == {(seed, arm): "failed" if arm == "broken" else "finished" for seed in (0, 1) for arm in ARMS}
    failed = [run for run in done.runs if run.state == "failed"]
    assert [run.error for run in failed] == [f"RuntimeError: no update for seed {seed}" for seed in (0, 1)]
    assert "raise RuntimeError" in (Path(failed[0].folder) / "error.txt").read_text()
    said = failure_lines(done)
    assert "runs that failed: 2 of 8" in said[0] and "the same command" in said[0] and "seed 1, broken: RuntimeError" in said[2]


def test_the_table_follows_the_summaries(finished):
    body = json.loads((finished / "sweep.json").read_text())
    gold = {arm: [read_summaries(finished / f"seed-{s}")[arm]["rounds"][-1]["gold"] for s in (0, 1)] for arm in ("ppo", "retrain")}
    facts = body["arms"]["retrain"]
    assert facts["figures"]["gold"]["mean"] == pytest.approx(sum(gold["retrain"]) / 2)
    assert facts["difference"]["mean"] == pytest.approx(sum(gold["retrain"]) / 2 - sum(gold["ppo"]) / 2)
    fits = {arm: one["figures"]["fits"] and one["figures"]["fits"]["mean"] for arm, one in body["arms"].items()}
    assert fits == {"ppo": 1, "one-round": 1, "broken": None, "retrain": 2}
    assert {arm: one["setting"]["episodes"] for arm, one in body["arms"].items()} == {
        "ppo": 96,
        "one-round": 48,
        "broken": 96,
        "retrain": 96,
    }
    shown = {arm.name: [COLUMNS[-1].of(view) for view in arm.views] for arm in collect([finished]).arms}  # of all stages, in the report
    assert shown["retrain"] == pytest.approx([run["figures"]["seconds"] for run in body["runs"] if run["arm"] == "retrain"])
    assert (finished / "sweep.md").exists() and not (finished / "figures").exists()  # `jaxrlhf report` draws


def test_called_again_it_runs_what_failed_and_nothing_else(finished, raw, monkeypatch):
    config = from_mapping(yaml.safe_load((finished / "config.yaml").read_text()))
    ran, before, table = [], built(finished), table_of(finished)
    lines = read(finished / "seed-1" / "retrain" / "metrics.jsonl")
    run = module.run
    monkeypatch.setattr(module, "run", lambda one, **how: ran.append(one.name) or run(one, **how))
    sweep(config, (0, 1))
    assert ran == ["tiny/seed-0/broken", "tiny/seed-1/broken"] and built(finished) == before and table_of(finished) == table
    assert read(finished / "seed-1" / "retrain" / "metrics.jsonl") == lines
    removed = finished / "seed-1" / "retrain" / "stages" / "09-r2-policy"
    (removed.resolve() / "stage.json").rename(removed.resolve() / "kept.json")
    try:  # a stage of the store that is broken is found, not believed
        with pytest.raises(Exception, match=r"stage\.json is missing"):
            sweep(config, (1,))
    finally:
        (removed.resolve() / "kept.json").rename(removed.resolve() / "stage.json")


# A real SIGKILL in the second update of PPO at the second seed, after a whole run and in the middle of another.
KILLED = """
import os, signal, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
from jaxrlhf import sharding
from jaxrlhf.sharding import mesh
from jaxrlhf.storage.checkpoint import Checkpoints
from jaxrlhf.recipe import load_config
from jaxrlhf.pipeline.stages import context
from jaxrlhf.sweep.sweep import sweep
make, save, build = sharding.make_mesh, Checkpoints.save, context.RunContext.build
mesh.make_mesh = lambda *axes: make(*axes, devices=jax.devices()[:1])
seen = []

def build_and_note(self, stage, *given, **options):
    seen.append((self.config.seed, stage.name))
    return build(self, stage, *given, **options)

def save_and_die(self, step, state, meta=None):
    save(self, step, state, meta)
    if seen[-1] == (1, "r2-policy") and step == 2:
        self.wait()
        os.kill(os.getpid(), signal.SIGKILL)

context.RunContext.build, Checkpoints.save = build_and_note, save_and_die
sweep(load_config(sys.argv[1]), (0, 1))
"""


def test_killed_in_the_middle_and_called_again_it_gives_the_same_table(raw, finished, plugins, tmp_path):
    killed = raw("killed")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(killed, sort_keys=False))
    cache = str(jax.config.jax_compilation_cache_dir)
    there = {**os.environ, "PYTHONPATH": str(plugins)}
    dead = subprocess.run([sys.executable, "-c", KILLED, str(path), cache], capture_output=True, text=True, env=there)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    folder = Path(killed["output"]) / "tiny"
    states = Counter(run.state for run in read_sweep(folder).runs)
    assert states == {"finished": 3, "failed": 1, "pending": 4}  # the table of what was done is there
    sweep(path, (0, 1))
    assert read_record(folder / "seed-1" / "ppo" / "stages" / "07-r2-policy")["resumed"]
    assert table_of(folder) == table_of(finished) and built(folder) == built(finished)


def test_seeds():
    assert seeds_of("3") == (0, 1, 2) and seeds_of("3,5, 9") == (3, 5, 9) and seeds_of("7,") == (7,)
    for wrong in ("0", "x", "1-3", "-1", "1,-2", ",", "1,1", "1.5", ""):
        with pytest.raises(ConfigError, match="--seeds"):
            seeds_of(wrong)


def test_jobs(tiny_config, tmp_path):
    jobs = jobs_of(tiny_config(tmp_path, arms={"a": {"ppo.kl_coef": 0.1}, "b": {}}), (3, 5))
    assert [(job.seed, job.arm, job.config.seed, job.config.name) for job in jobs] == [
        (seed, arm, seed, f"tiny/seed-{seed}/{arm}") for seed in (3, 5) for arm in ("a", "b")
    ]
    assert jobs[2].config.ppo.kl_coef == 0.1
    (alone,) = jobs_of(tiny_config(tmp_path), (3,))
    assert (alone.arm, alone.config.name, alone.config.seed) == ("ppo", "tiny/seed-3/ppo", 3)


def test_nothing_starts_where_a_config_cannot_run(tiny_config, tmp_path):
    for arms, message in (({"a": {}, "b": {"method": "ocmr"}}, "'ocmr' is unknown"), ({"a": {"seed": 3}}, "arms.a sets seed")):
        with pytest.raises(ValueError, match=message):
            sweep(tiny_config(tmp_path, arms=arms), (0,))
    with pytest.raises(ConfigError, match="at least one seed"):
        sweep(tiny_config(tmp_path), ())
    assert not list(tmp_path.iterdir())


def test_the_time_left_is_what_the_same_arm_took():
    taken = [("a", 100.0), ("b", 20.0), ("c", 30.0)]
    assert seconds_left([], ["a"]) is seconds_left(taken[:1], ["a"]) is None
    assert seconds_left(taken[:2], ["a", "b", "c"]) == 100 + 20 + 20  # the first run says nothing of arms that have not run
    assert seconds_left(taken, ["a", "b", "d"]) == 100 + 20 + (20 + 30) / 2
    assert [format_duration(seconds) for seconds in (40, 720, 12600)] == ["40 s", "12 min", "3.5 h"]
