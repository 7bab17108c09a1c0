import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import response_mask

from jaxrlhf.losses import masked_count, masked_mean, masked_sum, masked_whiten
from jaxrlhf.losses.masked import row_mean

MASK = jnp.array([[True, True, False], [True, False, False]])


def test_response_mask_by_hand():
    tokens = jnp.array([[5, 2, 7, 2], [2, 2, 2, 2], [5, 6, 7, 8], [5, 6, 7, 2], [5, 9, 2, 5]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    np.testing.assert_array_equal(response_mask(tokens, (2, 9)), np.array(expected, bool))


def test_response_mask_of_one_response():
    assert response_mask(jnp.array([5, 2, 7]), (2,)).tolist() == [True, True, False]


def test_response_mask_without_eos_ids_is_full():
    assert bool(jnp.all(response_mask(jnp.zeros((2, 3), jnp.int32), ())))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=6, max_size=6))
def test_response_mask_against_a_loop(row):
    expected, open_ = [], True
    for token in row:
        expected.append(open_)
        open_ = open_ and token not in (3, 4)
    assert response_mask(jnp.array([row]), (3, 4))[0].tolist() == expected


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf])
def test_what_is_outside_the_mask_reaches_neither_value_nor_gradient(rubbish):
    values = jnp.where(MASK, jnp.arange(6.0).reshape(2, 3), rubbish)
    value, gradient = jax.value_and_grad(masked_mean)(values, MASK)
    assert value == pytest.approx((0 + 1 + 3) / 3)
    np.testing.assert_allclose(gradient, MASK / 3, rtol=1e-6)
    assert masked_sum(values, MASK) == 4
    assert bool(jnp.all(jnp.isfinite(masked_whiten(values, MASK))))
    gradient = jax.grad(lambda x: jnp.sum(masked_whiten(x, MASK) ** 3))(values)
    assert bool(jnp.all(jnp.isfinite(gradient))) and bool(jnp.all(gradient[~MASK] == 0))


def test_an_empty_mask_gives_zero_with_finite_gradients():
    values, nothing = jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool)
    for reduce in (masked_sum, masked_mean, lambda x, m: jnp.sum(masked_whiten(x, m))):
        value, gradient = jax.value_and_grad(reduce)(values, nothing)
        assert value == 0 and bool(jnp.all(gradient == 0))
    assert masked_mean(values, nothing, total=0) == 0


def test_integers_are_averaged_as_floats():
    assert masked_mean(jnp.array([1, 2]), jnp.array([True, True])) == 1.5


def test_totals_make_unequal_microbatches_add_up():
    values = jnp.arange(6.0).reshape(2, 3)
    total = masked_count(MASK)
    parts = [masked_mean(values[i], MASK[i], total=total) for i in range(2)]
    assert float(sum(parts)) == pytest.approx(float(masked_mean(values, MASK)))
    averaged = sum(masked_mean(values[i], MASK[i]) for i in range(2)) / 2
    assert float(averaged) != pytest.approx(float(masked_mean(values, MASK)))


def test_whiten_against_numpy_with_the_biased_variance():
    values = np.random.default_rng(0).normal(2, 3, (2, 3)).astype(np.float32)
    inside = values[np.asarray(MASK)]
    expected = (inside - inside.mean()) / np.sqrt(inside.var() + 1e-8)  # numpy's var is the biased one
    whitened = np.asarray(masked_whiten(values, MASK))
    np.testing.assert_allclose(whitened[np.asarray(MASK)], expected, rtol=1e-5)
    assert np.all(whitened[~np.asarray(MASK)] == 0)
    kept = np.asarray(masked_whiten(values, MASK, shift_mean=False))
    np.testing.assert_allclose(kept[np.asarray(MASK)], expected + inside.mean(), rtol=1e-5)
    assert np.all(kept[~np.asarray(MASK)] == 0)


def test_whiten_over_an_axis_is_that_of_the_global_batch():
    values = np.random.default_rng(1).normal(1, 2, (2, 2, 3)).astype(np.float32)
    mask = jnp.stack([MASK, ~MASK])  # three entries on each shard, in different places
    sharded = jax.vmap(functools.partial(masked_whiten, axis_name="data"), axis_name="data")(values, mask)
    np.testing.assert_allclose(sharded.reshape(4, 3), masked_whiten(values.reshape(4, 3), mask.reshape(4, 3)), rtol=1e-5, atol=1e-6)
    assert not np.allclose(sharded, jax.vmap(masked_whiten)(values, mask), atol=1e-3)


def test_row_mean_divides_by_rows_not_by_weights():
    losses, weights, rows = jnp.array([1.0, 2.0, jnp.nan]), jnp.array([3.0, 0.5, jnp.inf]), jnp.array([True, True, False])
    assert row_mean(losses, weights, rows) == pytest.approx((3 + 1) / 2)
    assert bool(jnp.all(jax.grad(row_mean, argnums=1)(losses, weights, rows) == 0))
    ones = jnp.ones(3)
    assert row_mean(losses, ones, rows) == row_mean(losses, None, rows)
    assert row_mean(losses, weights, rows, total=8) == pytest.approx((3 + 1) / 8)
