"""Tensor names in safetensors files ↔ leaves of the parameter tree, for each family.

Kernels here are [in, out]; torch's Linear stores [out, in], GPT-2's Conv1D [in, out]. A fused query-key-value tensor becomes three leaves.
Any slice of a leaf is read by the slices of the file's tensor that it consists of, so that a device reads its own part and nothing else.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.models.transformer import DecoderConfig

Tensors = tuple[np.ndarray, ...]
Path = tuple[str, ...]
Shape = tuple[int, ...]
Index = tuple[slice, ...]  # one slice with bounds an axis
Get = Callable[[Index], np.ndarray]  # a slice of one tensor as it lies in its file

PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}  # the others: "model."
CLASSES = {"gpt2": "GPT2", "gpt_neox": "GPTNeoX", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
SCORE = "score.weight"
EMBEDDING: Path = ("backbone", "embed", "embedding")

# Buffers that old files carry: causal masks and rotary frequencies, which follow from the config.
_BUFFERS = re.compile(r"(attention|attn)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
# What torch.compile, DataParallel and its kin put into the names of what they wrap.
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+|_orig_mod\.")
_BLOCK = 64


class Entry(NamedTuple):
    """One tensor of a file and the leaves it holds. What `fuse` makes of whole leaves, `read` takes apart again."""

    name: str
    paths: tuple[Path, ...]
    shape: Callable[[list[Shape]], Shape]  # of the tensor, from the shapes of its leaves
    read: Callable[[Get, int, Index], np.ndarray]  # slice `index` of leaf `paths[part]`; each element is asked for once
    fuse: Callable[[Tensors], np.ndarray]


def plain_name(name: str) -> str:
    """The name of a tensor without what wrappers of its module put there."""
    return _WRAPPERS.sub("", name)


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
    return Entry(name, (path,), lambda shapes: shapes[0], lambda get, _, index: get(index), lambda parts: parts[0])


def transposed(name: str, *path: str) -> Entry:
    return Entry(
        name, (path,), lambda shapes: shapes[0][::-1], lambda get, _, index: turned(get(index[::-1])), lambda parts: turned(parts[0])
    )


def turned(rows: np.ndarray) -> np.ndarray:
    """A contiguous transpose. In blocks of rows, because numpy's own walk over a large matrix misses the cache at every step."""
    out = np.empty(rows.shape[::-1], rows.dtype)
    for start in range(0, rows.shape[0], _BLOCK):
        out[..., start : start + _BLOCK] = rows[start : start + _BLOCK].T
    return out


def _layer_path(n: int, *path: str) -> Path:
    return ("backbone", f"layers_{n}", *path)


def _module(
    n: int, ours: str, theirs: str, *, bias: bool, leaf: str = "kernel", weight: Callable[..., Entry] = transposed
) -> Iterator[Entry]:
    """Weight and bias of one linear map of layer n."""
    yield weight(f"{theirs}.weight", *_layer_path(n, *ours.split("/"), leaf))
    if bias:
        yield plain(f"{theirs}.bias", *_layer_path(n, *ours.split("/"), "bias"))


def _norm(n: int, ours: str, theirs: str, *, bias: bool) -> Iterator[Entry]:
    return _module(n, ours, theirs, bias=bias, leaf="scale", weight=plain)


def _qkv(n: int, leaf: str) -> tuple[Path, ...]:
    return tuple(_layer_path(n, "attention", part, leaf) for part in "qkv")


def _side_by_side(name: str, paths: tuple[Path, ...], width: int) -> Entry:
    """GPT-2's fused tensor, [d, 3·width] or [3·width]: the columns of q, of k and of v."""

    def read(get: Get, part: int, index: Index) -> np.ndarray:
        *rows, columns = index
        return get((*rows, slice(part * width + columns.start, part * width + columns.stop)))

    return Entry(
        name,
        paths,
        lambda shapes: (*shapes[0][:-1], sum(shape[-1] for shape in shapes)),
        read,
        lambda parts: np.concatenate(parts, axis=-1),
    )


