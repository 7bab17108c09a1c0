"""One BERT encoder for every family: what differs between BERT, RoBERTa and XLM-R is a field of `BertConfig`.

Arrays: B rows, T tokens (padded on the right), H heads, D head size, d width, C labels. Attention runs in [B, H, T, D] as batched matrix
products with separate query, key and value projections. Devlin et al. (2019); Liu et al. (2019).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf.models.activations import ACTIVATIONS
from jaxrlhf.models.families import ONLY, read_activation
from jaxrlhf.models.settings import check_only, check_values
from jaxrlhf.types import Params

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")
POOLINGS = ("mean", "cls")
# Added to the scores of padding: finite, so that no softmax can meet ∞ − ∞.
_FORBIDDEN = -1e30


@dataclass(frozen=True)
class BertConfig:
    """The shape and the wiring of an encoder. Hashable: `hf` rides along and takes no part in equality."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int  # rows of the position table
    type_vocab_size: int
    position_offset: int = 0  # row of the first token's position: RoBERTa counts from pad_token_id + 1
    norm_eps: float = 1e-12
    activation: str = "gelu"
    labels: tuple[str, ...] = ()  # of the classification head, where there is one
    hf: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # config.json as it was read

    @property
    def max_length(self) -> int:
        """Tokens that have a position."""
        return self.max_positions - self.position_offset


def bert_config_from_hf(hf: Mapping[str, Any]) -> BertConfig:
    """config.json → `BertConfig`. ValueError for a family or setting that is not supported."""
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is no encoder known here; known are {', '.join(FAMILIES)}.")
    check_values(hf)
    check_only(hf, ONLY | {"position_embedding_type": "absolute", "is_decoder": False})
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    if width % heads:
        raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}.")
    pad = hf.get("pad_token_id")
    names = {int(number): label for number, label in (hf.get("id2label") or {}).items()}
    return BertConfig(
        family=family,
        vocab_size=hf["vocab_size"],
        hidden_size=width,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        intermediate_size=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"],
        type_vocab_size=hf.get("type_vocab_size", 2),
        position_offset=0 if family == "bert" else (1 if pad is None else pad) + 1,
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        activation=read_activation(hf.get("hidden_act", "gelu")),
        labels=tuple(names[n] for n in sorted(names)),
        hf=hf,
    )


