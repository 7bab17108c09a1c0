"""How far are the activations that `jaxrlhf plan` counts from those that the compiler plans?

    python benchmarks/plan_formulas.py [--step sft|reward|update]

Steps of SFT (three layers), of reward models and of PPO (two layers) in three families, each with every `model.remat` and in both dtypes,
compiled for a CPU and not run. Compared is the memory beside arguments and results, gradients included, as it is: bfloat16 is computed in
float32 on a CPU, and the formulas count what is held then. FLOPs beside it.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax

# (shape, prompt, response, rows, vocabulary)
SHAPES: dict[str, tuple[dict[str, Any], int, int, int, int]] = {
    "gpt_neox": ({"hidden_size": 256, "num_heads": 4}, 192, 64, 8, 2048),
    "llama": ({"hidden_size": 384, "num_heads": 6, "num_kv_heads": 2, "intermediate_size": 1024}, 256, 128, 4, 4096),
    "gpt2": ({"hidden_size": 512, "num_heads": 8}, 160, 160, 4, 1024),
}
STEPS = {"sft": 3, "reward": 2, "update": 2}  # layers


def phase_of(step: str, family: str, remat: str, dtype: str) -> Any:
    from jaxrlhf.plan.counts import counts_of
    from jaxrlhf.plan.models import planned_models
    from jaxrlhf.plan.phases import policy_phases
    from jaxrlhf.plan.planner import Planner
    from jaxrlhf.plan.training import reward_phases, sft_phase
    from jaxrlhf.recipe import from_mapping

    shape, L, T, rows, vocabulary = SHAPES[family]
    section = {"batch_size": rows, "max_steps": 2}
    config = from_mapping({
        "name": "sizes", "method": "ppo", "rounds": 1,
        "data": {"train": "rows.jsonl", "limits": {"max_prompt_length": L, "max_response_length": T}},
        "tokenizer": {"vocab_size": vocabulary},
        "model": {"shape": {"family": family, "num_layers": STEPS[step], **shape}, "remat": remat, "dtype": dtype},
        "sft": {**section, "loss_on": "all"}, "reward": section,
        "ppo": {"total_episodes": rows, "batch_size": rows, "response_length": T, "num_ppo_epochs": 1, "old_logp": "sampler"},
    })  # fmt: skip
    planner = Planner(config, planned_models(config, uses_encoder=False), counts_of(config), None)
    if step == "sft":
        return sft_phase(planner)
    phases = reward_phases(planner, 1) if step == "reward" else policy_phases(planner)
    return next(one for one in phases if one.name in ("step", "update"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=STEPS, help="one kind of step alone")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_platforms", "cpu")
    from jaxrlhf.plan.compile import compiled
    from jaxrlhf.plan.formulas import counted

    print(
        f"{'step':7} {'family':9} {'remat':6} {'dtype':9} {'compiled MB':>11} {'counted MB':>11} {'counted/compiled':>17} {'FLOPs':>7}",
        flush=True,
    )
    for step in [options.step] if options.step else STEPS:
        for family in SHAPES:
            for remat in ("none", "dots", "full"):
                for dtype in ("float32", "bfloat16"):
                    phase = phase_of(step, family, remat, dtype)
                    formula, program = counted(phase, None), compiled(phase, None)
                    sizes = f"{program.temp / 1e6:11.1f} {formula.temp / 1e6:11.1f} {formula.temp / program.temp:17.3f}"
                    print(f"{step:7} {family:9} {remat:6} {dtype:9} {sizes} {formula.flops / program.flops:7.4f}", flush=True)


if __name__ == "__main__":
    main()
