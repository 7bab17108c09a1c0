"""A decoder as the pure functions of `types.Model`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf.models.heads import check_head, init_lm_head, init_scalar_head, lm_logits, scalars
from jaxrlhf.models.transformer import REMAT, Backbone, Cache, DecoderConfig, with_room
from jaxrlhf.types import Model, Outputs, Params, TokenStats

# score_tokens holds at most this many float32 logits at a time on a device (256 MB), or one position of its rows, unless told otherwise.
LOGITS_AT_ONCE = 2**26
MATMUL_PRECISIONS = ("highest", "default")


def build_model(
    config: DecoderConfig,
    *,
    head: str = "lm",
    dtype: str = "float32",
    matmul_precision: str = "highest",
    remat: str = "none",
    logits_chunk: int | None = None,
    constrain: Callable[..., Any] | None = None,
    row_shards: int = 1,
) -> Model:
    """The functions of `types.Model` for a decoder.

    Parameters are float32; `dtype` is that of the computation ("float32" or "bfloat16"; log-softmax and attention weights are always
    float32). `matmul_precision` is that of products of float32: "highest", or an accelerator's "default", which is less (TF32 on GPUs, one
    bfloat16 pass on TPUs); the scalar head's product is exact in any case. What the process has set for products counts for nothing.
    Equal arguments give the same functions, so compiled code is reused. Two arguments change memory and time, and results by
    no more than rounding: `remat` is what the backward pass computes again ("none"; "dots": all but the products with kernels; "full":
    whole layers), and `logits_chunk` the number of positions whose logits `score_tokens` holds at a time (None: LOGITS_AT_ONCE decides).

    `constrain` holds hidden states, keys and values to the devices that their rows belong to, and `row_shards` is how many devices the rows
    of a program are cut over by the compiler: both from `sharding.row_constraints(mesh)`.

    Raises ValueError for a head, a `remat` or a `matmul_precision` that is not known, and a `logits_chunk` below 1.
    """
    check_head(head)
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r} is not one of {', '.join(REMAT)}.")
    if matmul_precision not in MATMUL_PRECISIONS:
        raise ValueError(f"matmul_precision {matmul_precision!r} is not one of {', '.join(MATMUL_PRECISIONS)}.")
    if logits_chunk is not None and logits_chunk < 1:
        raise ValueError(f"logits_chunk {logits_chunk} must be at least 1 position, or None.")
    precision = matmul_precision if dtype == "float32" else "default"  # products of bfloat16 have one
    return _build(config, head, dtype, precision, remat, logits_chunk, constrain, row_shards)


@functools.lru_cache(maxsize=64)
def _build(
    config: DecoderConfig,
    head: str,
    dtype: str,
    precision: str,
    remat: str,
    logits_chunk: int | None,
    constrain: Callable[..., Any] | None,
    row_shards: int,
) -> Model:
    backbone = Backbone(config, jnp.dtype(dtype), remat, constrain)
    unheld = Backbone(config, jnp.dtype(dtype))  # its one row belongs to no device

    def hidden(params: Params, tokens: Array, mask: Array, cache: Cache | None = None, start: int = 0) -> tuple[Array, Cache]:
        if not 0 <= start < tokens.shape[1]:
            raise ValueError(f"start {start} must lie in the {tokens.shape[1]} positions given.")
        return backbone.apply({"params": params["backbone"]}, tokens, mask.astype(bool), cache, start)  # pyright: ignore[reportReturnType]

    @jax.jit
    def init(key: Array) -> Params:
        body, top = jax.random.split(key)
        dummy = jnp.zeros((1, 1), jnp.int32)
        variables: Any = unheld.init(body, dummy, dummy == 0)  # pyright: ignore[reportCallIssue]
        params = {"backbone": variables["params"]}
        if head == "scalar":
            params["head"] = init_scalar_head(top, config.hidden_size)
        elif not config.tied_head:
            params["head"] = init_lm_head(top, config)
        return params

    def apply(params: Params, tokens_BL: Array, mask_BL: Array, *, start: int = 0) -> Outputs:
        states, _ = hidden(params, tokens_BL, mask_BL, start=start)
        return Outputs(scalars=scalars(params, states)) if head == "scalar" else Outputs(logits=lm_logits(params, states))

    def prefill(params: Params, tokens_BL: Array, mask_BL: Array, *, length: int) -> tuple[Array, Cache]:
        _needs_lm(head, "prefill")
        if config.positions == "learned" and length > config.max_positions:
            raise ValueError(f"length {length} exceeds the {config.max_positions} positions this model has learned; shorten it.")
        states, cache = hidden(params, tokens_BL, mask_BL, start=tokens_BL.shape[1] - 1)
        return lm_logits(params, states)[:, 0], with_room(cache, length)

    def decode(params: Params, tokens_B: Array, cache: Cache) -> tuple[Array, Cache]:
        _needs_lm(head, "decode")
        states, cache = hidden(params, tokens_B[:, None], jnp.ones((tokens_B.shape[0], 1), bool), cache)
        return lm_logits(params, states)[:, 0], cache

    def score_tokens(
        params: Params, tokens_BL: Array, mask_BL: Array, *, start: int, temperature: float | Array = 1.0, chunk: int | None = None
    ) -> TokenStats:
        _needs_lm(head, "score_tokens")
        if not 1 <= start < tokens_BL.shape[1]:
            raise ValueError(f"start {start} must lie in 1..{tokens_BL.shape[1] - 1}: the first token has no prediction.")
        # The state at position t−1 predicts token t, so the last token is never an input.
        states, _ = hidden(params, tokens_BL[:, :-1], mask_BL[:, :-1], start=start - 1)
        chunk = logits_chunk if chunk is None else chunk
        chunk = _at_once(tokens_BL.shape[0], row_shards, config.vocab_size) if chunk is None else chunk
        return chunked_stats(params, states, tokens_BL[:, start:], temperature, chunk)

    return Model(init, *(_at_precision(precision, function) for function in (apply, prefill, decode, score_tokens)))


def _at_precision(precision: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its products traced at this precision; those of its backward pass have that of the forward pass."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return function(*args, **kwargs)

    return traced


def _at_once(rows: int, row_shards: int, vocab_size: int) -> int:
    """How many positions of its rows a device may hold the logits of."""
    return max(1, LOGITS_AT_ONCE // (-(-rows // row_shards) * vocab_size))


def _needs_lm(head: str, name: str) -> None:
    if head != "lm":
        raise ValueError(f"{name} needs head 'lm', and this model has head {head!r}; build it with head='lm'.")


def token_stats(logits: Array, tokens: Array, temperature: float | Array) -> TokenStats:
    """The `TokenStats` of float32 logits [..., V] at a temperature; what a caller drops, XLA drops."""
    logp = jax.nn.log_softmax(logits / temperature, axis=-1)
    chosen = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
    greedy = jnp.argmax(logits, axis=-1) == tokens
    return TokenStats(chosen, -jnp.sum(jnp.exp(logp) * logp, axis=-1), jax.nn.logsumexp(2.0 * logp, axis=-1), greedy)


def chunked_stats(params: Params, states_BTd: Array, tokens_BT: Array, temperature: float | Array, chunk: int) -> TokenStats:
    """`token_stats` over `chunk` positions at a time, so that [B, T, V] in float32 never exists, in the backward pass either.

    A chunk of T or more is one product, its logits saved for the backward pass.
    """
    B, T, d = states_BTd.shape
    if chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least 1, or None.")
    if chunk >= T:
        return token_stats(lm_logits(params, states_BTd), tokens_BT, temperature)

    # Only the arrays that make logits enter the loop, and each chunk is recomputed in the backward pass.
    @jax.checkpoint
    def one(piece: tuple[Array, Array]) -> TokenStats:
        states, tokens = piece
        return token_stats(lm_logits(params, states), tokens, temperature)

    count = -(-T // chunk)
    chunk = -(-T // count)  # as even as they come, so that little is padded
    padding = count * chunk - T
    states = jnp.pad(states_BTd, ((0, 0), (0, padding), (0, 0))).reshape(B, count, chunk, d).swapaxes(0, 1)
    tokens = jnp.pad(tokens_BT, ((0, 0), (0, padding))).reshape(B, count, chunk).swapaxes(0, 1)
    stats = jax.lax.map(one, (states, tokens))
    return jax.tree.map(lambda part: part.swapaxes(0, 1).reshape(B, count * chunk)[:, :T], stats)