def _by_head(name: str, paths: tuple[Path, ...], size: int) -> Entry:
    """GPT-NeoX's fused tensor, [3·H·D, d] or [3·H·D]: rows are ordered head, then q, k, v, then the D = `size` dimensions of the head.

    Of every head a slice of a leaf [d, H·D] is one block of rows in the file.
    """

    def read(get: Get, part: int, index: Index) -> np.ndarray:
        *rest, columns = index
        out = np.empty([axis.stop - axis.start for axis in index], np.float32)
        start = columns.start
        while start < columns.stop:
            head = start // size
            stop = min((head + 1) * size, columns.stop)
            shift = (2 * head + part) * size  # from column head·D + k of a leaf to row (3·head + part)·D + k of the file
            out[..., start - columns.start : stop - columns.start] = get((slice(start + shift, stop + shift), *rest)).T
            start = stop
        return out

    def fuse(parts: Tensors) -> np.ndarray:
        heads, rest = parts[0].shape[-1] // size, parts[0].shape[:-1]
        out = np.empty((heads, 3, size, *rest), parts[0].dtype)
        for head in range(heads):
            for part, leaf in enumerate(parts):
                out[head, part] = leaf[..., head * size : (head + 1) * size].T
        return out.reshape(-1, *rest)

    return Entry(name, paths, lambda shapes: (sum(shape[-1] for shape in shapes), *shapes[0][:-1]), read, fuse)


def _gpt2_layer(config: DecoderConfig, n: int) -> Iterator[Entry]:
    at = f"h.{n}"
    yield from _norm(n, "attention_norm", f"{at}.ln_1", bias=True)
    yield from _norm(n, "mlp_norm", f"{at}.ln_2", bias=True)
    for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
        yield _side_by_side(f"{at}.attn.c_attn.{theirs}", _qkv(n, ours), config.num_heads * config.head_dim)
    yield from _module(n, "attention/out", f"{at}.attn.c_proj", bias=True, weight=plain)
    yield from _module(n, "mlp/up", f"{at}.mlp.c_fc", bias=True, weight=plain)
    yield from _module(n, "mlp/down", f"{at}.mlp.c_proj", bias=True, weight=plain)


def _gpt_neox_layer(config: DecoderConfig, n: int) -> Iterator[Entry]:
    at = f"layers.{n}"
    yield from _norm(n, "attention_norm", f"{at}.input_layernorm", bias=True)
    yield from _norm(n, "mlp_norm", f"{at}.post_attention_layernorm", bias=True)
    yield _by_head(f"{at}.attention.query_key_value.weight", _qkv(n, "kernel"), config.head_dim)
    if config.qkv_bias:
        yield _by_head(f"{at}.attention.query_key_value.bias", _qkv(n, "bias"), config.head_dim)
    yield from _module(n, "attention/out", f"{at}.attention.dense", bias=config.out_bias)
    yield from _module(n, "mlp/up", f"{at}.mlp.dense_h_to_4h", bias=True)
    yield from _module(n, "mlp/down", f"{at}.mlp.dense_4h_to_h", bias=True)


def _llama_layer(config: DecoderConfig, n: int) -> Iterator[Entry]:
    at = f"layers.{n}"
    yield from _norm(n, "attention_norm", f"{at}.input_layernorm", bias=False)
    yield from _norm(n, "mlp_norm", f"{at}.post_attention_layernorm", bias=False)
    for part in "qkv":
        yield from _module(n, f"attention/{part}", f"{at}.self_attn.{part}_proj", bias=config.qkv_bias)
    yield from _module(n, "attention/out", f"{at}.self_attn.o_proj", bias=config.out_bias)
    if config.qk_norm:
        yield from _norm(n, "attention/q_norm", f"{at}.self_attn.q_norm", bias=False)
        yield from _norm(n, "attention/k_norm", f"{at}.self_attn.k_norm", bias=False)
    for part in ("gate", "up", "down"):
        yield from _module(n, f"mlp/{part}", f"{at}.mlp.{part}_proj", bias=config.mlp_bias)


def _backbone(config: DecoderConfig) -> Iterator[Entry]:
    if config.family == "gpt2":
        embed, final, layer = "wte", "ln_f", _gpt2_layer
        yield plain("wpe.weight", "backbone", "positions", "embedding")
    elif config.family == "gpt_neox":
        embed, final, layer = "embed_in", "final_layer_norm", _gpt_neox_layer
    else:
        embed, final, layer = "embed_tokens", "norm", _llama_layer
    yield plain(f"{embed}.weight", *EMBEDDING)
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
