"""What saves memory changes nothing beyond rounding: rematerialisation and the chunked head, in values, gradients and compiled programs."""

import math
import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from jaxrlhf import sharding
from jaxrlhf.losses import PAIR_LOSSES
from jaxrlhf.models import build_model, config_from_hf, config_from_shape, initialise, load, save
from jaxrlhf.steps.pair import make_pair_step
from jaxrlhf.steps.sft import make_sft_step
from jaxrlhf.steps.state import init_state
from jaxrlhf.types import PairBatch, TextBatch

CONFIG = config_from_hf({**tiny_models.VARIANTS["llama"], "initializer_range": 0.3, "num_hidden_layers": 2})
WIDE, _ = config_from_shape({"family": "llama", "hidden_size": 16, "num_layers": 1, "num_heads": 2}, 1_024, max_positions=64)
B, L, T, CHUNK = 4, 8, 16, 2
S: Any = jax.ShapeDtypeStruct


@cache
def loss_and_gradient(remat="none", logits_chunk=None):
    model, (tokens, mask) = build_model(CONFIG, remat=remat, logits_chunk=logits_chunk), tiny_models.padded("left")

    def loss(params):
        stats = model.score_tokens(params, tokens, mask, start=3, temperature=0.7)
        return (stats.logp_BT * jnp.arange(1.0, 6.0)).sum() + (stats.entropy_BT**2).sum()

    return jax.jit(jax.value_and_grad(loss))(build_model(CONFIG).init(jax.random.key(0)))


@pytest.mark.parametrize("how", [{"remat": "dots"}, {"remat": "full"}, {"logits_chunk": 2}], ids=str)
def test_nothing_changes_beyond_rounding(how):
    """The same operations in float32, some in another order: a few units in the last place of the loss and of the gradient's norm."""
    (loss, gradient), (expected, expected_gradient) = loss_and_gradient(**how), loss_and_gradient()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    norm, apart = optax.tree.norm(expected_gradient), optax.tree.norm(jax.tree.map(jnp.subtract, gradient, expected_gradient))
    assert apart <= 1e-6 * norm


def test_remat_saves_what_its_name_says():
    """The arrays that the forward pass leaves for the backward pass, parameters aside: the input of each layer under "full"; under "dots"
    also what its products with kernels give; attention weights and element-wise results under "none" alone."""
    config, _ = config_from_shape({"family": "gpt_neox", "hidden_size": 32, "num_layers": 3, "num_heads": 2}, 64, max_positions=64)
    tokens, mask = S((8, 24), jnp.int32), S((8, 24), bool)

    def saved(remat) -> list[tuple[int, ...]]:
        model = build_model(config, remat=remat)
        params = jax.eval_shape(model.init, jax.random.key(0))
        pullback = jax.eval_shape(
            lambda *args: jax.vjp(lambda p: model.score_tokens(p, *args[1:], start=1).logp_BT, args[0])[1], params, tokens, mask
        )
        return [leaf.shape for leaf in jax.tree.leaves(pullback) if leaf.dtype == jnp.float32 and leaf.shape[:1] == (8,)]

    shapes = {remat: saved(remat) for remat in ("none", "dots", "full")}
    weights, hidden, inner = (8, 2, 23, 23), (8, 23, 32), (8, 23, 128)
    elements = {remat: sum(map(math.prod, of)) for remat, of in shapes.items()}
    assert elements["full"] < 0.6 * elements["dots"] < 0.6 * 0.6 * elements["none"]
    assert shapes["none"].count(weights) >= 3 and weights not in shapes["dots"] and inner in shapes["dots"]
    assert inner not in shapes["full"] and 3 <= shapes["full"].count(hidden) < shapes["dots"].count(hidden)


def sides(rows=B):
    return S((rows, L), jnp.int32), S((rows, L), bool), S((rows, T), jnp.int32), S((rows, T), bool)


def text_step(model, **how):
    optimizer = optax.adamw(1e-3)
    state = jax.eval_shape(lambda key: init_state(model.init(key), optimizer), jax.random.key(0))
    return make_sft_step(model, optimizer, **how), state, TextBatch(*sides(), S((B,), bool), S((B,), jnp.int32))


def pair_step(model):
    optimizer, loss = optax.adamw(1e-3), PAIR_LOSSES["wpo"]
    state = jax.eval_shape(lambda key: init_state(model.init(key), optimizer), jax.random.key(0))
    columns = {name: S((B,), jnp.float32) for name in loss.columns}
    batch = PairBatch(*sides(), *sides()[2:], S((B,), jnp.float32), S((B,), bool), S((B,), jnp.int32), columns)
    return make_pair_step(model, loss, optimizer), state, batch


def largest_float(compiled) -> int:
    """Elements of the largest float array of a compiled program, fused or not."""
    shapes = re.findall(r"\b(?:f32|bf16|f16)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("stage", ["sft-accumulated", "wpo"])
def test_logits_of_all_positions_exist_in_no_step(stage):
    """No float array of a training step, fused or not, is as large as [B, T, V]; without chunks there is one."""

    def largest(chunk):
        model = build_model(WIDE, logits_chunk=chunk)
        made = pair_step(model) if stage == "wpo" else text_step(model, accumulate=2)
        return largest_float(jax.jit(made[0]).lower(*made[1:]).compile())

    rows = {"sft-accumulated": B // 2, "wpo": 2 * B}[stage]
    assert largest(CHUNK) == max(rows * CHUNK, WIDE.hidden_size) * WIDE.vocab_size  # the logits of a chunk, or the kernel of the head
    if stage == "sft-accumulated":
        assert largest(None) == rows * T * WIDE.vocab_size


def test_prefill_makes_logits_of_one_position():
    model = build_model(WIDE)
    params = jax.eval_shape(model.init, jax.random.key(0))
    prefill = jax.jit(model.prefill, static_argnames="length").lower(params, S((24, L), jnp.int32), S((24, L), bool), length=L + T)
    assert largest_float(prefill.compile()) == 24 * WIDE.vocab_size  # and not 24 · L · V


def test_a_step_writes_its_new_state_over_the_old_one():
    step, state, batch = text_step(build_model(WIDE))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    analysis = sharding.step(lambda axis_name: step, None).lower(state, batch).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == size


def test_the_knobs_reach_the_model(tmp_path):
    """Through `initialise` and `load`; equal knobs are one model, and others are not."""
    made = initialise(CONFIG, key=jax.random.key(0), remat="dots", logits_chunk=3)
    assert made.model is build_model(CONFIG, remat="dots", logits_chunk=3) is not build_model(CONFIG)
    save(made, tmp_path / "model")
    read = load(tmp_path / "model", remat="full")
    assert read.model is build_model(read.config, remat="full") is not build_model(read.config)
    mesh = sharding.make_mesh(1, 2, 2)
    for model in (load(tmp_path / "model", mesh=mesh).model, initialise(read.config, key=jax.random.key(0), mesh=mesh).model):
        assert model is build_model(read.config, **sharding.row_constraints(mesh)) is not build_model(read.config)


def test_errors_name_the_value_and_the_rule():
    with pytest.raises(ValueError, match="remat 'some' is not one of none, dots, full"):
        build_model(CONFIG, remat="some")
    with pytest.raises(ValueError, match="logits_chunk 0 must be at least 1"):
        build_model(CONFIG, logits_chunk=0)
