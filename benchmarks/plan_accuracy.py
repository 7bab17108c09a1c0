"""How far is the memory that `jaxrlhf plan` predicts from what the stages take?

    python benchmarks/plan_accuracy.py [--json FILE]

SFT, reward training and PPO at one middle size (67 million parameters, float32), each in a process of its own that runs what the stage
runs: the same initialisation, trainer and passes. On a CPU the peak of anonymous resident memory (RssAnon, looked at every 2 ms) is
compared, from before the stage's first compiled call to the end of each of its phases; on a GPU `peak_bytes_in_use` of the allocator, which
starts at the process. A first process fills a cache of compiled programs, so that the compiler's own memory is not in the figures.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "name": "plan-accuracy", "method": "ppo", "rounds": 1,
    "data": {"train": "rows.jsonl", "limits": {"max_prompt_length": 96, "max_response_length": 32}},
    "tokenizer": {"vocab_size": 8192},
    "model": {"shape": {"family": "gpt_neox", "hidden_size": 1024, "num_layers": 4, "num_heads": 16}},
    "sft": {"batch_size": 16, "loss_on": "all", "max_steps": 2},
    "reward": {"batch_size": 8, "max_steps": 2, "eval_batch_size": 16},
    "ppo": {"total_episodes": 16, "batch_size": 16, "response_length": 32, "num_ppo_epochs": 1, "old_logp": "sampler"},
    "mesh": {"data": 1},
}  # fmt: skip
STAGES = ("sft", "reward", "ppo")
GIB = 2**30


class Watcher:
    """The largest resident memory since it was last asked, in bytes: of this process on a CPU, of the allocator on another device."""

    def __init__(self):
        import jax

        self.device = jax.devices()[0]
        self.largest = self.now()
        if self.device.platform == "cpu":
            threading.Thread(target=self._look, daemon=True).start()

    def now(self) -> int:
        if self.device.platform != "cpu":
            return self.device.memory_stats()["bytes_in_use"]
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    def _look(self) -> None:
        while True:
            self.largest = max(self.largest, self.now())
            time.sleep(0.002)

    def peak(self) -> int:
        """Since the last call; of an allocator that keeps one peak for ever, since the process began."""
        if self.device.platform != "cpu":
            return self.device.memory_stats()["peak_bytes_in_use"]
        largest, self.largest = max(self.largest, self.now()), self.now()
        return largest


def setting() -> tuple[Any, Any, Any]:
    """(config, subjects, mesh) of the one size."""
    from jaxrlhf import sharding
    from jaxrlhf.plan.models import planned_models
    from jaxrlhf.recipe import from_mapping

    config = from_mapping(CONFIG)
    return config, planned_models(config, uses_encoder=False), sharding.mesh_of(config.mesh)


def predicted(stage: str) -> dict[str, float]:
    """Phase → bytes, as the plan has them."""
    from jaxrlhf.commands.plan import start_devices
    from jaxrlhf.plan.compile import compiled
    from jaxrlhf.plan.counts import counts_of
    from jaxrlhf.plan.memory import planned
    from jaxrlhf.plan.phases import policy_phases
    from jaxrlhf.plan.planner import Planner
    from jaxrlhf.plan.training import reward_phases, sft_phase

    start_devices(None)
    config, subjects, mesh = setting()
    planner = Planner(config, subjects, counts_of(config), mesh)
    made = {"sft": lambda: [sft_phase(planner)], "reward": lambda: reward_phases(planner, 1), "ppo": lambda: policy_phases(planner)}
    phases = made[stage]()
    return {one.name: planned(one, compiled(one, mesh), mesh).total for one in phases}


def filled(tree: Any, mesh: Any, seed: int = 0) -> Any:
    """Arrays for a tree of shapes: full masks, and ids drawn at random."""
    import jax
    import numpy as np

    from jaxrlhf import sharding

    draw = np.random.default_rng(seed)

    def one(leaf: Any) -> Any:
        if leaf.dtype == bool:
            return np.ones(leaf.shape, bool)
        return draw.integers(2, 8000, leaf.shape).astype(leaf.dtype) if leaf.ndim == 2 else np.arange(leaf.shape[0]).astype(leaf.dtype)

    return sharding.place_batch(jax.tree.map(one, tree), mesh)


def measured(stage: str) -> dict[str, float]:
    """Phase → bytes of the largest rise since before the stage's first compiled call."""
    import jax
    import numpy as np

    from jaxrlhf import sharding
    from jaxrlhf.algorithms import ppo, reward, training  # noqa: F401  # modules are loaded before anything is compared

    found_setting = setting()
    jax.block_until_ready(sharding.place(np.zeros(8), found_setting[2]))  # the runtime's own threads and pools
    gc.collect()
    watcher = Watcher()
    before, found = watcher.now(), {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        yield
        found[name] = watcher.peak() - before
        give_back()
        watcher.peak()

    {"sft": run_sft, "reward": run_reward, "ppo": run_ppo}[stage](phase, *found_setting)
    return found


def give_back() -> None:
    """Let the C library return what is free to the system, so that the next phase is not measured with the last one's memory."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def run_sft(phase: Callable[[str], Any], config: Any, subjects: Any, mesh: Any) -> None:
    import jax

    from jaxrlhf.algorithms.training import own_copy, sft_trainer
    from jaxrlhf.plan.models import models_of
    from jaxrlhf.plan.shapes import texts
    from jaxrlhf.sharding import place
    from jaxrlhf.steps.state import init_state

    model = models_of(config, subjects, mesh)[0]
    with phase("step"):
        params = place(model.init(jax.random.key(0)), mesh)
        optimizer, step = sft_trainer(model, config.sft, 2, mesh)
        state = place(init_state(own_copy(params), optimizer), mesh)
        del params
        for number in range(2):
            state, metrics = step(state, filled(texts(config.sft.batch_size, 96, 32), mesh, number))
        jax.block_until_ready((state, metrics))


def run_reward(phase: Callable[[str], Any], config: Any, subjects: Any, mesh: Any) -> None:
    import jax
    import numpy as np

    from jaxrlhf.algorithms.reward import pair_trainer, reward_loss
    from jaxrlhf.algorithms.training import own_copy
    from jaxrlhf.plan.models import models_of
    from jaxrlhf.plan.shapes import pairs, texts
    from jaxrlhf.plugins import plugin
    from jaxrlhf.scorers.reward_model import score_pass
    from jaxrlhf.sharding import place
    from jaxrlhf.steps.state import init_state

    model = models_of(config, subjects, mesh)[1]
    loss = reward_loss(config.reward, plugin)
    with phase("step"):
        params = place(model.init(jax.random.key(0)), mesh)
        optimizer, step = pair_trainer(model, loss, config.reward, 2, mesh)
        state = place(init_state(own_copy(params), optimizer), mesh)
        del params
        for number in range(2):
            state, metrics = step(state, filled(pairs(config.reward.batch_size, 96, 32, loss.columns), mesh, number))
        jax.block_until_ready((state, metrics))
    with phase("scores of references"):
        batch = filled(texts(config.reward.eval_batch_size, 96, 32), mesh)
        sides = (batch.prompt_BL, batch.prompt_mask_BL, batch.response_BT, batch.response_mask_BT)
        for _ in range(2):
            jax.block_until_ready(score_pass(model, mesh)(state.params, sides, np.float32(0)))


def run_ppo(phase: Callable[[str], Any], config: Any, subjects: Any, mesh: Any) -> None:
    import jax
    import jax.numpy as jnp

    from jaxrlhf.algorithms.policy_updates import ppo_trainer
    from jaxrlhf.algorithms.training import own_copy
    from jaxrlhf.plan.models import models_of
    from jaxrlhf.plan.shapes import bools, ints
    from jaxrlhf.plugins import plugin
    from jaxrlhf.sharding import place
    from jaxrlhf.steps.state import init_state
    from jaxrlhf.types import PromptBatch

    policy, scalar = models_of(config, subjects, mesh)
    key, B = jax.random.key(0), config.ppo.batch_size
    how = {"eos_ids": subjects.eos_ids, "pad_id": 0, "vocab_size": subjects.vocab_size, "mesh": mesh}
    with phase("sample"):
        trainer = ppo_trainer(policy, scalar, config.ppo, plugin, **how)
        reference, reward = place(policy.init(key), mesh), place(scalar.init(key), mesh)
        controller = {"kl_coef": jnp.float32(0.05), "value_bias": jnp.float32(0)}
        params = own_copy({"policy": reference, "critic": reward})
        state = place(init_state(params, trainer.optimizer, controller), mesh)
        del params
        prompts = filled(PromptBatch(ints(B, 96), bools(B, 96), bools(B), ints(B)), mesh)
        completion = jax.block_until_ready(trainer.sample(state.params["policy"], prompts, key))
    with phase("score"):
        read = {**state.params, "reference": reference, "reward": reward}
        rollout, _ = jax.block_until_ready(trainer.score(read, (prompts, completion), state.controller, jnp.float32(0)))
        del read
    with phase("update"):
        jax.block_until_ready(trainer.update(state, rollout, key))


def child(kind: str, stage: str, cache: str) -> dict[str, float]:
    """What a process of its own says."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, __file__, "--child", kind, "--stage", stage]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, help="one stage alone")
    parser.add_argument("--json", help="write the figures here too")
    parser.add_argument("--child", choices=("predicted", "measured"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps({"predicted": predicted, "measured": measured}[options.child](options.stage)))
        return
    rows = []
    print(f"{'stage':8} {'phase':22} {'predicted GiB':>14} {'measured GiB':>13} {'predicted/measured':>19}", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for stage in [options.stage] if options.stage else STAGES:
            told = child("predicted", stage, cache)
            child("measured", stage, cache)  # fills the cache
            took = child("measured", stage, cache)
            found = [{"stage": stage, "phase": name, "predicted": told[name], "measured": took[name]} for name in took]
            found.append({"stage": stage, "phase": "peak", "predicted": max(told.values()), "measured": max(took.values())})
            for row in found:
                sizes = f"{row['predicted'] / GIB:14.2f} {row['measured'] / GIB:13.2f}"
                print(f"{stage:8} {row['phase']:22} {sizes} {row['predicted'] / row['measured']:19.2f}", flush=True)
            rows += found
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
