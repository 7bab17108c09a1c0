"""What does each knob of memory save, in the compiled SFT step and PPO update, and what does it cost in time?

    python benchmarks/memory.py [--width 512] [--layers 8] [--json FILE]

Nothing of the mid-size model runs: its steps are compiled, and XLA says what they need (`memory_analysis`): arguments (parameters, moments,
batch), of which the new state takes the place of the old one, and temporaries (gradients, activations, logits). The CPU's compiler drops
the barriers that keep a recomputation apart from what it repeats, and with them everything that rematerialisation saves; it is told to
keep them, as compilers for accelerators do. Step times are of a small model that runs, with and without each knob, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms.policy_updates import ppo_trainer
from jaxrlhf.algorithms.training import optimizer_of
from jaxrlhf.config import PPOConfig, SFTConfig
from jaxrlhf.models.families import config_from_shape
from jaxrlhf.models.lora import adapters
from jaxrlhf.models.model import build_model
from jaxrlhf.plugins import plugin
from jaxrlhf.steps.sft import make_sft_step
from jaxrlhf.steps.state import init_state
from jaxrlhf.types import Rollout, TextBatch

KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
PLAIN = {"remat": "none", "logits_chunk": None, "accumulate": 1, "r": 0}
CASES = [
    PLAIN,
    *({**PLAIN, "remat": remat} for remat in ("dots", "full")),
    *({**PLAIN, "remat": "full", "logits_chunk": chunk} for chunk in (64, 8)),
    *({**PLAIN, "accumulate": k} for k in (2, 4)),
    {**PLAIN, "r": 8},
    {"remat": "full", "logits_chunk": 8, "accumulate": 4, "r": 8},
]


def text_batch(B: int, L: int, T: int) -> TextBatch:
    rows = np.ones(B, bool), np.arange(B, dtype=np.int32)
    return TextBatch(np.full((B, L), 3, np.int32), np.ones((B, L), bool), np.full((B, T), 4, np.int32), np.ones((B, T), bool), *rows)  # type: ignore[arg-type]


def rollout(B: int, L: int, T: int) -> Rollout:
    flat: Any = np.full((B, T), -1.0, np.float32)
    ones: Any = np.ones((B, T), bool)
    text = text_batch(B, L, T)
    return Rollout(
        text.prompt_BL, text.prompt_mask_BL, text.response_BT, ones, ones, flat, flat, flat, flat, flat, flat[:, 0], text.row_mask_B
    )


def sft_step(decoder: Any, case: dict, sizes: tuple[int, int, int]):
    """(step, its arguments as functions of nothing): an SFT step has no adapters."""
    model = build_model(decoder, remat=case["remat"], logits_chunk=case["logits_chunk"])
    optimizer = optimizer_of(SFTConfig(), steps=10)
    step = make_sft_step(model, optimizer, accumulate=case["accumulate"])
    return jax.jit(step, donate_argnums=0), lambda: (init_state(model.init(jax.random.key(0)), optimizer), text_batch(*sizes))


def ppo_update(decoder: Any, case: dict, sizes: tuple[int, int, int]):
    """One epoch of one minibatch; policy and critic, with or without adapters on the policy."""
    how = {"remat": case["remat"], "logits_chunk": case["logits_chunk"]}
    policy, scalar = build_model(decoder, **how), build_model(decoder, head="scalar", **how)
    B, _, T = sizes
    config = PPOConfig(
        batch_size=B, total_episodes=10 * B, num_ppo_epochs=1, response_length=T, gradient_accumulation_steps=case["accumulate"]
    )
    trainer = ppo_trainer(policy, scalar, config, plugin, eos_ids=(), pad_id=0, vocab_size=None)

    def arguments():
        params, critic, rest = policy.init(jax.random.key(0)), scalar.init(jax.random.key(1)), ()
        if case["r"]:
            params, base = adapters(params, jax.random.key(2), r=case["r"], alpha=16.0)
            rest = ({"policy": base},)
        controller = {"kl_coef": jnp.float32(0.05), "value_bias": jnp.float32(0.0)}
        return init_state({"policy": params, "critic": critic}, trainer.optimizer, controller), rollout(*sizes), jax.random.key(3), *rest

    return trainer.update, arguments


def analysed(step: Any, arguments: Any) -> dict[str, float]:
    """MiB of a compiled step."""
    compiled = step.lower(*jax.eval_shape(arguments)).compile(compiler_options=KEEP_BARRIERS)
    found = compiled.memory_analysis()
    sizes = {"arguments": found.argument_size_in_bytes, "temporary": found.temp_size_in_bytes, "aliased": found.alias_size_in_bytes}
    sizes["all"] = sizes["arguments"] + sizes["temporary"] + found.output_size_in_bytes - sizes["aliased"]
    return {name: size / 2**20 for name, size in sizes.items()}


def times(decoder: Any, sizes: tuple[int, int, int], repeats: int) -> list[tuple[dict, float]]:
    """Median seconds of a PPO update for every case, taken in turns."""
    running = []
    for case in CASES:
        step, arguments = ppo_update(decoder, case, sizes)
        given = jax.device_put(arguments())
        step = step.lower(*given).compile(compiler_options=KEEP_BARRIERS)
        running.append((case, step, list(given), []))
    for _ in range(repeats + 1):
        for _, step, given, seconds in running:
            start = time.perf_counter()
            given[0], _ = jax.block_until_ready(step(*given))
            seconds.append(time.perf_counter() - start)
    return [(case, statistics.median(seconds[1:])) for case, _, _, seconds in running]


def shown(case: dict) -> str:
    lora = f"LoRA r={case['r']}" if case["r"] else "–"
    return f"| {case['remat']} | {case['logits_chunk'] or 'by size'} | {case['accumulate']} | {lora} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "width": 512,
        "layers": 8,
        "vocabulary": 16_384,
        "batch": 16,
        "prompt": 128,
        "response": 128,
        "repeats": 7,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", help="write the figures here too")
    given = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} {device.device_kind}; MiB by XLA's memory_analysis")

    def decoder(width: int, layers: int, vocabulary: int) -> Any:
        return config_from_shape(
            {"family": "gpt_neox", "hidden_size": width, "num_layers": layers, "num_heads": width // 64}, vocabulary, max_positions=2048
        )[0]

    mid, sizes = decoder(given.width, given.layers, given.vocabulary), (given.batch, given.prompt, given.response)
    print(f"hidden {given.width}, {given.layers} layers, vocabulary {given.vocabulary}, batch × prompt × response {sizes}, float32")
    print("| step | remat | logits_chunk | accumulate | adapters | arguments | temporary | in all |\n|---|---|---|---|---|---|---|---|")
    rows = []
    for what, make in {"SFT": sft_step, "PPO update": ppo_update}.items():
        for case in CASES:
            if what == "SFT" and case["r"]:
                continue
            found = analysed(*make(mid, case, sizes))
            rows.append({"step": what, **case, **found})
            print(f"| {what} {shown(case)} {found['arguments']:.0f} | {found['temporary']:.0f} | {found['all']:.0f} |", flush=True)
    small = (8, 64, 64)
    print(f"\nPPO update that runs: hidden 128, 2 layers, vocabulary 1024, {small}; seconds by the median of {given.repeats}, in turns")
    print("| remat | logits_chunk | accumulate | adapters | ms | of the plain one |\n|---|---|---|---|---|---|")
    measured = times(decoder(128, 2, 1024), small, given.repeats)
    for case, seconds in measured:
        print(f"{shown(case)} {1e3 * seconds:.1f} | {seconds / measured[0][1]:.2f} |")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"memory": rows, "seconds": measured, "jax": jax.__version__, "device": device.device_kind}, file, indent=1)


if __name__ == "__main__":
    main()
