"""SFT and pair steps: against plain loops, and the same under accumulation, a mesh and pmap, with ragged rows and filler rows."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import sharding
from jaxrlhf.algorithms.reward import held_out_pairs
from jaxrlhf.algorithms.training import held_out
from jaxrlhf.config import RewardConfig, SFTConfig
from jaxrlhf.data.batches import take
from jaxrlhf.losses import PAIR_LOSSES, bind
from jaxrlhf.steps.pair import make_pair_step, pair_outputs, response_scores
from jaxrlhf.steps.sft import make_sft_evaluation, make_sft_step
from jaxrlhf.steps.state import init_state
from jaxrlhf.types import PairLoss, TextBatch

RATE = 1.0  # plain gradient descent: the step's parameters show its gradient


def sgd():
    return optax.sgd(RATE)


def close(a, b, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=atol), a, b)


@pytest.fixture(scope="module")
def sft_runs(tiny, texts):
    """The state and metrics after one step, by way of taking it."""
    batch, state = texts(), init_state(tiny.policy, sgd())

    def take(make, **how):
        return jax.jit(make(**how))(state, batch)

    def make(**how):
        return make_sft_step(tiny.lm, sgd(), **how)

    mesh = sharding.make_mesh(4)
    on_mesh, mapped = (
        sharding.step(make, devices, donate=False)(sharding.place(state, devices), sharding.place_batch(batch, devices))
        for devices in (mesh, sharding.Replicas(mesh))
    )
    return {"whole": take(make), "accumulated": take(make, accumulate=4), "mesh": on_mesh, "pmap": mapped}


@pytest.fixture(scope="module")
def pair_runs(tiny, pairs):
    batch, state = pairs(), init_state(tiny.reward, sgd())
    loss = bind(PAIR_LOSSES["bradley_terry"], center=0.05)

    def make(**how):
        return make_pair_step(tiny.scalar, loss, sgd(), **how)

    mesh = sharding.make_mesh(4)
    on_mesh, mapped = (
        sharding.step(make, devices, donate=False)(sharding.place(state, devices), sharding.place_batch(batch, devices))
        for devices in (mesh, sharding.Replicas(mesh))
    )
    return {
        "whole": jax.jit(make())(state, batch),
        "accumulated": jax.jit(make(accumulate=2))(state, batch),
        "mesh": on_mesh,
        "pmap": mapped,
    }


@pytest.mark.parametrize("way", ["accumulated", "mesh", "pmap"])
@pytest.mark.parametrize("runs", ["sft_runs", "pair_runs"])
def test_every_way_of_taking_a_step_is_the_same_step(runs, way, request):
    """Sums over microbatches and devices with one total: exact for ragged rows, and for a batch of which three rows are filler."""
    runs = request.getfixturevalue(runs)
    (state, metrics), (other, other_metrics) = runs["whole"], sharding.gather(runs[way])
    close(state.params, other.params)
    assert int(other.step) == 1 and set(metrics) == set(other_metrics)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=2e-5, atol=1e-6, err_msg=name)


def plain_logps(tiny, batch: TextBatch, position_ok) -> list[float]:
    """−log π of every token that counts, from the logits of the whole text, row by row."""
    tokens = np.concatenate([batch.prompt_BL, batch.response_BT], axis=1)
    mask = np.concatenate([batch.prompt_mask_BL, batch.response_mask_BT], axis=1)
    logits = np.asarray(jax.jit(tiny.lm.apply)(tiny.policy, tokens, mask).logits, np.float64)
    losses = []
    for b in range(len(tokens)):
        for t in range(1, tokens.shape[1]):
            if batch.row_mask_B[b] and mask[b, t] and mask[b, t - 1] and position_ok(t):
                row = logits[b, t - 1] - logits[b, t - 1].max()
                losses.append(-(row[tokens[b, t]] - np.log(np.exp(row).sum())))
    return losses


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_sft_loss_against_a_plain_loop(tiny, texts, loss_on, sft_runs):
    batch = texts()
    losses = plain_logps(tiny, batch, lambda t: loss_on == "all" or t >= batch.prompt_BL.shape[1])
    if loss_on == "response":
        _, metrics = sft_runs["whole"]
    else:
        _, metrics = jax.jit(make_sft_step(tiny.lm, sgd(), loss_on="all"))(init_state(tiny.policy, sgd()), batch)
    assert float(metrics["tokens"]) == len(losses)
    np.testing.assert_allclose(metrics["loss/sft"], np.mean(losses), rtol=1e-5)


def test_a_look_at_rows_is_a_step_on_them_without_the_step(tiny, texts, pairs, sft_runs, pair_runs):
    """A few rows at a time, with other counts in each batch; on several devices too."""
    batch = texts()
    few = SFTConfig(batch_size=8, gradient_accumulation_steps=2, eval_steps=1)
    seen = held_out(make_sft_evaluation, tiny.lm, "response", lambda: batch, few, None).look(tiny.policy)
    np.testing.assert_allclose(seen["loss"], sft_runs["whole"][1]["loss/sft"], rtol=1e-5)
    tokens, mask = (
        np.concatenate(side, axis=1) for side in ((batch.prompt_BL, batch.response_BT), (batch.prompt_mask_BL, batch.response_mask_BT))
    )
    best = np.argmax(jax.jit(tiny.lm.apply)(tiny.policy, tokens, mask).logits, axis=-1)[:, batch.prompt_BL.shape[1] - 1 : -1]
    counts = np.asarray(batch.response_mask_BT) & np.asarray(batch.row_mask_B)[:, None]
    np.testing.assert_allclose(seen["accuracy"], (best == batch.response_BT)[counts].mean(), rtol=1e-6)
    loss, rows = bind(PAIR_LOSSES["bradley_terry"], center=0.05), pairs()
    mapped = sharding.Replicas(sharding.make_mesh(4))
    params = sharding.place(tiny.reward, mapped)
    seen = held_out_pairs(tiny.scalar, loss, "the loss", rows, RewardConfig(batch_size=4, eval_steps=1), mapped).look(params)
    want = {"loss": pair_runs["whole"][1]["loss/pair"], "accuracy": pair_runs["whole"][1]["pair/accuracy"]}
    assert seen == pytest.approx({name: float(value) for name, value in want.items()}, rel=2e-5)


def test_no_held_out_rows_is_an_error_and_so_is_a_figure_that_nobody_reports(tiny, pairs):
    rows, config = pairs(), RewardConfig(batch_size=8, eval_steps=1, load_best_model_at_end=True, metric_for_best_model="accuracy")
    with pytest.raises(ValueError, match="eval_steps asks for looks at held-out rows, and there are none: hold rows out"):
        held_out_pairs(tiny.scalar, PAIR_LOSSES["bradley_terry"], "the loss", take(rows, np.arange(0)), config, None)
    silent = PairLoss("scalar", (), lambda outputs, batch, *, total=None: (outputs.chosen_B.sum() / total, {}))
    with pytest.raises(ValueError, match="metric_for_best_model is 'accuracy', which the loss does not report; choose by 'loss'"):
        held_out_pairs(tiny.scalar, silent, "the loss", rows, config, None).look(tiny.reward)


def test_sft_refuses_an_unknown_loss_on(tiny):
    with pytest.raises(ValueError, match="loss_on 'prompt' is unknown"):
        make_sft_step(tiny.lm, sgd(), loss_on="prompt")


def score_by_hand(tiny, prompt, prompt_mask, response, mask) -> float:
    """The scalar of the last real token of one text without any padding."""
    text = np.concatenate([prompt[prompt_mask], response[mask]])[None]
    return float(tiny.scalar.apply(tiny.reward, text, np.ones_like(text, bool)).scalars[0, -1])


def test_scores_are_read_at_the_last_response_token(tiny, texts):
    """Whatever the padding on either side; an empty response scores 0, bias or not."""
    batch = texts(filled=0)
    mask = np.array(batch.response_mask_BT)
    mask[5] = False
    scores = jax.jit(lambda *sides: response_scores(tiny.scalar, tiny.reward, *sides, 0.25))(
        batch.prompt_BL, batch.prompt_mask_BL, batch.response_BT, mask
    )
    for b in (0, 3, 7):
        row = [np.asarray(x)[b] for x in (batch.prompt_BL, batch.prompt_mask_BL, batch.response_BT)]
        np.testing.assert_allclose(scores[b], score_by_hand(tiny, *row, mask[b]) - 0.25, rtol=1e-5, atol=1e-6)
    assert float(scores[5]) == 0


def test_weighted_bradley_terry_against_a_plain_loop(tiny, pairs, pair_runs):
    """w multiplies a pair's whole loss, and the mean is over real rows, not over Σw."""
    batch = pairs()
    outputs = jax.jit(lambda batch: pair_outputs(tiny.scalar, tiny.reward, batch, head="scalar"))(batch)
    losses = []
    for b in np.flatnonzero(batch.row_mask_B):
        chosen, rejected = float(outputs.chosen_B[b]), float(outputs.rejected_B[b])
        losses.append(float(batch.weights_B[b]) * (np.log1p(np.exp(-(chosen - rejected))) + 0.05 * (chosen + rejected) ** 2))
    _, metrics = pair_runs["whole"]
    np.testing.assert_allclose(metrics["loss/pair"], np.mean(losses), rtol=1e-5)
    rows = np.asarray(batch.row_mask_B)
    np.testing.assert_allclose(metrics["pair/weight"], np.asarray(batch.weights_B)[rows].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["pair/accuracy"], np.mean(np.asarray(outputs.chosen_B > outputs.rejected_B)[rows]), rtol=1e-6)


