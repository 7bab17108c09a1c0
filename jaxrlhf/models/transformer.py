"""One decoder for every family: what differs between GPT-2, GPT-NeoX, Llama, Mistral and Qwen is a field of `DecoderConfig`.

Arrays: B rows, T queries, S keys, H heads, K key-value heads, D head size, d width. Attention runs in [B, H, T, D] as batched matrix
products and layers are unrolled: both were measured against the alternatives.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf.models.activations import ACTIVATIONS
from jaxrlhf.models.rope import Rope, RopeScaling, gather_rope, rope_table, rotate

# Added to the scores of forbidden keys: finite, so that no softmax can meet ∞ − ∞.
_FORBIDDEN = -1e30

# What the backward pass recomputes of a layer, and what is saved for it: everything; the results of the products with a kernel (the
# element-wise rest and the attention weights are computed again); the layer's input alone (the layer is computed again).
REMAT: dict[str, Any] = {"none": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


@dataclass(frozen=True)
class DecoderConfig:
    """The shape and the wiring of a decoder. Hashable: `hf` and `generation` ride along and take no part in equality."""

    family: str  # names the layout of Hugging Face files: gpt2, gpt_neox, llama, mistral, qwen2, qwen3
    vocab_size: int  # rows of the embedding; may exceed the tokenizer's
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm: str = "layernorm"  # | "rmsnorm"
    norm_eps: float = 1e-5
    positions: str = "rotary"  # | "learned"
    rotary_dim: int = 0
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    parallel_residual: bool = False
    activation: str = "gelu"  # | "gelu_tanh" | "silu"
    gated_mlp: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    sliding_window: int | None = None  # a query sees this many keys, itself included, in the layers of sliding_layers
    sliding_layers: tuple[int, ...] = ()
    initializer_range: float = 0.02
    hf: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # config.json as it was read
    generation: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # generation_config.json

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; make it one.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}.")
        if self.positions == "rotary" and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise ValueError(f"rotary_dim {self.rotary_dim} must be even and between 2 and head_dim {self.head_dim}.")

    @property
    def longest_text(self) -> int:
        """Tokens that the model has learned positions for; linear scaling stretches them, and llama3's is in `max_positions` already."""
        scaling = self.rope_scaling
        return int(self.max_positions * scaling.factor) if scaling and scaling.kind == "linear" else self.max_positions


class Cache(NamedTuple):
    """Keys and values of every layer, with room for S positions; `index` is the next free slot, the same for all rows."""

    keys: tuple[Array, ...]  # [B, K, S, D] a layer, already rotated
    values: tuple[Array, ...]
    mask_BS: Array
    index: Array  # int32 scalar
    position_B: Array  # the position id of the next token


class Past(NamedTuple):
    """One layer's slice of the cache."""

    keys: Array
    values: Array
    index: Array


def position_ids(mask_BT: Array) -> Array:
    """The number of real tokens before each one: 0 at the first real token, whatever the padding; 0 on padding before it."""
    return jnp.maximum(jnp.cumsum(mask_BT.astype(jnp.int32), axis=-1) - 1, 0)


