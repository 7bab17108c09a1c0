"""Exact distributions to hold the sampler against."""

import itertools

import numpy as np
import pytest


def _truncated(logits, temperature=1.0, top_k=0, top_p=1.0, vocab_size=None) -> np.ndarray:
    z = np.asarray(logits, np.float64) / temperature
    if vocab_size:
        z[vocab_size:] = -np.inf
    if top_k:
        z[z < np.sort(z)[-top_k]] = -np.inf
    p = np.exp(z - z.max())
    p /= p.sum()
    if top_p < 1:
        subsets = (itertools.combinations(range(len(p)), size) for size in range(1, len(p) + 1))
        heaviest = (list(max(of_size, key=lambda s: p[list(s)].sum())) for of_size in subsets)
        kept = next(best for best in heaviest if p[best].sum() >= top_p)
        p = np.where(np.isin(np.arange(len(p)), kept), p, 0)
        p /= p.sum()
    return p


@pytest.fixture
def truncated():
    """truncated(logits, temperature, top_k, top_p, vocab_size): the exact distribution in float64; top-p by enumerating subsets."""
    return _truncated