def test_unit_weights_change_no_bit_and_zero_weights_teach_nothing(tiny, pairs):
    batch = pairs()
    step = jax.jit(make_pair_step(tiny.scalar, PAIR_LOSSES["bradley_terry"], sgd()))
    state = init_state(tiny.reward, sgd())
    silent, metrics = step(state, replace(batch, weights_B=jnp.zeros(8)))
    assert float(metrics["grad_norm"]) == 0
    jax.tree.map(np.testing.assert_array_equal, silent.params, state.params)
    # A pair of weight 0 and a row that is not there differ in the mean's denominator alone.
    absent = replace(batch, row_mask_B=batch.row_mask_B.at[0].set(False), weights_B=jnp.ones(8))
    muted = replace(batch, weights_B=jnp.ones(8).at[0].set(0.0))
    (_, a), (_, b) = step(state, absent), step(state, muted)
    np.testing.assert_allclose(4 * a["grad_norm"], 5 * b["grad_norm"], rtol=1e-5)


def test_filler_rows_and_padding_teach_nothing(tiny, texts, pairs):
    """What stands in filler rows and under False masks may be anything, EOS included: PAD may be EOS."""
    from itertools import product

    batch = texts()
    step = jax.jit(make_sft_step(tiny.lm, sgd()))
    state = init_state(tiny.policy, sgd())
    ends = [step(state, refilled(batch, ("prompt_BL", "response_BT"), pad))[0].params for pad in (0, 1, 9)]
    for one, other in product(ends[:1], ends[1:]):
        close(one, other, atol=1e-7)

    batch, state = pairs(), init_state(tiny.reward, sgd())
    step = jax.jit(make_pair_step(tiny.scalar, PAIR_LOSSES["bradley_terry"], sgd()))
    ends = [step(state, refilled(batch, ("prompt_BL", "chosen_BT", "rejected_BT"), pad))[0].params for pad in (0, 1, 9)]
    for one, other in product(ends[:1], ends[1:]):
        close(one, other, atol=1e-7)


