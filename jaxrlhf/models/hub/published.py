"""Published shapes of base models, by hub id: enough to plan a run without fetching anything.

Each entry has the published sizes and wiring, from which memory and work follow; tests hold the parameter counts against the published
ones. What neither depends on (rope scaling, the longest context) is left out or taken from the family.
"""

from typing import Any

from jaxrlhf.models.families import config_from_hf
from jaxrlhf.models.transformer import DecoderConfig

_NEOX = {"model_type": "gpt_neox", "max_position_embeddings": 2048, "rotary_pct": 0.25, "use_parallel_residual": True, "eos_token_id": 0}
_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "eos_token_id": 50256}
_QWEN2 = {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "eos_token_id": 151643}
_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 5e5, "eos_token_id": 128001}
_MISTRAL = {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": None, "rms_norm_eps": 1e-5, "eos_token_id": 2}


def _neox(width: int, layers: int, heads: int, vocab_size: int = 50304) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * width}
    return _NEOX | sizes | {"vocab_size": vocab_size}


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return _GPT2 | {"n_embd": width, "n_layer": layers, "n_head": heads}


def _grouped(base: dict[str, Any], width: int, layers: int, heads: int, kv_heads: int, inner: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return base | sizes | {"intermediate_size": inner} | more


_LLAMA31_8B = _grouped(_LLAMA3, 4096, 32, 32, 8, 14336)
_LLAMA3_NAMES = ("Meta-Llama-3", "Meta-Llama-3.1", "Llama-3.1")
_QWEN25 = {
    "0.5B": _grouped(_QWEN2, 896, 24, 14, 2, 4864, vocab_size=151936, tie_word_embeddings=True),
    "1.5B": _grouped(_QWEN2, 1536, 28, 12, 2, 8960, vocab_size=151936, tie_word_embeddings=True),
    "3B": _grouped(_QWEN2, 2048, 36, 16, 2, 11008, vocab_size=151936, tie_word_embeddings=True),
    "7B": _grouped(_QWEN2, 3584, 28, 28, 4, 18944, vocab_size=152064, tie_word_embeddings=False),
}
_LLAMA32 = {
    "1B": _grouped(_LLAMA3, 2048, 16, 32, 8, 8192, head_dim=64, tie_word_embeddings=True),
    "3B": _grouped(_LLAMA3, 3072, 28, 24, 8, 8192, head_dim=128, tie_word_embeddings=True),
}
_PYTHIA = {
    "70m": _neox(512, 6, 8),
    "160m": _neox(768, 12, 12),
    "410m": _neox(1024, 24, 16),
    "1b": _neox(2048, 16, 8),
    "1.4b": _neox(2048, 24, 16),
    "2.8b": _neox(2560, 32, 32),
    "6.9b": _neox(4096, 32, 32, 50432),
    "12b": _neox(5120, 36, 40, 50688),
}

KNOWN: dict[str, dict[str, Any]] = {
    **{f"EleutherAI/pythia-{size}{kind}": hf for size, hf in _PYTHIA.items() for kind in ("", "-deduped")},
    "distilbert/distilgpt2": _gpt2(768, 6, 12),
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
    "openai-community/gpt2-large": _gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
    **{f"Qwen/Qwen2.5-{size}{kind}": hf for size, hf in _QWEN25.items() for kind in ("", "-Instruct")},
    **{f"meta-llama/Llama-3.2-{size}{kind}": hf for size, hf in _LLAMA32.items() for kind in ("", "-Instruct")},
    **{f"meta-llama/{name}-8B{kind}": _LLAMA31_8B for name in _LLAMA3_NAMES for kind in ("", "-Instruct")},
    "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2": _LLAMA31_8B,
    "mistralai/Mistral-7B-v0.1": _grouped(_MISTRAL, 4096, 32, 32, 8, 14336, vocab_size=32000),
    "mistralai/Mistral-7B-v0.3": _grouped(_MISTRAL, 4096, 32, 32, 8, 14336, vocab_size=32768),
}  # fmt: skip
_OLD_NAMES = {"distilgpt2": "distilbert/distilgpt2", **{f"gpt2{s}": f"openai-community/gpt2{s}" for s in ("", "-medium", "-large", "-xl")}}


def known_shape(source: str) -> DecoderConfig | None:
    """The decoder of a hub id whose shape stands here, else None."""
    hf = KNOWN.get(_OLD_NAMES.get(source, source))
    return None if hf is None else config_from_hf(hf)
