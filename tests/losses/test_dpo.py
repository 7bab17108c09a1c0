import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import token_stats

from jaxrlhf.losses import PAIR_LOSSES, bind, dpo_loss, ipo_loss, sequence_logp
from jaxrlhf.losses.dpo import dpo_pair_loss, ipo_mean_pair_loss, ipo_pair_loss
from jaxrlhf.types import PairBatch, PairOutputs

H_CHOSEN, H_REJECTED = jnp.array([1.0, -2.0, 0.3]), jnp.array([0.5, 1.0, 0.3])


def test_by_hand():
    for beta in (0.01, 0.5, 2):
        assert dpo_loss(jnp.full(2, 3.0), jnp.full(2, 3.0), beta=beta) == pytest.approx(math.log(2))
    # β h = log 3: σ = 3/4
    one, zero = jnp.array([2 * math.log(3)]), jnp.zeros(1)
    assert dpo_loss(one, zero, beta=0.5) == pytest.approx(-math.log(0.75))
    assert dpo_loss(one, zero, beta=0.5, label_smoothing=0.1) == pytest.approx(-0.9 * math.log(0.75) - 0.1 * math.log(0.25))
    # the target gap is 1/(2β) = 2.5
    assert ipo_loss(jnp.array([2.5]), zero, beta=0.2) == 0
    assert ipo_loss(jnp.array([0.5]), zero, beta=0.2) == pytest.approx(4)


def test_against_a_loop_with_weights_and_fillers():
    weights, rows = jnp.array([2.0, 0.5, jnp.nan]), jnp.array([True, True, False])
    chosen, rejected = H_CHOSEN.at[2].set(jnp.nan), H_REJECTED.at[2].set(jnp.inf)
    gaps = [(float(c - r), float(w)) for c, r, w in zip(H_CHOSEN[:2], H_REJECTED[:2], weights[:2], strict=True)]
    expected_dpo = sum(w * math.log1p(math.exp(-0.3 * g)) for g, w in gaps) / 2
    expected_ipo = sum(w * (g - 1 / 0.6) ** 2 for g, w in gaps) / 2
    for loss, expected in ((dpo_loss, expected_dpo), (ipo_loss, expected_ipo)):
        value, gradient = jax.value_and_grad(loss)(chosen, rejected, weights, beta=0.3, row_mask=rows)
        assert float(value) == pytest.approx(expected, rel=1e-5)
        assert bool(jnp.all(jnp.isfinite(gradient))) and gradient[2] == 0
        assert bool(jnp.all(jax.grad(loss, argnums=2)(chosen, rejected, weights, beta=0.3, row_mask=rows) == 0))
        empty = jax.value_and_grad(loss)(chosen, rejected, weights, beta=0.3, row_mask=jnp.zeros(3, bool))
        assert empty[0] == 0 and bool(jnp.all(empty[1] == 0))


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss, functools.partial(dpo_loss, label_smoothing=0.2)])
def test_microbatches_and_order(loss):
    whole = float(loss(H_CHOSEN, H_REJECTED, beta=0.4))
    parts = [loss(H_CHOSEN[s], H_REJECTED[s], beta=0.4, total=3) for s in (slice(0, 1), slice(1, 3))]
    assert float(sum(parts)) == pytest.approx(whole, rel=1e-6)
    assert float(loss(H_CHOSEN[::-1], H_REJECTED[::-1], beta=0.4)) == pytest.approx(whole, rel=1e-6)


def test_label_smoothing_is_a_chance_below_a_half():
    for chance in (0.5, -0.1):
        with pytest.raises(ValueError, match=rf"label_smoothing {chance} must lie in \[0, 0\.5\)"):
            dpo_loss(H_CHOSEN, H_REJECTED, beta=0.1, label_smoothing=chance)


def from_golden(data):
    """(logits, tokens, masks, reference) of both sides."""
    return [[jnp.array(side) for side in data["inputs"][key]] for key in ("logits", "tokens", "masks", "reference")]


def pair_batch(masks, reference, weights=None):
    rows = len(reference[0])
    grid = jnp.zeros(masks[0].shape, jnp.int32)
    columns = {"reference_chosen_logp": reference[0], "reference_rejected_logp": reference[1]}
    weights = jnp.ones(rows) if weights is None else weights
    return PairBatch(grid, grid > 0, grid, masks[0], grid, masks[1], weights, jnp.ones(rows, bool), jnp.arange(rows), columns)


