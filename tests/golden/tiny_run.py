"""The config of a run of seconds, which tests change and the golden of what stages write is made by."""

from typing import Any

# A run of seconds: the toy task, a model of one layer, a few steps of everything.
TINY: dict[str, Any] = {
    "name": "tiny",
    "rounds": 2,
    "method": "ppo",
    "data": {"num_demonstrations": 96, "num_prompts": 48, "limits": {"max_prompt_length": 17, "max_response_length": 8}},
    "model": {"shape": {"family": "llama", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}},
    "pairs": {"source": "sample", "num_pairs": 40, "num_valid": 20, "batch_size": 32},
    "gold": {"kind": "toy"},
    "sft": {"batch_size": 32, "learning_rate": 1e-2, "lr_scheduler_type": "constant"},
    "reward": {"batch_size": 32, "learning_rate": 1e-3, "num_reference_rows": 32, "eval_batch_size": 32},
    "ppo": {
        "total_episodes": 48, "batch_size": 16, "num_ppo_epochs": 1, "response_length": 8, "temperature": 1.0, "learning_rate": 3e-3,
        "missing_eos_score": -1.0,
    },
    "weights": {"alpha": 0.0, "eta": "ess", "ess_target": 0.5, "batch_size": 32},
    "evaluation": {"num_prompts": 20, "batch_size": 32},
    "log": {"tensorboard": False},
}  # fmt: skip
