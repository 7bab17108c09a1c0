import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.losses import bradley_terry_loss
from jaxrlhf.losses.bradley_terry import bradley_terry_margin_pair_loss, bradley_terry_pair_loss, pair_metrics

CHOSEN, REJECTED = jnp.array([1.0, 0.0, -2.0]), jnp.array([0.0, 0.0, 1.0])


def loop(chosen, rejected, weights, margin, center, rows, total=None):
    terms = []
    for c, r, w, m, row in zip(chosen, rejected, weights, margin, rows, strict=True):
        if row:
            terms.append(w * (math.log1p(math.exp(-(c - r - m))) + center * (c + r) ** 2))
    return sum(terms) / (total or len(terms))


def test_by_hand():
    assert bradley_terry_loss(jnp.zeros(3), jnp.zeros(3)) == pytest.approx(math.log(2))
    # scores 0 and log 3: σ(log 3) = 3/4
    assert bradley_terry_loss(jnp.array([math.log(3)]), jnp.array([0.0])) == pytest.approx(-math.log(0.75))
    assert bradley_terry_loss(jnp.array([math.log(3)]), jnp.array([0.0]), jnp.array([2.0])) == pytest.approx(-2 * math.log(0.75))
    # a margin of log 3 uses the gap up
    assert bradley_terry_loss(jnp.array([math.log(3)]), jnp.zeros(1), margin=jnp.array([math.log(3)])) == pytest.approx(math.log(2))
    # centring sees the sum of the scores, and the weight multiplies it too
    assert bradley_terry_loss(jnp.ones(1), jnp.ones(1), jnp.array([3.0]), center=0.5) == pytest.approx(3 * (math.log(2) + 2))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_against_a_loop_with_order_and_fillers(seed):
    rng = np.random.default_rng(seed)
    chosen, rejected, margin = (rng.normal(0, 4, 4).astype(np.float32) for _ in range(3))
    weights, rows = rng.random(4).astype(np.float32), rng.random(4) < 0.7
    rows[0] = True
    expected = loop(chosen, rejected, weights, margin, 0.1, rows)
    loss = bradley_terry_loss(chosen, rejected, weights, margin=margin, center=0.1, row_mask=rows)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    order = rng.permutation(4)
    shuffled = [np.where(rows, x, np.nan)[order] for x in (chosen, rejected, weights)]
    again = bradley_terry_loss(*shuffled, margin=margin[order], center=0.1, row_mask=rows[order])
    assert float(again) == pytest.approx(expected, rel=1e-5)


def test_microbatches_with_the_global_total_add_up():
    weights = jnp.array([0.5, 2.0, 1.0])
    whole = bradley_terry_loss(CHOSEN, REJECTED, weights)
    parts = [bradley_terry_loss(CHOSEN[s], REJECTED[s], weights[s], total=3) for s in (slice(0, 1), slice(1, 3))]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


def test_weights_of_one_are_no_weights_bit_for_bit():
    plain = jax.value_and_grad(bradley_terry_loss)(CHOSEN, REJECTED)
    ones = jax.value_and_grad(bradley_terry_loss)(CHOSEN, REJECTED, jnp.ones(3))
    assert plain[0] == ones[0] and bool(jnp.all(plain[1] == ones[1]))


def test_the_mean_is_over_rows_not_over_weights():
    weights = jnp.array([0.5, 2.0, 1.0])
    assert float(bradley_terry_loss(CHOSEN, REJECTED, 10 * weights)) == pytest.approx(
        10 * float(bradley_terry_loss(CHOSEN, REJECTED, weights)), rel=1e-6
    )


def test_weights_carry_no_gradient():
    gradient = jax.grad(bradley_terry_loss, argnums=2)(CHOSEN, REJECTED, jnp.ones(3))
    assert bool(jnp.all(gradient == 0))


def test_extreme_scores_and_fillers_have_finite_gradients():
    chosen, rejected = jnp.array([1e4, -1e4, jnp.nan]), jnp.array([-1e4, 1e4, jnp.inf])
    rows = jnp.array([True, True, False])
    loss, gradient = jax.value_and_grad(bradley_terry_loss)(chosen, rejected, jnp.array([1.0, 1.0, jnp.nan]), center=0.1, row_mask=rows)
    assert bool(jnp.isfinite(loss)) and bool(jnp.all(jnp.isfinite(gradient))) and gradient[2] == 0
    loss, gradient = jax.value_and_grad(bradley_terry_loss)(chosen, rejected, row_mask=jnp.zeros(3, bool))
    assert loss == 0 and bool(jnp.all(gradient == 0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bradley_terry", {}),
        ("bradley_terry_weighted", {"weights": True}),
        ("bradley_terry_margin", {"margin": True}),
        ("bradley_terry_centered", {"center": 0.01}),
    ],
)
def test_against_torch(golden, name, options):
    data = golden("preference_losses")
    inputs = {key: jnp.array(value) for key, value in data["inputs"].items() if key in ("weights", "margin")}
    weights = inputs["weights"] if options.pop("weights", False) else None
    if options.pop("margin", False):
        options["margin"] = inputs["margin"]
    loss, gradients = jax.value_and_grad(lambda c, r: bradley_terry_loss(c, r, weights, **options), argnums=(0, 1))(
        *map(jnp.array, data["inputs"]["scores"])
    )
    expected = data["losses"][name]
    assert float(loss) == pytest.approx(expected["loss"], rel=1e-6)
    np.testing.assert_allclose(gradients, expected["gradients"], rtol=1e-5, atol=1e-7)


def test_metrics_count_rows_once_and_ties_half(pairs):
    _, batch = pairs
    rubbish = jnp.nan
    chosen = jnp.array([2.0, 1.0, 0.0, 0.0, rubbish, rubbish])
    rejected = jnp.array([1.0, 1.0, 3.0, -1.0, rubbish, rubbish])
    metrics = pair_metrics(chosen, rejected, batch)
    assert float(metrics["accuracy"]) == pytest.approx(2.5 / 4)
    assert float(metrics["margin"]) == pytest.approx((1 + 0 - 3 + 1) / 4)
    assert float(metrics["chosen"]) == pytest.approx(0.75) and float(metrics["rejected"]) == pytest.approx(1.0)
    assert float(metrics["weight"]) == pytest.approx(float(jnp.mean(batch.weights_B[:4])))


@pytest.mark.parametrize("loss", [bradley_terry_pair_loss, bradley_terry_margin_pair_loss])
def test_pair_losses_take_the_sides_and_the_margin_in_order(loss, pairs):
    outputs, batch = pairs
    chosen, rejected, weights, margin = (
        x[:4].tolist() for x in (outputs.chosen_B, outputs.rejected_B, batch.weights_B, batch.columns["margin"])
    )
    margin = margin if loss is bradley_terry_margin_pair_loss else [0.0] * 4
    value, metrics = loss(outputs, batch, center=0.1)
    assert float(value) == pytest.approx(loop(chosen, rejected, weights, margin, 0.1, [True] * 4), rel=1e-5)
    expected = {"chosen": np.mean(chosen), "rejected": np.mean(rejected), "margin": np.mean(chosen) - np.mean(rejected)}
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_missing_column_is_named(pairs):
    outputs, batch = pairs
    batch.columns.pop("margin")
    with pytest.raises(KeyError, match=r"'margin'.*reference_chosen_logp"):
        bradley_terry_margin_pair_loss(outputs, batch)
