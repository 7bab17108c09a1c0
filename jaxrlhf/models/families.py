"""config.json of each family ↔ `DecoderConfig`, in the old spelling and the new."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxrlhf.models.rope import RopeScaling
from jaxrlhf.models.settings import Hf, check_only, check_values
from jaxrlhf.models.transformer import DecoderConfig

ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}

# Settings that may have one value, whatever the family.
ONLY: dict[str, Any] = {"add_cross_attention": False, "is_encoder_decoder": False}
ONLY_DECODERS = ONLY | {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
# Keys of transformers' config classes that change nothing here, and why. Their other keys are read or must have one value: a test holds
# every key of every supported class to that.
IGNORED: dict[str, tuple[str, ...]] = {
    "nothing is dropped out here": (
        *("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout", "attention_dropout", "hidden_dropout", "classifier_dropout"),
        *("attention_probs_dropout_prob", "hidden_dropout_prob"),
    ),
    "how torch computes the same": ("chunk_size_feed_forward", "dtype", "pretraining_tp", "reorder_and_upcast_attn", "use_cache"),
    "what a call returns": ("output_attentions", "output_hidden_states", "return_dict"),
    "heads of other tasks": ("problem_type", "summary_activation", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    "the files say it, or the shape of the head": ("architectures", "id2label", "label2id"),
    "where a text ends is read where text is (hub/loaded.py)": ("bos_token_id", "eos_token_id", "pad_token_id"),
    "of encoders: they are neither trained nor have a language-model head": ("initializer_range", "tie_word_embeddings"),
    "GPT-NeoX is a decoder whatever it says; encoders must say they are none": ("is_decoder",),
    "names": ("_name_or_path", "transformers_version"),
}


def _rotary(hf: Hf, head_dim: int, *, fraction: float | None = None) -> dict[str, Any]:
    """`rotary_dim`, `rope_theta` and `rope_scaling` from `rope_parameters` (transformers 5), or `rope_theta`/`rotary_emb_base`,
    `rotary_pct`/`partial_rotary_factor` and `rope_scaling` (before). `fraction` of a head is rotated where nothing is stated; None: this
    family rotates whole heads."""
    stated: Hf = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in stated.values()):
        raise ValueError(f"rope_parameters {dict(stated)} differ from layer to layer, which no supported family does.")

    def first(*names: str, default: float) -> float:
        found = [source[name] for source in (stated, hf) for name in names if source.get(name) is not None]
        return float(found[0]) if found else default

    rotated = first("partial_rotary_factor", "rotary_pct", default=fraction or 1.0)
    if fraction is None and rotated != 1.0:
        raise ValueError(
            f"partial_rotary_factor {rotated} in the config of a {hf.get('model_type')}: transformers rotates whole heads of this family, "
            "whatever it says; take it out if the model was trained so."
        )
    rotary = {"rope_theta": first("rope_theta", "rotary_emb_base", default=10_000.0), "rotary_dim": int(head_dim * rotated)}
    kind = stated.get("rope_type") or stated.get("type") or "default"
    if kind == "default":
        return rotary
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rope type {kind!r} is not supported; supported are default, linear and llama3.")
    scaling = RopeScaling(kind, float(stated["factor"]))
    if kind == "llama3":
        original = stated.get("original_max_position_embeddings") or hf["max_position_embeddings"]
        bands = float(stated["low_freq_factor"]), float(stated["high_freq_factor"])
        scaling = RopeScaling("llama3", float(stated["factor"]), *bands, int(original))
    return rotary | {"rope_scaling": scaling}


def read_activation(name: str) -> str:
    if name not in ACTIVATION_NAMES:
        raise ValueError(f"activation {name!r} is not supported; supported are {sorted(ACTIVATION_NAMES)}.")
    return ACTIVATION_NAMES[name]


def _gpt2(hf: Hf) -> dict[str, Any]:
    width, heads = hf.get("n_embd", 768), hf.get("n_head", 12)
    return {
        "vocab_size": hf.get("vocab_size", 50257),
        "hidden_size": width,
        "num_layers": hf.get("n_layer", 12),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "intermediate_size": hf.get("n_inner") or 4 * width,
        "max_positions": hf.get("n_positions", 1024),
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "activation": read_activation(hf.get("activation_function", "gelu_new")),
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tied_head": hf.get("tie_word_embeddings", True),
    }


def _gpt_neox(hf: Hf) -> dict[str, Any]:
    width, heads = hf.get("hidden_size", 6144), hf.get("num_attention_heads", 64)
    bias = hf.get("attention_bias", True)
    return {
        "vocab_size": hf.get("vocab_size", 50432),
        "hidden_size": width,
        "num_layers": hf.get("num_hidden_layers", 44),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "intermediate_size": hf.get("intermediate_size", 24576),
        "max_positions": hf.get("max_position_embeddings", 2048),
        "norm_eps": hf.get("layer_norm_eps", 1e-5),
        **_rotary(hf, width // heads, fraction=0.25),
        "parallel_residual": hf.get("use_parallel_residual", True),
        "activation": read_activation(hf.get("hidden_act", "gelu")),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": True,
        "tied_head": hf.get("tie_word_embeddings", False),
    }


def _llama_like(hf: Hf, *, usual_head_dim: int | None = None, **wiring: Any) -> dict[str, Any]:
    """What Llama, Mistral and Qwen have in common; sizes are required, defaults would be another model's."""
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or usual_head_dim or hf["hidden_size"] // heads
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "intermediate_size": hf["intermediate_size"],
        "max_positions": hf["max_position_embeddings"],
        "norm": "rmsnorm",
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        **_rotary(hf, head_dim),
        "activation": read_activation(hf.get("hidden_act", "silu")),
        "gated_mlp": True,
        "tied_head": hf.get("tie_word_embeddings", False),
        **wiring,
    }


