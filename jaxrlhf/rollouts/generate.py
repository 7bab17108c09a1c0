"""Sampling with a KV cache: one jitted program, one uniform a row and token, early exit when every row has ended."""

import math
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxrlhf import rng, sharding
from jaxrlhf.rollouts.draw_token import draw_token
from jaxrlhf.rollouts.passes import in_passes
from jaxrlhf.types import Array, Completion, Model, Params


def generate(
    model: Model,
    params: Params,
    prompts_BL: Array | np.ndarray,
    mask_BL: Array | np.ndarray,
    key: Array,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    index_B: Array | np.ndarray | None = None,
    vocab_size: int | None = None,
    pad_id: int | None = None,
    check_padding: bool = True,
    mesh: Any = None,
    passes: int = 1,
) -> Completion:
    """Up to `max_new_tokens` tokens after every left-padded prompt: `Completion(tokens_BT, mask_BT, logp_BT)`.

    - The mask covers every token up to and including the first EOS (any of `eos_ids`; empty: never stop). After it
      stand `pad_id` (default: the first of `eos_ids`), mask False and log-prob 0. T is always `max_new_tokens`.
    - `temperature` 0 is greedy: top_k and top_p do nothing and log-probs are taken at temperature 1. Otherwise log-probs
      are of the distribution drawn from: at `temperature` and, under top-k or top-p, renormalised over what was kept.
    - A row's text depends on (key, index_B of the row, prompt) alone: not on its batch mates, the padding, the mesh or
      max_new_tokens, up to the rounding of the model. `index_B` defaults to 0..B−1; several samples of one prompt are
      repeated rows with different indices.
    - A row whose mask is all False is one that fills a batch: it gets no tokens.
    - `vocab_size` (the tokenizer's length) bars ids that only pad the embedding.
    - `mesh` (`sharding.mesh_of`): the devices that params (`sharding.place`) and prompts (`sharding.place_batch`) live on. Where every
      device has the whole model it samples its own rows and waits for no other.
    - `passes`: the rows are sampled in so many parts, one after the other, and the KV cache is of one part: memory, not results. The
      rows of every device must divide by it.
    - The check for left-padding reads the mask on the host, so it waits for a mask that is on a device. Loops call
      `check_left_padded` before they place a batch, and give `check_padding=False` here.

    Compiles once for every (model, shapes, max_new_tokens, eos_ids, greedy or not, top_k, top_p, vocab_size, pad_id); a new
    temperature does not compile. Raises ValueError on arguments out of range and on prompts that are not left-padded.
    Inside a jit, pmap or shard_map of your own, call `sample`, which checks nothing.
    """
    eos_ids = tuple(int(token) for token in eos_ids)
    _check_options(max_new_tokens, eos_ids, temperature, top_k, top_p, vocab_size)
    _check_prompts(prompts_BL, mask_BL, index_B)
    if check_padding:
        check_left_padded(mask_BL)
    if pad_id is None:
        pad_id = eos_ids[0] if eos_ids else 0
    if index_B is None:
        index_B = np.arange(prompts_BL.shape[0], dtype=np.int32)
    greedy = temperature == 0
    compiled = sampler(
        model, mesh, max_new_tokens=int(max_new_tokens), eos_ids=eos_ids, pad_id=int(pad_id), greedy=greedy,
        top_k=0 if greedy else int(top_k), top_p=1.0 if greedy else float(top_p), vocab_size=vocab_size, passes=passes,
    )  # fmt: skip
    return compiled(params, (_int32(prompts_BL), mask_BL, _int32(index_B)), key, np.float32(1.0 if greedy else temperature))


@lru_cache(maxsize=64)
def sampler(model: Model, mesh: Any, *, passes: int = 1, **how: Any) -> sharding.Compiled:
    """`sample` compiled for the devices of `mesh`: (params, (prompts_BL, mask_BL, index_B), key, temperature) → Completion; `.lower` too.

    `passes` as in `generate`; `how`: the keyword arguments of `sample`. Equal arguments share compilations.
    """

    def of_rows(params: Params, batch: tuple[Array, Array, Array], key: Array, temperature: Array) -> Completion:
        def of_part(part: tuple[Array, Array, Array]) -> Completion:
            prompts_BL, mask_BL, index_B = part
            return sample(model, params, prompts_BL, mask_BL, key, index_B, temperature, **how)

        return in_passes(of_part, batch, passes)

    return sharding.rows(of_rows, mesh)


