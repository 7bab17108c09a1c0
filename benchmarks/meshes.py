"""What does a mesh cost? The same work on one device, under pmap and on meshes, in one process, taking turns.

    python benchmarks/meshes.py [--repeats 5] [--json FILE] [--against CHECKOUT]

A PPO update (4 epochs of 2 minibatches), a supervised step and sampling, float32, random weights. Where there is no accelerator the
machine is cut into eight fake devices: they share its cores, so a ratio above 1 is what cutting costs, and no ratio says how it scales.
Beside each stands what a device exchanges in one optimizer step (or one call), counted in the compiled program. `--against` runs the
package of another checkout too, in processes that take turns with this one's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.algorithms.policy_updates import ppo_trainer
from jaxrlhf.algorithms.training import sft_trainer
from jaxrlhf.config import PPOConfig, SFTConfig
from jaxrlhf.models import build_model, config_from_shape
from jaxrlhf.plugins import plugin
from jaxrlhf.steps.state import init_state
from jaxrlhf.types import PromptBatch, Rollout, TextBatch

SHAPE = {"family": "gpt_neox", "hidden_size": 128, "num_layers": 4, "num_heads": 8, "intermediate_size": 512}
VOCABULARY, B, L, T, EPOCHS, MINIBATCHES = 1024, 64, 32, 32, 4, 2
WAYS = {
    "one device": None,
    "pmap": (8, 1, 1),
    "mesh 8,1,1": (8, 1, 1),
    "mesh 1,8,1": (1, 8, 1),
    "mesh 2,2,2": (2, 2, 2),
    "mesh 1,1,8": (1, 1, 8),
}
WARM_UP = 2  # turns without a clock: a second call may compile again, for a state that now lives where a step left it
WORKS = ("ppo", "sft", "sample")


def arrays() -> dict[str, Any]:
    """A batch of each kind: all prompts and responses at full length, so that every way does the same work."""
    random = np.random.default_rng(0)
    ids_BL, ids_BT = (random.integers(2, VOCABULARY, (B, n), np.int32) for n in (L, T))
    all_BL, all_BT, all_B, index_B = np.ones((B, L), bool), np.ones((B, T), bool), np.ones(B, bool), np.arange(B, dtype=np.int32)
    logp_BT = np.full((B, T), -np.log(VOCABULARY), np.float32)
    noise = [random.normal(size=(B, T)).astype(np.float32) for _ in range(3)]
    rollout = (ids_BL, all_BL, ids_BT, all_BT, all_BT, logp_BT, logp_BT, *noise, np.zeros(B, np.float32), all_B)
    text = (ids_BL, all_BL, ids_BT, all_BT, all_B, index_B)
    prompts = (ids_BL, all_BL, all_B, index_B)
    made: dict[str, tuple[Any, tuple[Any, ...]]] = {"ppo": (Rollout, rollout), "sft": (TextBatch, text), "sample": (PromptBatch, prompts)}
    return {work: kind(*fields) for work, (kind, fields) in made.items()}


def devices_of(way: str) -> Any:
    axes = WAYS[way]
    if axes is None:
        return None
    mesh = sharding.make_mesh(*axes, devices=jax.devices()[:8])
    return sharding.Replicas(mesh) if way == "pmap" else mesh


def prepare(way: str) -> dict[str, tuple[Callable[[], Any], int | None]]:
    """work → (a call that waits for its result, bytes exchanged in an optimizer step or a call)."""
    mesh = devices_of(way)
    decoder, _ = config_from_shape(SHAPE, VOCABULARY, max_positions=L + T)
    # The checkout compared with may be of before models could hold the layout of their activations.
    held: dict[str, Any] = sharding.row_constraints(mesh) if hasattr(sharding, "row_constraints") else {}
    policy, scalar = (build_model(decoder, head=head, **held) for head in ("lm", "scalar"))
    config = PPOConfig(batch_size=B, num_ppo_epochs=EPOCHS, num_mini_batches=MINIBATCHES, response_length=T)
    trainer = ppo_trainer(policy, scalar, config, plugin, eos_ids=(VOCABULARY,), pad_id=0, vocab_size=None, mesh=mesh)
    optimizer, sft = sft_trainer(policy, SFTConfig(), 1000, mesh)
    params = {"policy": policy.init(jax.random.key(0)), "critic": scalar.init(jax.random.key(1))}
    controller = {"kl_coef": jnp.float32(0.05), "value_bias": jnp.float32(0.0)}
    batches = {name: sharding.place_batch(batch, mesh) for name, batch in arrays().items()}
    key = sharding.replicate(jax.random.key(2), mesh)
    states = {
        "ppo": sharding.place(init_state(params, trainer.optimizer, controller), mesh),
        "sft": sharding.place(init_state(jax.tree.map(jnp.array, params["policy"]), optimizer), mesh),
        "sample": sharding.place(jax.tree.map(jnp.array, params["policy"]), mesh),
    }
    steps: dict[str, tuple[Any, tuple[Any, ...]]] = {"ppo": (trainer.update, (key,)), "sft": (sft, ()), "sample": (trainer.sample, (key,))}

    def call(work: str) -> Callable[[], Any]:
        function, rest = steps[work]

        def run() -> Any:
            made = function(states[work], batches[work], *rest)
            if work != "sample":
                states[work] = made[0]
            return jax.block_until_ready(made)

        return run

    sent = {work: None for work in WORKS}
    if hasattr(sharding, "step"):
        prompts = batches["sample"]
        rows = (prompts.prompt_BL, prompts.prompt_mask_BL, prompts.index_B)
        sent = {
            "ppo": exchanged(trainer.update, states["ppo"], batches["ppo"], key) // (EPOCHS * MINIBATCHES),
            "sft": exchanged(sft, states["sft"], batches["sft"]),
            "sample": exchanged(sampler_of(policy, mesh), states["sample"], rows, key, jnp.float32(1.0)),
        }
    return {work: (call(work), sent[work]) for work in WORKS}


def sampler_of(policy: Any, mesh: Any) -> Any:
    from jaxrlhf.rollouts.generate import sampler

    return sampler(policy, mesh, max_new_tokens=T, eos_ids=(VOCABULARY,), pad_id=0, greedy=False, top_k=0, top_p=1.0, vocab_size=None)


def exchanged(function: Any, *arguments: Any) -> int:
    """Bytes a device exchanges in one call; responses are taken to run to their full length."""
    from jaxrlhf.plan import hlo

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    text = function.lower(*shapes).compile().as_text()
    return sum(one.total or 0 for one in hlo.collectives(text, unknown_trips=T))


def measure(ways: list[str], repeats: int) -> dict[str, Any]:
    """{"seconds": {work: {way: […]}}, "bytes": {work: {way: n}}}; the ways of a work take turns."""
    ready = {way: prepare(way) for way in ways}
    seconds: dict[str, Any] = {work: {way: [] for way in ways} for work in WORKS}
    for work in WORKS:
        for turn in range(WARM_UP + repeats):
            for way in ways:
                start = time.perf_counter()
                ready[way][work][0]()
                if turn >= WARM_UP:
                    seconds[work][way].append(time.perf_counter() - start)
    return {"seconds": seconds, "bytes": {work: {way: ready[way][work][1] for way in ways} for work in WORKS}}


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def report(found: dict[str, Any]) -> None:
    for work, ways in found["seconds"].items():
        print(f"\n| {work} | seconds: median (least–most) | over one device: median (least–most) | bytes exchanged |\n|---|---|---|---|")
        for way, seconds in ways.items():
            ratios = [a / b for a, b in zip(seconds, ways["one device"], strict=True)]
            sent = found["bytes"][work][way]
            print(f"| {way} | {spread(seconds, 3)} | {spread(ratios, 2)} | {'–' if sent is None else f'{sent:,}'} |")


def compare(checkout: str, repeats: int) -> None:
    """Medians of whole processes of the other checkout and this one, taking turns, on the ways both know."""
    here = str(Path(__file__).parents[1])
    ratios: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        found = {}
        for folder in (checkout, here):
            command = [sys.executable, __file__, "--worker", "--repeats", "3"]
            done = subprocess.run(command, env=os.environ | {"PYTHONPATH": folder}, capture_output=True, text=True, check=True)
            found[folder] = json.loads(done.stdout.splitlines()[-1])["seconds"]
        for work, ways in found[here].items():
            for way, seconds in ways.items():
                before = statistics.median(found[checkout][work][way])
                ratios.setdefault((work, way), []).append(statistics.median(seconds) / before)
    print(f"\nSeconds over those of {checkout}, {repeats} turns:")
    for (work, way), values in ratios.items():
        print(f"| {work} | {way} | {spread(values, 2)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the figures here too")
    parser.add_argument("--against", metavar="CHECKOUT", help="another checkout of this repository")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)  # counts only where CPU is all there is
    if options.worker:
        print(json.dumps(measure([way for way in WAYS if way != "pmap"], options.repeats)))
        return
    if jax.device_count() < 8:
        raise SystemExit(f"eight devices are needed and there are {jax.device_count()}; set JAX_PLATFORMS=cpu for fake ones.")
    print(f"{jax.devices()[0].device_kind} × {jax.device_count()}, load {os.getloadavg()[0]:.1f} at the start")
    found = measure(list(WAYS), options.repeats)
    report(found)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    if options.against:
        compare(options.against, options.repeats)


if __name__ == "__main__":
    main()