def refilled(batch, fields, pad):
    """The batch with `pad` under every False mask and in every filler row."""
    changes = {}
    for name in fields:
        mask = getattr(batch, f"{name[:-3]}_mask_{name[-2:]}") & batch.row_mask_B[:, None]
        changes[name] = jnp.where(mask, getattr(batch, name), pad)
    return replace(batch, **changes)


def test_a_missing_column_is_named(tiny, pairs):
    step = make_pair_step(tiny.scalar, PAIR_LOSSES["bradley_terry_margin"], sgd())
    with pytest.raises(ValueError, match="reads column 'margin', but the pairs carry no columns"):
        step(init_state(tiny.reward, sgd()), pairs())


def test_dpo_through_the_pair_step(tiny, pairs):
    """The lm head: policy and reference equal → every log-ratio 0 → loss log 2 and accuracy one half, whatever the lengths."""
    batch = pairs()
    outputs = jax.jit(lambda batch: pair_outputs(tiny.lm, tiny.policy, batch, head="lm"))(batch)
    columns = {"reference_chosen_logp": outputs.chosen_B, "reference_rejected_logp": outputs.rejected_B}
    step = jax.jit(make_pair_step(tiny.lm, PAIR_LOSSES["dpo"], sgd()))
    batch = replace(batch, columns=columns, weights_B=jnp.ones(8))
    _, metrics = step(init_state(tiny.policy, sgd()), batch)
    np.testing.assert_allclose(metrics["loss/pair"], np.log(2), rtol=1e-6)
    assert float(metrics["grad_norm"]) > 0.01


def test_a_row_that_is_not_finite_on_one_device_keeps_the_state_on_all(tiny, pairs):
    """A loss of a user's that goes wrong on one row of eight: parameters are as before on four devices, bit by bit, and `step` counts."""

    def loss(outputs, batch, *, total=None):
        bad = jnp.where(batch.index_B == 2, jnp.inf, 0.0)
        return jnp.sum(outputs.chosen_B - outputs.rejected_B + bad) / total, {}

    batch, mesh = pairs(), sharding.make_mesh(4)
    step = sharding.step(lambda axis_name: make_pair_step(tiny.scalar, PairLoss("scalar", (), loss), sgd(), axis_name=axis_name), mesh)
    state, metrics = step(sharding.place(init_state(jax.tree.map(jnp.copy, tiny.reward), sgd()), mesh), sharding.place_batch(batch, mesh))
    assert (int(state.step), int(metrics["nonfinite"])) == (1, 1) and not np.isfinite(metrics["loss/pair"])
    for leaf, before in zip(jax.tree.leaves(state.params), jax.tree.leaves(tiny.reward), strict=True):
        assert len(leaf.addressable_shards) == 4
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, before)
