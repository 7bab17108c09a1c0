"""A run that is killed goes on with the same bits."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml

import jaxrlhf
from jaxrlhf.monitoring.metrics_file import read
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.pipeline.run import run
from jaxrlhf.pipeline.stages import context, policy, reward, sft
from jaxrlhf.recipe import from_mapping
from jaxrlhf.storage.checkpoint import CheckpointError, Checkpoints
from jaxrlhf.storage.record import read_record
from jaxrlhf.storage.stage import Stage
from jaxrlhf.storage.store import Store
from jaxrlhf.types import TrainState

pytestmark = pytest.mark.usefixtures("one_device")

# A real SIGKILL in the middle of PPO: right after the checkpoint of its second update reached the disk.
KILLED = """
import os, signal, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
from jaxrlhf import sharding
from jaxrlhf.sharding import mesh
from jaxrlhf.storage.checkpoint import Checkpoints
from jaxrlhf.recipe import load_config
from jaxrlhf.pipeline.run import run
make, save = sharding.make_mesh, Checkpoints.save
mesh.make_mesh = lambda *axes: make(*axes, devices=jax.devices()[:1])

def save_and_die(self, step, state, meta=None):
    save(self, step, state, meta)
    if "policy" in state.params and step == 2:
        self.wait()
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.save = save_and_die
run(load_config(sys.argv[1]))
"""


def policy_of(folder: Path, number: str = "05"):
    return jax.tree.leaves(jaxrlhf.load(folder / "stages" / f"{number}-r1-policy").params)


def test_killed_and_resumed_is_uninterrupted(tmp_path, tiny_mapping):
    uninterrupted = run(from_mapping(tiny_mapping(tmp_path / "whole", rounds=1)))
    raw = tiny_mapping(tmp_path / "killed", rounds=1, checkpoint={"every": 1, "keep": 1})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    cache = str(jax.config.jax_compilation_cache_dir)
    done = subprocess.run([sys.executable, "-c", KILLED, str(config), cache], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "killed" / "tiny"
    assert [line["step"] for line in read(folder / "metrics.jsonl") if line["stage"] == "policy"] == [1, 2]
    assert not (folder / "stages" / "05-r1-policy").exists()
    run(from_mapping(raw))
    assert read_record(folder / "stages" / "05-r1-policy")["resumed"]
    assert not read_record(folder / "stages" / "01-sft")["resumed"]
    assert all((a == b).all() for a, b in zip(policy_of(folder), policy_of(uninterrupted), strict=True))
    assert [line["step"] for line in read(folder / "metrics.jsonl") if line["stage"] == "policy"] == [1, 2, 3]

    def figures(run_folder):
        return [
            {k: v for k, v in line.items() if not k.startswith("time/")}
            for line in read(run_folder / "metrics.jsonl")
            if line["stage"] == "policy"
        ]

    assert figures(folder)[2] == figures(uninterrupted)[2]


def test_stopped_after_training_does_not_train_again(tmp_path, tiny_config, monkeypatch):
    """Reference scores, validation and writing the model come after the last step: a stage that dies there takes no step twice."""
    uninterrupted = run(tiny_config(tmp_path / "whole"), until="ppo")
    config, steps = tiny_config(tmp_path / "stopped"), []

    def counted(loop):
        return lambda *given, **options: (steps.append(1) or one for one in loop(*given, **options))

    def stop(*_, **__):
        raise InterruptedError("stopped")

    monkeypatch.setattr(sft, "train", counted(sft.train))
    monkeypatch.setattr(reward, "train", counted(reward.train))
    monkeypatch.setattr(policy, "train_ppo", counted(policy.train_ppo))
    taken = []
    # Dies after SFT, in the bias pass, in the validation, and after PPO; every run goes on with the stage the last one died in.
    for stage, where, until in (
        (sft, "add_model", "ppo"),
        (reward, "score_responses", "ppo"),
        (reward, "score_pairs", "ppo"),
        (None, None, "reward"),
        (policy, "add_model", "ppo"),
    ):
        with monkeypatch.context() as patch:
            if where is None:
                run(config, until=until)
            else:
                patch.setattr(stage, where, stop)
                with pytest.raises(InterruptedError):
                    run(config, until=until)
        taken.append(len(steps))
    folder = run(config, until="ppo")
    taken.append(len(steps))
    assert taken == [3, 5, 5, 5, 8, 8]
    assert all((a == b).all() for a, b in zip(policy_of(folder, "04"), policy_of(uninterrupted, "04"), strict=True))
    lines = [(line["stage"], line["step"]) for line in read(folder / "metrics.jsonl") if line["stage"] in ("sft", "reward", "policy")]
    assert sorted(lines) == [(name, n) for name, last in (("policy", 3), ("reward", 2), ("sft", 3)) for n in range(1, last + 1)]
    assert not list((folder / "stages").glob("*/checkpoint"))


def test_the_seconds_of_a_stage_are_those_of_all_its_processes(tmp_path, tiny_config, monkeypatch):
    """Three steps of 100 s, stopped in the third, checkpoint after the second: 200 s stand in the checkpoint, the lost ones nowhere."""
    clock, monotonic, stops, train = [0.0], time.monotonic, [True], sft.train

    def slow(*given):
        for n, one in enumerate(train(*given), start=1):
            clock[0] += 100
            if n == 3 and stops:
                raise InterruptedError(stops.pop())
            yield one

    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + clock[0])
    monkeypatch.setattr(sft, "train", slow)
    config = tiny_config(tmp_path, checkpoint={"every": 2})
    with pytest.raises(InterruptedError):
        run(config, until="sft")
    record = read_record(run(config, until="sft") / "stages" / "01-sft")
    assert record["resumed"] and 300 <= record["seconds"] < 400 and record["compile_seconds"] < record["seconds"]


def test_what_the_next_round_carries_on_is_the_last_checkpoint_and_no_other(tmp_path, tiny_config):
    """With `checkpoint.keep: 2` the finished stage keeps one; where that is damaged, an earlier one would be another result."""
    config = tiny_config(tmp_path)
    context_of = context.RunContext(config, Store(tmp_path / ".stages"), tmp_path / "tiny", RunLog(None), None)
    assert config.checkpoint.keep == 2

    def state_at(step):
        params = {"policy": {"w": jnp.ones(3) * step}, "critic": {"w": jnp.ones(3) * step}}
        return TrainState(jnp.int32(step), params, {"m": jnp.ones(3) * step}, {"value_bias": jnp.float32(0)})

    def train(folder):
        with Checkpoints(context_of.store.state(folder), keep=config.checkpoint.keep) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, state_at(step))

    done = context_of.build(Stage("r1-policy", "model", "ppo", {}), train, keep_state=True)
    assert [path.name for path in (done.place / "checkpoint").iterdir()] == ["2"]
    carried = policy.with_previous_state(context_of, state_at(0), done, (True, False))
    assert carried.params["critic"]["w"].tolist() == [2, 2, 2] and carried.params["policy"]["w"].tolist() == [0, 0, 0]
    file = next(path for path in (done.place / "checkpoint").rglob("params/ocdbt.process_0/d/*") if path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=f"{file} is damaged: .*: delete {done.place}, then run the same command again"):
        policy.with_previous_state(context_of, state_at(0), done, (True, False))


def live_bytes(arrays) -> int:
    return sum(x.nbytes for x in {id(x): x for x in arrays if isinstance(x, jax.Array)}.values())


def test_a_training_holds_its_state_and_its_fixed_models_once(tmp_path, tiny_config, monkeypatch):
    """Also where it goes on from a checkpoint. In round 1 the start, the reference and π_SFT are one model."""
    seen = []

    def weighed(loop, name):
        def train(first, *rest, **options):
            state, fixed = rest[:2] if name == "train_ppo" else (rest[0], ())
            gc.collect()
            wanted = live_bytes(jax.tree.leaves((state, fixed)))
            fresh = int(state.step) == 0
            models_held = live_bytes(jax.tree.leaves(fixed)) / live_bytes(jax.tree.leaves(state.params)) if fixed else 0
            seen.append(((live_bytes(jax.live_arrays()) - before) / wanted, models_held))
            for one in loop(first, *rest, **options):
                yield one
                if fresh:
                    raise InterruptedError("stopped after the first step")

        return train

    for stage, name in ((sft, "train"), (reward, "train"), (policy, "train_ppo")):
        monkeypatch.setattr(stage, name, weighed(getattr(stage, name), name))
    gc.collect()
    before = live_bytes(jax.live_arrays())
    config = tiny_config(tmp_path, checkpoint={"every": 1})
    for _ in ("sft", "reward", "policy"):
        with pytest.raises(InterruptedError):
            run(config, until="ppo")
    read_models, load = [], context.load
    monkeypatch.setattr(context, "load", lambda *given, head, **options: read_models.append(head) or load(*given, head=head, **options))
    run(config, until="ppo")
    assert read_models == ["lm", "scalar"]
    assert len(seen) == 6  # every training twice
    assert [held for held, _ in seen] == pytest.approx([1] * 6, abs=0.05)
    assert [fixed for _, fixed in seen[4:]] == pytest.approx([1, 1], abs=0.1)  # one reference and one reward model beside policy and critic
