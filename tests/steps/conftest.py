"""A tiny decoder with both heads, and ragged batches whose last rows only fill the batch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.families import config_from_shape
from jaxrlhf.models.model import build_model
from jaxrlhf.types import Completion, Model, PairBatch, Params, PromptBatch, TextBatch

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


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    shape = {"family": "llama", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
    config, _ = config_from_shape(shape, VOCAB, max_positions=L + T, pad_id=0, bos_id=None, eos_id=EOS)
    lm, scalar = build_model(config, head="lm"), build_model(config, head="scalar")
    keys = jax.random.split(jax.random.key(0), 3)
    # Larger than at initialisation, so that no gradient is lost in rounding.
    grown = [jax.tree.map(lambda x: 3.0 * x, model.init(key)) for model, key in zip((lm, scalar, scalar), keys, strict=True)]
    return Tiny(lm, scalar, *grown)


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