def attention_bias(mask_BS: Array, query_slots_T: Array, window: int | None = None) -> Array:
    """0 where the query at a slot may look at a key, a large negative number elsewhere; float32 [B, T, S].

    A query may look at real keys up to its own slot, and always at its own: padding then has a finite result that does not depend on
    the length either.
    """
    slots_S = jnp.arange(mask_BS.shape[-1])
    distance = query_slots_T[:, None] - slots_S[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    return jnp.where((allowed[None] & mask_BS[:, None, :]) | (distance == 0)[None], 0.0, _FORBIDDEN).astype(jnp.float32)


def attend(q_BHTD: Array, k_BKSD: Array, v_BKSD: Array, bias_BTS: Array) -> Array:
    """Softmax attention, scores and softmax in float32. Query heads of one key-value head are rows of one matrix product."""
    B, H, T, D = q_BHTD.shape
    K, S = k_BKSD.shape[1], k_BKSD.shape[2]
    grouped = (q_BHTD * D**-0.5).reshape(B, K, H // K * T, D)
    scores = jnp.matmul(grouped, k_BKSD.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, H // K, T, S) + bias_BTS[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSD.dtype).reshape(B, K, H // K * T, S)
    return jnp.matmul(weights, v_BKSD).reshape(B, H, T, D)


class Projection(nn.Dense):
    """x·W + b, and where the parameters have an adapter (models/lora.py) + (x·A)·B·α/r."""

    def __call__(self, inputs: Array) -> Array:
        out = super().__call__(inputs)
        if not self.has_variable("params", "lora_a"):
            return out
        a, b, scale = (self.get_variable("params", name).astype(out.dtype) for name in ("lora_a", "lora_b", "lora_scale"))
        return out + inputs.astype(out.dtype) @ a @ b * scale


class _Layer(nn.Module):
    """What the submodules share: the config, the compute dtype and how they are made."""

    config: DecoderConfig
    dtype: Any

    def dense(self, features: int, bias: bool, *, std: float | None = None) -> nn.Dense:
        init = nn.initializers.normal(self.config.initializer_range if std is None else std)
        return Projection(features, use_bias=bias, dtype=self.dtype, param_dtype=jnp.float32, kernel_init=init)

    def normalisation(self, kind: str | None = None) -> nn.Module:
        if (kind or self.config.norm) == "rmsnorm":
            return nn.RMSNorm(epsilon=self.config.norm_eps, dtype=self.dtype, param_dtype=jnp.float32)
        # The fast variance, E[x²] − E[x]², loses the digits that parity needs.
        return nn.LayerNorm(epsilon=self.config.norm_eps, dtype=self.dtype, param_dtype=jnp.float32, use_fast_variance=False)

    def residual_std(self) -> float:
        """Projections onto the residual stream start smaller, so that its variance does not grow with depth. Radford et al. (2019)."""
        return self.config.initializer_range * (2 * self.config.num_layers) ** -0.5


class Attention(_Layer):
    """Causal attention with separate query, key and value projections: a fused one costs a copy to split its result."""

    def setup(self):
        c = self.config
        self.q = self.dense(c.num_heads * c.head_dim, c.qkv_bias)
        self.k = self.dense(c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.v = self.dense(c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.out = self.dense(c.hidden_size, c.out_bias, std=self.residual_std())
        if c.qk_norm:
            self.q_norm, self.k_norm = self.normalisation("rmsnorm"), self.normalisation("rmsnorm")

    def _heads(self, x_BTF: Array) -> Array:
        B, T, _ = x_BTF.shape
        return x_BTF.reshape(B, T, -1, self.config.head_dim)

    def __call__(self, x_BTd: Array, bias_BTS: Array, rope: Rope | None, past: Past | None, start: int):
        q, k, v = self._heads(self.q(x_BTd[:, start:])), self._heads(self.k(x_BTd)), self._heads(self.v(x_BTd))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.transpose(0, 2, 1, 3) for part in (q, k, v))
        if rope is not None:
            cos, sin = rope
            q, k = rotate(q, (cos[:, :, start:], sin[:, :, start:])), rotate(k, rope)
        if past is not None:
            k = jax.lax.dynamic_update_slice_in_dim(past.keys, k, past.index, axis=2)
            v = jax.lax.dynamic_update_slice_in_dim(past.values, v, past.index, axis=2)
        mixed = attend(q, k, v, bias_BTS[:, start:])
        B, H, T, D = mixed.shape
        return self.out(mixed.transpose(0, 2, 1, 3).reshape(B, T, H * D)), k, v


class Mlp(_Layer):
    """activation(x·up)·down, or with a gate (activation(x·gate) ⊙ x·up)·down. Shazeer (2020), eq. 6."""

    def setup(self):
        c = self.config
        self.up = self.dense(c.intermediate_size, c.mlp_bias)
        if c.gated_mlp:
            self.gate = self.dense(c.intermediate_size, c.mlp_bias)
        self.down = self.dense(c.hidden_size, c.mlp_bias, std=self.residual_std())

    def __call__(self, x_BTd: Array) -> Array:
        activation = ACTIVATIONS[self.config.activation]
        inner = activation(self.gate(x_BTd)) * self.up(x_BTd) if self.config.gated_mlp else activation(self.up(x_BTd))
        return self.down(inner)


class Block(_Layer):
    """One layer. Only positions ≥ `start` come out; keys and values are those of all positions."""

    def setup(self):
        self.attention_norm, self.mlp_norm = self.normalisation(), self.normalisation()
        self.attention, self.mlp = Attention(self.config, self.dtype), Mlp(self.config, self.dtype)

    def __call__(self, x_BTd: Array, bias_BTS: Array, rope: Rope | None, past: Past | None, start: int):
        mixed, k, v = self.attention(self.attention_norm(x_BTd), bias_BTS, rope, past, start)
        x_BTd = x_BTd[:, start:]
        if self.config.parallel_residual:
            return x_BTd + mixed + self.mlp(self.mlp_norm(x_BTd)), k, v
        x_BTd = x_BTd + mixed
        return x_BTd + self.mlp(self.mlp_norm(x_BTd)), k, v


class Backbone(_Layer):
    """Tokens → final hidden states. `cache` given: one new token a row, against the cache."""

    remat: str = "none"  # a name in REMAT
    constrain: Callable[..., Any] | None = None  # holds the layout of activations on a mesh: `sharding.constrain_rows`

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.embed = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, param_dtype=jnp.float32, embedding_init=init)
        if c.positions == "learned":
            self.positions = nn.Embed(c.max_positions, c.hidden_size, dtype=self.dtype, param_dtype=jnp.float32, embedding_init=init)
        block = Block if self.remat == "none" else nn.remat(Block, static_argnums=(5,), policy=REMAT[self.remat])
        self.layers = [block(c, self.dtype) for _ in range(c.num_layers)]
        self.final_norm = self.normalisation()

    def __call__(self, tokens_BT: Array, mask_BT: Array, cache: Cache | None = None, start: int = 0) -> tuple[Array, Cache]:
        c = self.config
        if cache is None:
            length = tokens_BT.shape[1]
            slots_T, positions_BT, mask_BS = jnp.arange(length), position_ids(mask_BT), mask_BT
        else:
            length = cache.mask_BS.shape[1]
            slots_T, positions_BT = cache.index[None], cache.position_B[:, None]
            mask_BS = jax.lax.dynamic_update_slice_in_dim(cache.mask_BS, mask_BT, cache.index, axis=1)
        if c.positions == "learned" and length > c.max_positions:
            raise ValueError(f"{length} positions exceed the {c.max_positions} this model has learned; shorten the data limits.")

        held = self.constrain or (lambda array, **_: array)
        x_BTd = self._looked_up(self.embed, jnp.where(mask_BT, tokens_BT, 0))  # so that no padding id, in range or not, reaches a result
        if c.positions == "learned":
            x_BTd, rope = x_BTd + self._looked_up(self.positions, positions_BT), None
        else:
            rope = gather_rope(rope_table(length, c.rotary_dim, c.rope_theta, c.rope_scaling), positions_BT)
        bias_BTS = attention_bias(mask_BS, slots_T)
        slides = c.sliding_window is not None and length > c.sliding_window
        sliding = attention_bias(mask_BS, slots_T, c.sliding_window) if slides else bias_BTS

        x_BTd = held(x_BTd)
        keys, values = [], []
        for n, layer in enumerate(self.layers):
            past = None if cache is None else Past(cache.keys[n], cache.values[n], cache.index)
            cut = start if n == c.num_layers - 1 else 0
            x_BTd, k, v = layer(x_BTd, sliding if n in c.sliding_layers else bias_BTS, rope, past, cut)
            x_BTd = held(x_BTd)
            keys.append(held(k, heads=1))
            values.append(held(v, heads=1))
        end = jnp.int32(length) if cache is None else cache.index + 1
        grown = Cache(tuple(keys), tuple(values), mask_BS, end, positions_BT[:, -1] + mask_BT[:, -1].astype(jnp.int32))
        return self.final_norm(x_BTd), grown

    def _looked_up(self, embed: nn.Embed, ids_BT: Array) -> Array:
        """The rows of a table. On a mesh the table is made whole in its width first, as every other kernel is for its product: devices
        would else look up a piece of every row of the batch, and exchange those."""
        if self.constrain is None:
            return embed(ids_BT)
        return jnp.take(self.constrain(embed.embedding, table=True).astype(self.dtype), ids_BT, axis=0)


def with_room(cache: Cache, length: int) -> Cache:
    """The cache with `length` slots in all; the new ones are empty."""
    extra = length - cache.mask_BS.shape[1]
    if extra < 0:
        raise ValueError(f"length {length} is less than the {cache.mask_BS.shape[1]} positions of the prompt; it counts both.")

    def grow(array: Array) -> Array:
        return jnp.pad(array, ((0, 0), (0, 0), (0, extra), (0, 0)))

    return cache._replace(
        keys=tuple(map(grow, cache.keys)), values=tuple(map(grow, cache.values)), mask_BS=jnp.pad(cache.mask_BS, ((0, 0), (0, extra)))
    )
