"""Tensor names in safetensors files ↔ leaves of the parameter tree, for each family.

Kernels here are [in, out]; torch's Linear stores [out, in], GPT-2's Conv1D [in, out]. A fused query-key-value tensor becomes three leaves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.models.transformer import DecoderConfig

Tensors = tuple[np.ndarray, ...]
Path = tuple[str, ...]

PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}  # the others: "model."
CLASSES = {"gpt2": "GPT2", "gpt_neox": "GPTNeoX", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
SCORE = "score.weight"

# Buffers that old files carry: causal masks and rotary frequencies, which follow from the config.
_BUFFERS = re.compile(r"(attention|attn)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")


class Entry(NamedTuple):
    """One tensor of a file and the leaves it holds. `split` and `fuse` are inverse to each other."""

    name: str
    paths: tuple[Path, ...]
    split: Callable[[np.ndarray], Tensors]
    fuse: Callable[[Tensors], np.ndarray]


def prefix_of(config: DecoderConfig) -> str:
    return PREFIXES.get(config.family, "model.")


def lm_head_names(config: DecoderConfig) -> tuple[str, ...]:
    """The names of an untied lm head, the one to write first."""
    return ("embed_out.weight", "lm_head.weight") if config.family == "gpt_neox" else ("lm_head.weight",)


def is_ignored(name: str, config: DecoderConfig, head: str) -> bool:
    """Tensors that are rightly not read: buffers, and the heads that are not wanted."""
    unused = {SCORE} if head == "lm" else set(lm_head_names(config))
    if config.tied_head:
        unused |= set(lm_head_names(config))
    return name in unused or bool(_BUFFERS.search(name))


def plain(name: str, *path: str) -> Entry:
    return Entry(name, (path,), lambda tensor: (tensor,), lambda parts: parts[0])


def transposed(name: str, *path: str) -> Entry:
    return Entry(name, (path,), lambda tensor: (tensor.T,), lambda parts: parts[0].T)


def _layer_path(n: int, *path: str) -> Path:
    return ("backbone", f"layers_{n}", *path)


def _norms(n: int, ours: str, theirs: str, *, bias: bool) -> Iterator[Entry]:
    yield plain(f"{theirs}.weight", *_layer_path(n, *ours.split("/"), "scale"))
    if bias:
        yield plain(f"{theirs}.bias", *_layer_path(n, *ours.split("/"), "bias"))


def _linear(n: int, ours: str, theirs: str, *, bias: bool, weight: Callable[..., Entry] = transposed) -> Iterator[Entry]:
    yield weight(f"{theirs}.weight", *_layer_path(n, *ours.split("/"), "kernel"))
    if bias:
        yield plain(f"{theirs}.bias", *_layer_path(n, *ours.split("/"), "bias"))


def _fused(n: int, name: str, leaf: str, split: Callable[[np.ndarray], Tensors], fuse: Callable[[Tensors], np.ndarray]) -> Entry:
    return Entry(name, tuple(_layer_path(n, "attention", part, leaf) for part in "qkv"), split, fuse)


def _gpt2_layer(config: DecoderConfig, n: int) -> Iterator[Entry]:
    at = f"h.{n}"
    yield from _norms(n, "attention_norm", f"{at}.ln_1", bias=True)
    yield from _norms(n, "mlp_norm", f"{at}.ln_2", bias=True)
    for ours, theirs in (("kernel", "weight"), ("bias", "bias")):  # [d, 3d] and [3d]: q, k and v side by side
        yield _fused(
            n, f"{at}.attn.c_attn.{theirs}", ours, lambda t: tuple(np.split(t, 3, axis=-1)), lambda parts: np.concatenate(parts, axis=-1)
        )
    yield from _linear(n, "attention/out", f"{at}.attn.c_proj", bias=True, weight=plain)
    yield from _linear(n, "mlp/up", f"{at}.mlp.c_fc", bias=True, weight=plain)
    yield from _linear(n, "mlp/down", f"{at}.mlp.c_proj", bias=True, weight=plain)


def _neox_split(heads: int) -> Callable[[np.ndarray], Tensors]:
    """[3·H·D, …] → three [H·D, …]: rows are ordered head, then q/k/v, then dimension."""

    def split(tensor: np.ndarray) -> Tensors:
        rest = tensor.shape[1:]
        by_head = tensor.reshape(heads, 3, -1, *rest)
        return tuple(by_head[:, part].reshape(-1, *rest).T for part in range(3))

    return split


def _neox_fuse(heads: int) -> Callable[[Tensors], np.ndarray]:
    def fuse(parts: Tensors) -> np.ndarray:
        rows = [part.T.reshape(heads, -1, *part.T.shape[1:]) for part in parts]
        return np.stack(rows, axis=1).reshape(-1, *rows[0].shape[2:])

    return fuse


def _gpt_neox_layer(config: DecoderConfig, n: int) -> Iterator[Entry]:
    at, split, fuse = f"layers.{n}", _neox_split(config.num_heads), _neox_fuse(config.num_heads)
    yield from _norms(n, "attention_norm", f"{at}.input_layernorm", bias=True)
    yield from _norms(n, "mlp_norm", f"{at}.post_attention_layernorm", bias=True)
    yield _fused(n, f"{at}.attention.query_key_value.weight", "kernel", split, fuse)
    if config.qkv_bias:
        yield _fused(n, f"{at}.attention.query_key_value.bias", "bias", split, fuse)
    yield from _linear(n, "attention/out", f"{at}.attention.dense", bias=config.out_bias)
    yield from _linear(n, "mlp/up", f"{at}.mlp.dense_h_to_4h", bias=True)
    yield from _linear(n, "mlp/down", f"{at}.mlp.dense_4h_to_h", bias=True)


def _llama_layer(config: DecoderConfig, n: int) -> Iterator[Entry]:
    at = f"layers.{n}"
    yield from _norms(n, "attention_norm", f"{at}.input_layernorm", bias=False)
    yield from _norms(n, "mlp_norm", f"{at}.post_attention_layernorm", bias=False)
    for part in "qkv":
        yield from _linear(n, f"attention/{part}", f"{at}.self_attn.{part}_proj", bias=config.qkv_bias)
    yield from _linear(n, "attention/out", f"{at}.self_attn.o_proj", bias=config.out_bias)
    if config.qk_norm:
        yield from _norms(n, "attention/q_norm", f"{at}.self_attn.q_norm", bias=False)
        yield from _norms(n, "attention/k_norm", f"{at}.self_attn.k_norm", bias=False)
    for part in ("gate", "up", "down"):
        yield from _linear(n, f"mlp/{part}", f"{at}.mlp.{part}_proj", bias=config.mlp_bias)


def _backbone(config: DecoderConfig) -> Iterator[Entry]:
    if config.family == "gpt2":
        embed, final, layer = "wte", "ln_f", _gpt2_layer
        yield plain("wpe.weight", "backbone", "positions", "embedding")
    elif config.family == "gpt_neox":
        embed, final, layer = "embed_in", "final_layer_norm", _gpt_neox_layer
    else:
        embed, final, layer = "embed_tokens", "norm", _llama_layer
    yield plain(f"{embed}.weight", "backbone", "embed", "embedding")
    yield plain(f"{final}.weight", "backbone", "final_norm", "scale")
    if config.norm == "layernorm":
        yield plain(f"{final}.bias", "backbone", "final_norm", "bias")
    for n in range(config.num_layers):
        yield from layer(config, n)


def layout(config: DecoderConfig, head: str) -> list[Entry]:
    """Every tensor of a file, with the prefix of its family."""
    entries = [entry._replace(name=prefix_of(config) + entry.name) for entry in _backbone(config)]
    if head == "scalar":
        entries.append(transposed(SCORE, "head", "kernel"))
    elif not config.tied_head:
        entries.append(transposed(lm_head_names(config)[0], "head", "kernel"))
    return entries


def leaf(tree: Any, path: Path) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def put(tree: dict[str, Any], path: Path, value: np.ndarray) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value
