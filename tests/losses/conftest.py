"""Golden values made by the scripts beside them, and the batch every pair loss is tried on."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.types import PairBatch, PairOutputs, Rollout, TokenStats

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden():
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())


def _mask(rng, rows, length):
    return np.arange(length) < rng.integers(1, length + 1, rows)[:, None]


def _stats(rng, mask):
    shape = mask.shape
    logp, sum_sq, entropy = -3 * rng.random(shape), -2 * rng.random(shape), rng.random(shape)
    return TokenStats(*(jnp.asarray(np.where(mask, x, np.nan), jnp.float32) for x in (logp, entropy, sum_sq)))


@pytest.fixture
def pairs():
    """Six pairs, the last two of which only fill the batch; whatever does not count is NaN."""
    rng = np.random.default_rng(0)
    rows, length = 6, 5
    real = np.arange(rows) < 4
    masks = [_mask(rng, rows, length) for _ in range(2)]

    def fact(scale=1.0):
        return jnp.asarray(np.where(real, scale * rng.normal(size=rows), np.nan), jnp.float32)

    outputs = PairOutputs(fact(3), fact(3), _stats(rng, masks[0] & real[:, None]), _stats(rng, masks[1] & real[:, None]))
    tokens = jnp.ones((rows, length), jnp.int32)
    batch = PairBatch(
        prompt_BL=tokens,
        prompt_mask_BL=tokens > 0,
        chosen_BT=tokens,
        chosen_mask_BT=jnp.asarray(masks[0]),
        rejected_BT=tokens,
        rejected_mask_BT=jnp.asarray(masks[1]),
        weights_B=jnp.abs(fact()),
        row_mask_B=jnp.asarray(real),
        index_B=jnp.arange(rows),
        columns={name: fact() for name in ("margin", "reference_chosen_logp", "reference_rejected_logp")},
    )
    return outputs, batch


@pytest.fixture
def rollout():
    """Statistics and a rollout of six responses, the last two of which only fill the batch."""
    rng = np.random.default_rng(1)
    rows, length = 6, 5
    real = np.arange(rows) < 4
    mask = _mask(rng, rows, length)
    counts = mask & real[:, None]

    def fact(x):
        return jnp.asarray(np.where(counts, x, np.nan), jnp.float32)

    logp = -3 * rng.random((rows, length))
    stats = TokenStats(fact(logp), fact(rng.random(logp.shape)), fact(-rng.random(logp.shape)))
    old, advantages = fact(logp + 0.4 * rng.normal(size=logp.shape)), fact(rng.normal(size=logp.shape))
    tokens = jnp.ones((rows, length), jnp.int32)
    return stats, Rollout(
        tokens, tokens > 0, tokens, jnp.asarray(mask), jnp.asarray(mask), old, old, old, advantages, old, old[:, 0], jnp.asarray(real)
    )  # fmt: skip