def sample(
    model: Model,
    params: Params,
    prompts_BL: Array,
    mask_BL: Array,
    key: Array,
    index_B: Array,
    temperature: float | Array = 1.0,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    greedy: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
    vocab_size: int | None = None,
) -> Completion:
    """What `generate` runs: pure, for jit over a mesh, pmap and larger programs. `temperature` > 0; greedy is its own switch."""
    B, L = prompts_BL.shape
    T = max_new_tokens
    uniforms_TB = token_uniforms(key, index_B, T)

    def draw(logits_BV: Array, t: Array | int) -> tuple[Array, Array]:
        uniform_B = jax.lax.dynamic_index_in_dim(uniforms_TB, t, keepdims=False)
        return draw_token(
            logits_BV, uniform_B, temperature=temperature, greedy=greedy, top_k=top_k, top_p=top_p, vocab_size=vocab_size
        )  # fmt: skip

    def record(t, logits_BV, ended_B, out):
        """Draw token t of every row that has not ended, and write it."""
        tokens_TB, mask_TB, logp_TB = out
        token_B, logp_B = draw(logits_BV, t)
        token_B = jnp.where(ended_B, pad_id, token_B)
        out = (
            tokens_TB.at[t].set(token_B),
            mask_TB.at[t].set(~ended_B),
            logp_TB.at[t].set(jnp.where(ended_B, 0.0, logp_B)),
        )
        return token_B, ended_B | _is_any(token_B, eos_ids), out

    def unfinished(carry) -> Array:
        t, _, ended_B, _, _ = carry
        return (t < T) & ~jnp.all(ended_B)

    def step(carry):
        t, token_B, ended_B, cache, out = carry
        logits_BV, cache = model.decode(params, token_B, cache)
        token_B, ended_B, out = record(t, logits_BV, ended_B, out)
        return t + 1, token_B, ended_B, cache, out

    # Time leads inside the loop: a step then writes one contiguous row.
    out = (jnp.full((T, B), pad_id, jnp.int32), jnp.zeros((T, B), bool), jnp.zeros((T, B), jnp.float32))
    ended_B = ~jnp.any(mask_BL, axis=-1)
    logits_BV, cache = model.prefill(params, prompts_BL, mask_BL, length=L + T)
    token_B, ended_B, out = record(0, logits_BV, ended_B, out)
    carry = (jnp.int32(1), token_B, ended_B, cache, out)
    tokens_TB, mask_TB, logp_TB = jax.lax.while_loop(unfinished, step, carry)[-1]
    return Completion(tokens_TB.T, mask_TB.T, logp_TB.T)


def token_uniforms(key: Array, index_B: Array, count: int) -> Array:
    """One uniform in [0, 1) for every token position and row: [T, B], from (key, global row number, position) alone."""
    keys_B = rng.per_row(key, index_B)
    of_row = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys_BT = jax.vmap(of_row, in_axes=(0, None))(keys_B, jnp.arange(count))
    return jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32)))(keys_BT).T


def _is_any(token_B: Array, ids: tuple[int, ...]) -> Array:
    if not ids:
        return jnp.zeros(token_B.shape, bool)
    return jnp.any(token_B[..., None] == jnp.asarray(ids, token_B.dtype), axis=-1)


def _int32(x: Array | np.ndarray) -> Array | np.ndarray:
    return x if x.dtype == np.int32 else x.astype(np.int32)


def _check_options(max_new_tokens: int, eos_ids: tuple[int, ...], temperature: float, top_k: int, top_p: float, vocab_size: int | None):
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1.")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature {temperature} must be finite and ≥ 0; 0 is greedy.")
    if top_k < 0:
        raise ValueError(f"top_k {top_k} must be ≥ 0; 0 keeps every token.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must be in (0, 1]; 1 keeps every token.")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size {vocab_size} must be at least 1.")
    for token in eos_ids:
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            raise ValueError(
                f"eos_ids {eos_ids}: {token} is not an id of a vocabulary of {vocab_size or 'any size'}; it could never be drawn."
            )


def _check_prompts(prompts_BL, mask_BL, index_B):
    if prompts_BL.ndim != 2 or mask_BL.shape != prompts_BL.shape or prompts_BL.shape[1] < 1:
        raise ValueError(f"prompts {prompts_BL.shape} and mask {mask_BL.shape} must both be [rows, length] with length ≥ 1.")
    if mask_BL.dtype != bool:
        raise ValueError(f"the prompt mask is {mask_BL.dtype}; it must be boolean.")
    if index_B is not None and index_B.shape != prompts_BL.shape[:1]:
        raise ValueError(f"index_B has shape {index_B.shape}; it must be {prompts_BL.shape[:1]}, one global row number a prompt.")


def check_left_padded(mask_BL: Array | np.ndarray) -> None:
    """Raise ValueError at the first row whose mask turns False after a True. A mask whose values cannot be seen here (traced, or
    spread over processes) passes."""
    if isinstance(mask_BL, Tracer) or (isinstance(mask_BL, jax.Array) and not mask_BL.is_fully_addressable):
        return
    mask_BL = np.asarray(mask_BL)
    torn = np.flatnonzero(np.any(mask_BL[:, :-1] & ~mask_BL[:, 1:], axis=1))
    if torn.size:
        raise ValueError(f"prompt row {torn[0]} is not left-padded: its mask turns False after a True; move the padding to the left.")
