"""A tiny model as functions, and ragged batches whose last rows only fill the batch.

The model is no transformer (those run in tests/run): its state is a token's embedding mixed with the mean of what stands before it under
the mask. It compiles in no time, and like a transformer it sees order, padding and context.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.model import token_stats
from jaxrlhf.types import Array, Completion, Model, Outputs, PairBatch, Params, PromptBatch, TextBatch

VOCAB, L, T, EOS = 13, 4, 5, 1


class Tiny(NamedTuple):
    lm: Model
    scalar: Model
    policy: Params
    reward: Params
    critic: Params


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def _states(params: Params, tokens: Array, mask: Array) -> Array:
    embedded = jnp.where(mask[..., None], params["embedding"][tokens], 0.0)
    seen = jnp.maximum(jnp.cumsum(mask, axis=1), 1)[..., None]
    return jnp.tanh(embedded + jnp.cumsum(embedded, axis=1) / seen @ params["mix"])


def _model(head: str) -> Model:
    def init(key: Array) -> Params:
        keys = jax.random.split(key, 3)
        sizes = {"embedding": (VOCAB, 8), "mix": (8, 8), "head": (8, VOCAB if head == "lm" else 1)}
        return {name: jax.random.normal(key, size) for (name, size), key in zip(sizes.items(), keys, strict=True)}

    def apply(params: Params, tokens: Array, mask: Array, *, start: int = 0) -> Outputs:
        out = _states(params, tokens, mask)[:, start:] @ params["head"]
        return Outputs(logits=out) if head == "lm" else Outputs(scalars=out[..., 0])

    def score_tokens(params: Params, tokens: Array, mask: Array, *, start: int, temperature: float | Array = 1.0, chunk=None):
        logits = apply(params, tokens[:, :-1], mask[:, :-1], start=start - 1).logits
        assert logits is not None
        return token_stats(logits, tokens[:, start:], temperature)

    return Model(init, apply, None, None, score_tokens)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    lm, scalar = _model("lm"), _model("scalar")
    policy, reward, critic = (model.init(jax.random.key(i)) for i, model in enumerate((lm, scalar, scalar)))
    return Tiny(lm, scalar, policy, reward, critic)


def _ragged(random: np.random.Generator, rows: int, width: int, *, left: bool) -> np.ndarray:
    lengths = random.integers(1, width + 1, rows)
    return np.arange(width) >= width - lengths[:, None] if left else np.arange(width) < lengths[:, None]


def _side(random: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Responses that end in EOS unless they fill all T."""
    mask = _ragged(random, rows, T, left=False)
    tokens = np.where(mask, random.integers(2, VOCAB, (rows, T)), 0)
    lengths = mask.sum(axis=1)
    ends = np.flatnonzero(lengths < T)
    tokens[ends, lengths[ends] - 1] = EOS
    return tokens.astype(np.int32), mask


def _prompts(random: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    return random.integers(2, VOCAB, (rows, L)).astype(np.int32), _ragged(random, rows, L, left=True)


def _texts(*, rows: int = 8, filled: int = 3, seed: int = 0) -> TextBatch:
    random = np.random.default_rng(seed)
    return jax.tree.map(
        jnp.asarray, TextBatch(*_prompts(random, rows), *_side(random, rows), np.arange(rows) < rows - filled, np.arange(rows))
    )


def _pairs(*, rows: int = 8, filled: int = 3, seed: int = 0) -> PairBatch:
    random = np.random.default_rng(seed)
    sides = (*_prompts(random, rows), *_side(random, rows), *_side(random, rows))
    weights = random.uniform(0.2, 3.0, rows).astype(np.float32)
    return jax.tree.map(jnp.asarray, PairBatch(*sides, weights, np.arange(rows) < rows - filled, np.arange(rows)))


def _sampled(*, rows: int = 8, filled: int = 3, seed: int = 0) -> tuple[PromptBatch, Completion]:
    random = np.random.default_rng(seed)
    prompts = PromptBatch(*_prompts(random, rows), np.arange(rows) < rows - filled, np.arange(rows))
    tokens, mask = _side(random, rows)
    return jax.tree.map(jnp.asarray, (prompts, Completion(tokens, mask, np.where(mask, -1.0, 0.0).astype(np.float32))))


@pytest.fixture(scope="session")
def texts() -> Callable[..., TextBatch]:
    return _texts


@pytest.fixture(scope="session")
def pairs() -> Callable[..., PairBatch]:
    return _pairs


@pytest.fixture(scope="session")
def sampled() -> Callable[..., tuple[PromptBatch, Completion]]:
    return _sampled