def _llama(hf: Hf) -> dict[str, Any]:
    bias = hf.get("attention_bias", False)
    return _llama_like(hf, qkv_bias=bias, out_bias=bias, mlp_bias=hf.get("mlp_bias", False))


def _mistral(hf: Hf) -> dict[str, Any]:
    window = hf.get("sliding_window", 4096)
    layers = tuple(range(hf["num_hidden_layers"])) if window else ()
    return _llama_like(hf, sliding_window=window or None, sliding_layers=layers)


def _qwen_sliding(hf: Hf) -> dict[str, Any]:
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    if not window:
        return {}
    count, full = hf["num_hidden_layers"], hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or ["sliding_attention" if n >= full else "full_attention" for n in range(count)]
    return {"sliding_window": window, "sliding_layers": tuple(n for n, kind in enumerate(kinds) if kind == "sliding_attention")}


def _qwen2(hf: Hf) -> dict[str, Any]:
    return _llama_like(hf, qkv_bias=True, **_qwen_sliding(hf))


def _qwen3(hf: Hf) -> dict[str, Any]:
    bias = hf.get("attention_bias", False)
    return _llama_like(hf, usual_head_dim=128, qk_norm=True, qkv_bias=bias, out_bias=bias, **_qwen_sliding(hf))


FAMILIES: dict[str, Callable[[Hf], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def config_from_hf(hf: Hf, generation: Hf | None = None) -> DecoderConfig:
    """The decoder that a config.json describes. ValueError on a family or a setting this package does not compute."""
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported; supported are {sorted(FAMILIES)}.")
    for stated in (hf, generation or {}):
        check_values(stated)
    check_only(hf, ONLY_DECODERS)
    if hf.get("quantization_config"):
        raise ValueError("this folder holds quantised weights (quantization_config); load the unquantised ones.")
    std = hf.get("initializer_range", 0.02)
    return DecoderConfig(family=family, initializer_range=std, hf=dict(hf), generation=dict(generation or {}), **FAMILIES[family](hf))


def config_from_shape(
    shape: Mapping[str, Any],
    vocab_size: int,
    *,
    max_positions: int,
    pad_id: int | None = None,
    bos_id: int | None = None,
    eos_id: int | list[int] | None = None,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """A model from scratch: the decoder, and the config.json that describes it.

    `shape` has family, hidden_size, num_layers, num_heads and optionally num_kv_heads (default num_heads) and intermediate_size
    (default 4 widths; gated families 8/3 widths, rounded up to a multiple of 8). GPT-NeoX rotates the smallest of 1/4, 1/2 and all
    of a head that is even.
    """
    family, width, heads = shape["family"], shape["hidden_size"], shape["num_heads"]
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not supported; supported are {sorted(FAMILIES)}.")
    if width % heads:
        raise ValueError(f"hidden_size {width} does not divide over {heads} heads; make it a multiple.")
    kv_heads = shape.get("num_kv_heads") or heads
    gated = family not in ("gpt2", "gpt_neox")
    if not gated and kv_heads != heads:
        raise ValueError(f"{family} has no grouped key-value heads: num_kv_heads {kv_heads} must be {heads}, or left out.")
    inner = shape.get("intermediate_size") or (-(-width // 3) * 8 if gated else 4 * width)
    ids = {"pad_token_id": pad_id, "bos_token_id": bos_id, "eos_token_id": eos_id}
    hf: dict[str, Any] = {"model_type": family, "vocab_size": vocab_size, "initializer_range": 0.02, "dtype": "float32", **ids}
    if family == "gpt2":
        sizes = {"n_embd": width, "n_layer": shape["num_layers"], "n_head": heads, "n_inner": inner, "n_positions": max_positions}
        hf |= {**sizes, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
    else:
        hf |= {"hidden_size": width, "num_hidden_layers": shape["num_layers"], "num_attention_heads": heads, "intermediate_size": inner}
        hf |= {"max_position_embeddings": max_positions, "tie_word_embeddings": False}
    if family == "gpt_neox":
        head = width // heads
        fraction = next((f for f in (0.25, 0.5, 1.0) if int(head * f) >= 2 and int(head * f) % 2 == 0), 1.0)
        hf |= {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True}
        hf |= {"rotary_pct": fraction, "rotary_emb_base": 10_000}
    elif gated:
        hf |= {"hidden_act": "silu", "rms_norm_eps": 1e-6, "num_key_value_heads": kv_heads, "rope_theta": 10_000.0}
        hf |= {"head_dim": width // heads} if family != "qwen2" else {}
        hf |= {"sliding_window": None} if family == "mistral" else {}
    return config_from_hf(hf), hf
