"""One token from logits: what can never be drawn, exact frequencies, truncation as transformers defines it."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrlhf.rollouts.draw_token import draw_token, first_above, inverse_cdf, keep_top_k, keep_top_p

LARGEST = np.float32(1 - 2**-24)  # the largest float32 below 1
EDGES = np.array([0.0, 2**-24, 0.25, 0.5, 0.75, 1 - 2**-23, LARGEST], np.float32)

inverse = jax.jit(inverse_cdf)


def by_hand(p: np.ndarray, u: float) -> int:
    """The first index whose float64 cumulative weight exceeds u · Σp."""
    total = np.cumsum(p.astype(np.float64))
    return int(np.argmax(total > u * total[-1]))


def test_inverse_cdf_by_hand():
    p = jnp.array([[0.0, 1.0, 0.0, 2.0, 1.0, 0.0]])
    for u, place in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (LARGEST, 4)]:
        assert int(inverse_cdf(p, jnp.array([u], jnp.float32))[0]) == place, u


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 1000, 50_304])
def test_zero_weight_is_never_drawn(size):
    """Most weights zero, the rest over 30 orders of magnitude, in every arrangement: ends, blocks, alone."""
    random = np.random.default_rng(size)
    rows = []
    for kept in (1, 2, max(1, size // 50), size):
        weights = np.exp(random.uniform(-70, 0, size)).astype(np.float32)
        weights[random.permutation(size)[kept:]] = 0.0
        rows.append(weights)
    first, last = np.zeros(size, np.float32), np.zeros(size, np.float32)
    first[0], last[-1] = 0.3, 1e-30
    p = np.repeat(np.stack([*rows, first, last]), len(EDGES), axis=0)
    u = np.tile(EDGES, 6)
    place = np.asarray(inverse(p, u))
    assert np.all(p[np.arange(len(p)), place] > 0)
    for row, u_row, found in zip(p, u, place, strict=True):
        if u_row == 0:
            assert found == np.flatnonzero(row)[0]


def test_inexact_cumulative_sum_at_50k():
    """Equal weights of 0.1 do not add up exactly in float32; every other token is barred and must never appear."""
    size = 50_304
    p = np.zeros((4, size), np.float32)
    p[0, 1::2] = p[1, 0::2] = p[2, 25_000:25_010] = 0.1
    p[3, :-7] = 0.1
    uniforms = np.linspace(0, LARGEST, 2_000, dtype=np.float32)
    for row in p:
        place = np.asarray(inverse(np.broadcast_to(row, (2_000, size)), uniforms))
        assert np.all(row[place] > 0)
        exact = np.array([by_hand(row, float(u)) for u in uniforms[::50]])
        positive = np.cumsum(row > 0)
        assert np.max(np.abs(positive[place[::50]] - positive[exact])) <= 1  # rounding moves a border by at most one token
    assert np.asarray(inverse(p, np.full(4, LARGEST))).tolist() == [size - 1, size - 2, 25_009, size - 8]


def test_a_cumulative_sum_that_is_off_by_rounding():
    """One that rises at a weight of zero, one that falls there, and one that ends short of the target, as blocked sums may."""
    up = np.nextafter(np.float32(0.5), np.float32(1))
    p = jnp.array([[0.5, 0.0, 0.5, 0.0]] * 4)
    cumulative = jnp.array([[0.5, up, 1.0, 1.0], [up, 0.5, 1.0, 1.0], [0.5, 0.5, 1.0, 1.0], [0.5, up, 1.0, 1.0]], jnp.float32)
    short = first_above(jnp.array([[1.0, 0.0, 0.0]]), jnp.ones((1, 3)), jnp.ones(1))[0]
    assert short.tolist() == [0]  # no sum is above the target, and the first alone has any weight
    found, rest = first_above(p, cumulative, jnp.array([0.5, 0.5, 1.0, 0.25], jnp.float32))
    assert found.tolist() == [2, 0, 2, 0]
    np.testing.assert_allclose(rest, [0.0, 0.5, 0.5, 0.25], atol=1e-6)


def test_agrees_with_float64():
    random = np.random.default_rng(0)
    p = random.dirichlet(np.full(300, 0.1), size=400).astype(np.float32)
    u = random.uniform(size=400).astype(np.float32)
    place = np.asarray(inverse(p, u))
    exact = np.array([by_hand(row, float(x)) for row, x in zip(p, u, strict=True)])
    assert np.mean(place != exact) < 0.01
    cumulative = np.cumsum(p.astype(np.float64), axis=1)
    for row in np.flatnonzero(place != exact):  # only a target within rounding of a border may differ
        assert abs(cumulative[row, min(place[row], exact[row])] - u[row] * cumulative[row, -1]) < 1e-6


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"temperature": 2.0, "top_k": 6, "top_p": 0.8}, {"vocab_size": 7}]
)
def test_frequencies_and_logp(options, truncated):
    """100,000 draws against the exact distribution (chi-square), and the reported log-prob against it."""
    logits = np.array([0.3, -1.0, 2.0, -np.inf, 1.1, 0.0, 1.9, -0.5, 0.7, 1.2], np.float32)
    exact = truncated(logits, **options)
    uniforms = jax.random.uniform(jax.random.key(5), (100_000,))
    tokens, logp = jax.jit(lambda u: draw_token(jnp.broadcast_to(logits, (u.shape[0], 10)), u, **options))(uniforms)
    tokens, logp = np.asarray(tokens), np.asarray(logp)
    counts = np.bincount(tokens, minlength=10)
    possible = exact > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], exact[possible] * len(tokens)).pvalue > 1e-3
    np.testing.assert_allclose(logp, np.log(exact[tokens]), atol=2e-6)


def test_greedy_ignores_truncation_and_reports_logp_at_one():
    logits = jnp.array([[0.0, 3.0, 1.0, 9.0]])
    token, logp = draw_token(logits, jnp.array([0.9]), temperature=0.1, greedy=True, top_k=1, vocab_size=3)
    assert int(token[0]) == 1
    np.testing.assert_allclose(logp[0], 3.0 - np.log(np.exp([0.0, 3.0, 1.0]).sum()), rtol=1e-6)


def test_top_p_keeps_at_least_one_and_breaks_ties_by_id():
    z = jnp.log(jnp.array([[0.1, 0.6, 0.3], [0.25, 0.25, 0.5]]))
    kept, ids = keep_top_p(z, 1e-6)
    assert ids[:, 0].tolist() == [1, 2] and jnp.isfinite(kept).sum(axis=1).tolist() == [1, 1]
    kept, ids = keep_top_p(jnp.zeros((1, 10)), 0.45)  # the smallest set that reaches .45 of ten equal tokens has five
    assert int(jnp.isfinite(kept).sum()) == 5 and ids[0, :5].tolist() == [0, 1, 2, 3, 4]


def test_top_k_keeps_ties():
    z = jnp.array([[1.0, 2.0, 2.0, 0.0]])
    assert jnp.isfinite(keep_top_k(z, 1)).tolist() == [[False, True, True, False]]
    assert keep_top_k(z, 9) is z


@pytest.mark.parametrize("u", [0.0, float(LARGEST)])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.01}])
def test_barred_tokens_at_the_edges_of_u(u, options):
    """A padded vocabulary of 50,304 with a tokenizer of 50,277, and −inf logits at both ends."""
    logits = np.array(jax.random.normal(jax.random.key(0), (2, 50_304))) * 3
    logits[:, :5] = -np.inf
    logits[:, 50_270:50_277] = -np.inf
    logits[:, 50_277:] = 50.0  # the padded rows would win everything
    tokens, logp = draw_token(jnp.array(logits), jnp.full(2, u, jnp.float32), vocab_size=50_277, **options)
    assert np.all((np.asarray(tokens) >= 5) & (np.asarray(tokens) < 50_270))
    assert np.all(np.isfinite(np.asarray(logp)))


def test_nan_is_seen():
    _, logp = draw_token(jnp.array([[0.0, jnp.nan]]), jnp.array([0.3]))
    assert bool(jnp.isnan(logp[0]))


def test_truncation_as_transformers():
    """The kept sets of transformers' own warpers (tests/golden/make_warpers.py)."""
    golden = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "warpers.json").read_text())
    logits = jnp.array(golden["logits"], jnp.float32)
    for case in golden["cases"]:
        first_row = 1 if case["top_p"] < 1 else 0  # row 0 holds ties, which torch's sort orders as it likes
        z = keep_top_k(logits[first_row:] / case["temperature"], case["top_k"])
        kept = np.isfinite(np.asarray(z))
        if case["top_p"] < 1:
            falling, ids = keep_top_p(z, case["top_p"])
            kept = np.take_along_axis(np.isfinite(np.asarray(falling)), np.argsort(np.asarray(ids), axis=1), axis=1)
        assert [np.flatnonzero(row).tolist() for row in kept] == case["kept"], case