CASES = [
    ("dpo", bind(PAIR_LOSSES["dpo"], beta=0.1)),
    ("dpo_smoothed", bind(PAIR_LOSSES["dpo"], beta=0.05, label_smoothing=0.2)),
    ("dpo_weighted", bind(PAIR_LOSSES["dpo"], beta=0.1)),
    ("ipo", bind(PAIR_LOSSES["ipo"], beta=0.2)),
    ("ipo_mean", bind(PAIR_LOSSES["ipo_mean"], beta=0.2)),
    ("wpo", bind(PAIR_LOSSES["wpo"], beta=0.05)),
    ("wpo_free", bind(PAIR_LOSSES["wpo"], beta=0.05, clip=None)),
    ("wpo_smoothed", bind(PAIR_LOSSES["wpo"], beta=0.05, label_smoothing=0.2)),
]


@pytest.mark.parametrize(("name", "entry"), CASES, ids=[name for name, _ in CASES])
def test_against_torch(golden, name, entry):
    """TRL's formulas and those of the authors of WPO: loss, gradient of the logits, and gradient of the sequence log-probs."""
    data = golden("preference_losses")
    expected = data["losses"][name]
    logits, tokens, masks, reference = from_golden(data)
    batch = pair_batch(masks, reference, jnp.array(data["inputs"]["weights"]) if name == "dpo_weighted" else None)

    def outputs(logits):
        sides = [token_stats(x, t) for x, t in zip(logits, tokens, strict=True)]
        logps = [sequence_logp(side.logp_BT, mask) for side, mask in zip(sides, masks, strict=True)]
        return PairOutputs(logps[0], logps[1], sides[0], sides[1])

    value, gradients = jax.value_and_grad(lambda logits: entry.loss(outputs(logits), batch)[0])(logits)
    assert float(value) == pytest.approx(expected["loss"], rel=1e-5)
    np.testing.assert_allclose(gradients, expected["gradients"], rtol=2e-4, atol=1e-6)

    given = outputs(logits)
    of_logps = jax.grad(lambda logps: entry.loss(replace(given, chosen_B=logps[0], rejected_B=logps[1]), batch)[0])(
        [given.chosen_B, given.rejected_B]
    )
    np.testing.assert_allclose(of_logps, expected["logp_gradients"], rtol=2e-4, atol=1e-6)


def test_ipo_per_token_asks_the_same_gap_of_every_length(pairs):
    """Twice the tokens at the same log-ratio per token: the same loss. The sum's loss is another."""
    mask = jnp.array([[True, True, False, False], [True, True, True, True]])
    batch = pair_batch([mask, mask], [jnp.zeros(2), jnp.zeros(2)])
    outputs = PairOutputs(jnp.array([1.0, 2.0]), jnp.array([-0.5, -1.0]))
    one, other = (replace(batch, row_mask_B=jnp.arange(2) == row) for row in range(2))
    assert ipo_mean_pair_loss(outputs, one, beta=0.3)[0] == ipo_mean_pair_loss(outputs, other, beta=0.3)[0] > 0
    assert float(ipo_mean_pair_loss(outputs, one, beta=0.3)[0]) == pytest.approx((0.5 + 0.25 - 1 / 0.6) ** 2, rel=1e-5)
    assert ipo_pair_loss(outputs, one, beta=0.3)[0] != ipo_pair_loss(outputs, other, beta=0.3)[0]
    empty = replace(one, chosen_mask_BT=mask & False)  # counts as one token
    assert float(ipo_mean_pair_loss(outputs, empty, beta=0.3)[0]) == pytest.approx((1 + 0.25 - 1 / 0.6) ** 2, rel=1e-5)
    outputs, batch = pairs  # with rows that fill the batch, and are NaN
    value, gradient = jax.value_and_grad(lambda chosen: ipo_mean_pair_loss(replace(outputs, chosen_B=chosen), batch)[0])(outputs.chosen_B)
    assert bool(jnp.isfinite(value)) and bool(jnp.all(jnp.isfinite(gradient))) and bool(jnp.all(gradient[4:] == 0))


def test_pair_losses_subtract_the_reference_and_report_implicit_rewards(pairs):
    outputs, batch = pairs
    h = [
        outputs.chosen_B - batch.columns["reference_chosen_logp"],
        outputs.rejected_B - batch.columns["reference_rejected_logp"],
    ]
    for pair_loss, loss in ((dpo_pair_loss, dpo_loss), (ipo_pair_loss, ipo_loss)):
        value, _ = pair_loss(outputs, batch, beta=0.3)
        assert float(value) == pytest.approx(float(loss(h[0][:4], h[1][:4], batch.weights_B[:4], beta=0.3)), rel=1e-6)
    for pair_loss in (dpo_pair_loss, ipo_pair_loss, ipo_mean_pair_loss):
        _, metrics = pair_loss(outputs, batch, beta=0.3)
        expected = {"chosen": h[0], "rejected": h[1], "margin": h[0] - h[1]}
        means = {name: 0.3 * float(jnp.mean(value[:4])) for name, value in expected.items()}
        assert {name: float(metrics[name]) for name in means} == pytest.approx(means, rel=1e-5)
