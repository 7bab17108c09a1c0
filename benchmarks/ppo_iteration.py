"""How long does one PPO iteration take, where does the time go, and how far is that from what the machine can do?

    python benchmarks/ppo_iteration.py [--iterations 8] [--json FILE]

Shapes: GPT-NeoX, hidden 256, 4 layers, 4 heads, FFN 1024, vocabulary 1024; batch 32, query 64, response 48, 4 epochs of
1 minibatch; random weights, float32; the separate critic, reward and reference models are of the same size. No response
ends early, so every iteration does the same work. The matmul peak is measured in the same process, between iterations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import rng
from jaxrlhf.algorithms.policy_updates import ppo_trainer
from jaxrlhf.algorithms.ppo import RoundModels, train_ppo
from jaxrlhf.algorithms.training import own_copy
from jaxrlhf.config import PPOConfig
from jaxrlhf.models.families import config_from_shape
from jaxrlhf.models.model import build_model
from jaxrlhf.plugins import plugin
from jaxrlhf.steps.state import init_state
from jaxrlhf.types import PromptBatch

WIDTH, LAYERS, HEADS, INNER, VOCABULARY = 256, 4, 4, 1024, 1024
B, L, T, EPOCHS = 32, 64, 48, 4
PHASES = ("generate", "score", "update")


def peak_gflops(size: int = 2048, repeats: int = 3) -> float:
    """The best of a few float32 matrix products of the library itself, in GFLOP/s."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(a).block_until_ready()
    best = min(_timed(lambda: product(a).block_until_ready()) for _ in range(repeats))
    return 2 * size**3 / best / 1e9


def _timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gflop() -> dict[str, float]:
    """GFLOP of matrix products in each phase, counted from the shapes: 2 a multiply-add, backward twice the forward.

    The last layer's queries, MLP and the head run on the T response positions only; keys and values on all.
    """
    d, f, s = WIDTH, INNER, L + T

    def layer(queries: int, keys: int) -> float:
        projections = 2 * d * d * (2 * keys + 2 * queries)  # k, v on all; q, o on the queries
        return projections + 2 * queries * keys * d * 2 + queries * 2 * 2 * d * f

    body = (LAYERS - 1) * layer(s, s) + layer(T, s)
    head = 2 * T * d * VOCABULARY
    decode = sum(LAYERS * (2 * 4 * d * d + 2 * 2 * d * f + 2 * (L + t) * d * 2) + 2 * d * VOCABULARY for t in range(T))
    prefill = LAYERS * layer(L, L)
    forward = {"policy": body + head, "scalar": body}
    score = 2 * forward["policy"] + 2 * forward["scalar"]
    update = EPOCHS * 3 * (forward["policy"] + forward["scalar"])
    return {name: B * flop / 1e9 for name, flop in {"generate": prefill + decode, "score": score, "update": update}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--json", help="write the figures here too")
    options = parser.parse_args()

    shape = {"family": "gpt_neox", "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "intermediate_size": INNER}
    decoder, _ = config_from_shape(shape, VOCABULARY, max_positions=256)
    policy, scalar = build_model(decoder, head="lm"), build_model(decoder, head="scalar")
    config = PPOConfig(batch_size=B, total_episodes=B * options.iterations, num_ppo_epochs=EPOCHS, response_length=T, temperature=1.0)
    trainer = ppo_trainer(policy, scalar, config, plugin, eos_ids=(), pad_id=0, vocab_size=None)
    key = rng.root_key(0)
    params, reference = policy.init(rng.stream(key, "policy")), policy.init(rng.stream(key, "policy"))
    reward = scalar.init(rng.stream(key, "reward"))
    state = init_state(
        own_copy({"policy": params, "critic": reward}), trainer.optimizer, {"kl_coef": jnp.float32(0.05), "value_bias": jnp.float32(0.0)}
    )
    draw = np.random.default_rng(0)
    prompts = (
        PromptBatch(
            draw.integers(2, VOCABULARY, (B, L), dtype=np.int32), np.ones((B, L), bool), np.ones(B, bool), np.arange(B, dtype=np.int32)
        )
        for _ in range(options.iterations + 1)
    )
    peaks, rows = [peak_gflops()], []
    for _, metrics in train_ppo(trainer, state, RoundModels(reference, reward, 0.0), prompts, key=key):
        rows.append({phase: metrics[f"time/{phase}"] for phase in PHASES})
        peaks.append(peak_gflops())
    report(rows[0], rows[1:], statistics.median(peaks), options.json)


def report(first: dict[str, float], rows: list[dict[str, float]], peak: float, path: str | None) -> None:
    work = gflop()
    total = [sum(row.values()) for row in rows]
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} {device.device_kind}, {jax.device_count()} device(s)")
    print(f"matmul peak measured here: {peak:.0f} GFLOP/s (float32, median over the run)")
    print(f"first iteration, compilation included: {sum(first.values()):.2f} s")
    print(f"{'phase':10} {'median s':>9} {'min s':>9} {'share':>6} {'GFLOP':>7} {'GFLOP/s':>8} {'of peak':>8}")
    figures = {}
    for phase in (*PHASES, "iteration"):
        seconds = total if phase == "iteration" else [row[phase] for row in rows]
        flop = sum(work.values()) if phase == "iteration" else work[phase]
        median, least = statistics.median(seconds), min(seconds)
        share = median / statistics.median(total)
        figures[phase] = {"median": median, "min": least, "gflop": flop, "of_peak": flop / median / peak}
        print(f"{phase:10} {median:9.3f} {least:9.3f} {share:6.1%} {flop:7.1f} {flop / median:8.0f} {flop / median / peak:8.1%}")
    generate = figures["generate"]["median"]
    print(f"generated tokens/s: {B * T / generate:,.0f} in the sampler, {B * T / figures['iteration']['median']:,.0f} over the iteration")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"peak_gflops": peak, "phases": figures, "jax": jax.__version__, "device": device.device_kind}, file, indent=1)


if __name__ == "__main__":
    main()