def _gelu(x: Array) -> Array:
    """x·Φ(x), exact, by erf; nothing here is differentiated, so its derivative is not saved. Hendrycks and Gimpel (2016), eq. 1."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


class _Part(nn.Module):
    """What the submodules share. float32 means float32: on accelerators whose default is less, products take the slow exact path."""

    config: BertConfig
    dtype: Any

    @property
    def precision(self) -> jax.lax.Precision:
        return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def dense(self, features: int) -> nn.Dense:
        init = nn.initializers.normal(0.02)
        return nn.Dense(features, dtype=self.dtype, param_dtype=jnp.float32, kernel_init=init, precision=self.precision)

    def table(self, rows: int) -> nn.Embed:
        init = nn.initializers.normal(0.02)
        return nn.Embed(rows, self.config.hidden_size, dtype=self.dtype, param_dtype=jnp.float32, embedding_init=init)

    def normalisation(self) -> nn.LayerNorm:
        # The fast variance, E[x²] − E[x]², loses the digits that parity needs.
        return nn.LayerNorm(epsilon=self.config.norm_eps, dtype=self.dtype, param_dtype=jnp.float32, use_fast_variance=False)


class _Attention(_Part):
    def setup(self):
        width = self.config.hidden_size
        self.q, self.k, self.v, self.out = (self.dense(width) for _ in range(4))

    def _heads(self, x_BTd: Array) -> Array:
        B, T, d = x_BTd.shape
        return x_BTd.reshape(B, T, self.config.num_heads, d // self.config.num_heads).transpose(0, 2, 1, 3)

    def __call__(self, x_BTd: Array, bias_BT: Array, queries: int | None) -> Array:
        q, k, v = self._heads(self.q(x_BTd[:, :queries])), self._heads(self.k(x_BTd)), self._heads(self.v(x_BTd))
        scores = jnp.matmul(q * q.shape[-1] ** -0.5, k.swapaxes(-1, -2), precision=self.precision, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores + bias_BT[:, None, None], axis=-1).astype(v.dtype)
        mixed = jnp.matmul(weights, v, precision=self.precision)
        B, H, T, D = mixed.shape
        return self.out(mixed.transpose(0, 2, 1, 3).reshape(B, T, H * D))


class _Layer(_Part):
    """Post-norm: x ← norm(x + attention(x)); x ← norm(x + mlp(x)). Of the first `queries` positions only, where given."""

    def setup(self):
        self.attention = _Attention(self.config, self.dtype)
        self.up, self.down = self.dense(self.config.intermediate_size), self.dense(self.config.hidden_size)
        self.attention_norm, self.mlp_norm = self.normalisation(), self.normalisation()

    def __call__(self, x_BTd: Array, bias_BT: Array, queries: int | None = None) -> Array:
        activation = _gelu if self.config.activation == "gelu" else ACTIVATIONS[self.config.activation]
        x_BTd = self.attention_norm(x_BTd[:, :queries] + self.attention(x_BTd, bias_BT, queries))
        return self.mlp_norm(x_BTd + self.down(activation(self.up(x_BTd))))


class BertBackbone(_Part):
    """Tokens → final hidden states, of all positions or (`first_only`) of the first alone."""

    def setup(self):
        c = self.config
        self.words, self.positions, self.types = self.table(c.vocab_size), self.table(c.max_positions), self.table(c.type_vocab_size)
        self.embed_norm = self.normalisation()
        self.layers = [_Layer(c, self.dtype) for _ in range(c.num_layers)]

    def __call__(self, tokens_BT: Array, mask_BT: Array, types_BT: Array | None = None, first_only: bool = False) -> Array:
        c, length = self.config, tokens_BT.shape[1]
        if length > c.max_length:
            raise ValueError(f"{length} tokens exceed the {c.max_length} positions this encoder has; lower max_length.")
        # Padding is on the right, so a token's position is its column; no id, in range or not, reaches a result through padding.
        x_BTd = self.words(jnp.where(mask_BT, tokens_BT, 0)) + self.positions(c.position_offset + jnp.arange(length))
        x_BTd = self.embed_norm(x_BTd + self.types(jnp.zeros(1, jnp.int32) if types_BT is None else types_BT))
        bias_BT = jnp.where(mask_BT, 0.0, _FORBIDDEN).astype(jnp.float32)
        for n, layer in enumerate(self.layers):
            x_BTd = layer(x_BTd, bias_BT, 1 if first_only and n == c.num_layers - 1 else None)
        return x_BTd


class Bert(NamedTuple):
    """An encoder as pure functions of a plain nested dict of parameters. Texts are padded on the right.

    encode(params, tokens_BT, mask_BT) → unit vectors float32 [B, d]; a row without a token gives zeros.
    classify(params, tokens_BT, mask_BT, types_BT) → logits float32 [B, C], where the parameters have a classification head.
    """

    init: Callable[[Array], Params]
    states: Callable[..., Array]
    encode: Callable[[Params, Array, Array], Array]
    classify: Callable[[Params, Array, Array, Array | None], Array]


def mean_pool(states_BTd: Array, mask_BT: Array) -> Array:
    """Mean over the real tokens, in float32; the mask is carried, for a padding id may be a real token too."""
    total = jnp.sum(jnp.where(mask_BT[..., None], states_BTd.astype(jnp.float32), 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True), 1).astype(jnp.float32)


def unit(vectors_Bd: Array) -> Array:
    """v / max(‖v‖, 1e-12), as torch.nn.functional.normalize."""
    return vectors_Bd / jnp.maximum(jnp.linalg.norm(vectors_Bd, axis=-1, keepdims=True), 1e-12)


def build_bert(config: BertConfig, *, pooling: str = "mean", dtype: str = "float32") -> Bert:
    """The functions of an encoder. Equal arguments give the same functions, so compiled code is reused.

    Parameters are float32; `dtype` is that of the computation; pooling, norms of vectors and the classification head are float32.
    """
    return _build(config, pooling, dtype)


@lru_cache(maxsize=16)
def _build(config: BertConfig, pooling: str, dtype: str) -> Bert:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not one of {', '.join(POOLINGS)}.")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} of an encoder is not float32 or bfloat16.")
    backbone = BertBackbone(config, jnp.dtype(dtype))
    # RoBERTa's head is dense, tanh, out_proj on <s>; BERT's is the pooler (dense, tanh on [CLS]) and a classifier: the same function.

    def states(params: Params, tokens_BT: Array, mask_BT: Array, types_BT: Array | None = None, *, first_only: bool = False) -> Array:
        out: Any = backbone.apply({"params": params["backbone"]}, tokens_BT, mask_BT.astype(bool), types_BT, first_only)
        return out

    @jax.jit
    def init(key: Array) -> Params:
        body, top, last = jax.random.split(key, 3)
        dummy = jnp.zeros((1, 1), jnp.int32)
        variables: Any = backbone.init(body, dummy, dummy == 0)  # pyright: ignore[reportCallIssue]
        params = {"backbone": variables["params"]}
        if config.labels:
            params["classifier"] = {
                "dense": _linear(top, config.hidden_size, config.hidden_size),
                "head": _linear(last, config.hidden_size, len(config.labels)),
            }
        return params

    @jax.jit
    def encode(params: Params, tokens_BT: Array, mask_BT: Array) -> Array:
        mask_BT = mask_BT.astype(bool)
        if pooling == "mean":
            return unit(mean_pool(states(params, tokens_BT, mask_BT), mask_BT))
        first = states(params, tokens_BT, mask_BT, first_only=True)[:, 0].astype(jnp.float32)
        return unit(jnp.where(mask_BT[:, :1], first, 0.0))

    @jax.jit
    def classify(params: Params, tokens_BT: Array, mask_BT: Array, types_BT: Array | None = None) -> Array:
        if "classifier" not in params:
            raise ValueError("these parameters have no classification head; load the folder with load_classifier.")
        first = states(params, tokens_BT, mask_BT, types_BT, first_only=True)[:, 0].astype(jnp.float32)
        inner = jnp.tanh(_apply_linear(params["classifier"]["dense"], first))
        return _apply_linear(params["classifier"]["head"], inner)

    return Bert(init, states, encode, classify)


def _linear(key: Array, rows: int, columns: int) -> dict[str, Array]:
    return {"kernel": 0.02 * jax.random.normal(key, (rows, columns), jnp.float32), "bias": jnp.zeros(columns, jnp.float32)}


def _apply_linear(params: Params, x: Array) -> Array:
    return jnp.matmul(x, params["kernel"], precision=jax.lax.Precision.HIGHEST) + params["bias"]
