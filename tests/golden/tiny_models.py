"""Tiny models of every family, their weights regenerated from tensor names: what `make_models.py` and the tests share. No torch here."""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).with_name("models.json")
PAD, EOS = 0, 1
_LLAMA = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
_NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_act": "gelu",
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
_LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}

# config.json as files on the hub spell it, old and new.
VARIANTS = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 29,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "activation_function": "gelu_new",
        "pad_token_id": PAD,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
    },
    "gpt_neox-old-spelling": {**_NEOX, "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True},
    "gpt_neox-sequential": {
        **_NEOX,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        "use_parallel_residual": False,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": False,
    },
    "llama": {"model_type": "llama", **_LLAMA, "rope_theta": 5000.0, "rope_scaling": None},
    "llama-3.1-rope": {
        "model_type": "llama",
        **_LLAMA,
        "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "llama3", **_LLAMA3_ROPE},
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "llama-linear-rope": {
        "model_type": "llama",
        **_LLAMA,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    },
    "mistral-window": {"model_type": "mistral", **_LLAMA, "head_dim": 8, "sliding_window": 3, "rope_theta": 10000.0},
    "qwen2": {"model_type": "qwen2", **_LLAMA, "tie_word_embeddings": True, "rope_theta": 1000000.0, "use_sliding_window": False},
    "qwen2-window": {
        "model_type": "qwen2",
        **_LLAMA,
        "rope_theta": 10000.0,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
}

# Ragged rows without PAD or EOS inside, so that every implementation finds their ends.
ROWS = [[5, 17, 2, 9, 28, 3, 11, 20], [7, 7, 23], [14, 4, 26, 10, 2]]


def padded(side):
    """ROWS with padding on one side: int32 tokens and a boolean mask, [3, 8]."""
    width = max(map(len, ROWS))
    tokens, mask = np.full((len(ROWS), width), PAD, np.int32), np.zeros((len(ROWS), width), bool)
    for row, ids in enumerate(ROWS):
        where = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
        tokens[row, where], mask[row, where] = ids, True
    return tokens, mask


def tensor(name, shape):
    """The weights of one tensor, from its name: norms about 1, everything else wide enough to make errors visible."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    is_norm = name.endswith("weight") and ("norm" in name or ".ln_" in name)
    return 1 + 0.2 * noise if is_norm else 0.25 * noise


def write_folder(folder, config, shapes, *, architecture=None):
    """A Hugging Face folder with the regenerated weights of `shapes` (name → shape)."""
    folder.mkdir(parents=True, exist_ok=True)
    extra = {"architectures": [architecture], "num_labels": 1} if architecture else {}
    (folder / "config.json").write_text(json.dumps({**config, **extra}))
    save_file({name: tensor(name, shape) for name, shape in shapes.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
