import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from jaxrlhf.models import activations, build_model, config_from_hf, config_from_shape
from jaxrlhf.models.transformer import DecoderConfig, position_ids

B, L = 3, 8
LENGTHS = (8, 3, 5)


@functools.cache
def model_of(name, head="lm"):
    config = config_from_hf({**tiny_models.VARIANTS[name], "initializer_range": 0.3})
    model = build_model(config, head=head)
    return model, model.init(jax.random.key(1)), jax.jit(model.apply, static_argnames="start")


def batch(side="left", width=L, fill=0):
    """Three ragged rows of random tokens."""
    rng = np.random.default_rng(0)
    tokens, mask = np.full((B, width), fill), np.zeros((B, width), bool)
    for row, length in enumerate(LENGTHS):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        tokens[row, where], mask[row, where] = rng.integers(2, 29, length), True
    return tokens, mask


def test_position_ids_count_real_tokens():
    mask = np.asarray([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox-old-spelling", "mistral-window", "qwen3"])
def test_padding_side_amount_and_content_change_nothing(name):
    _, params, apply = model_of(name)
    tokens, mask = batch()
    expected = np.asarray(apply(params, tokens, mask).logits)[mask]
    # 10_000 and -100 lie outside the vocabulary: a padding id must reach nothing.
    for side, width, fill in (("right", L, 0), ("left", L, 10_000), ("left", L + 5, -100)):
        other, other_mask = batch(side, width, fill)
        np.testing.assert_allclose(np.asarray(apply(params, other, other_mask).logits)[other_mask], expected, atol=2e-5)


def test_batch_mates_change_nothing():
    _, params, apply = model_of("gpt_neox-old-spelling")
    tokens, mask = batch()
    expected = apply(params, tokens, mask).logits[1]
    shuffled = tokens.copy()
    shuffled[[0, 2]] = 3
    np.testing.assert_allclose(
        apply(params, shuffled, np.where([[True], [False], [True]], True, mask)).logits[1, -3:], expected[-3:], atol=1e-6
    )


@pytest.mark.parametrize("name", ["gpt2", "mistral-window"])
def test_a_row_of_padding_gives_finite_values_and_gradients(name):
    model, params, apply = model_of(name)
    tokens, mask = batch()
    mask[1] = False
    assert np.isfinite(apply(params, tokens, mask).logits).all()

    def loss(params):
        return jnp.where(mask[:, 4:], model.score_tokens(params, tokens, mask, start=4).logp_BT, 0).sum()

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox-sequential", "mistral-window", "qwen3"])
def test_prefill_and_decode_equal_the_full_forward(name):
    model, params, apply = model_of(name)
    prompt, mask = batch()
    new = np.random.default_rng(1).integers(2, 29, (B, 5))
    full_mask = np.concatenate([mask, np.ones_like(new, bool)], axis=1)
    expected = apply(params, np.concatenate([prompt, new], axis=1), full_mask).logits
    logits, cache = model.prefill(params, prompt, mask, length=L + 7)  # room to spare
    decode = jax.jit(model.decode)
    for t in range(5):
        np.testing.assert_allclose(logits, expected[:, L - 1 + t], atol=1e-5)
        logits, cache = decode(params, new[:, t], cache)
    np.testing.assert_allclose(logits, expected[:, -1], atol=1e-5)
    assert cache.keys[0].shape[2] == L + 7 and int(cache.index) == L + 5
    assert cache.position_B.tolist() == [length + 5 for length in LENGTHS]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox-old-spelling", "qwen3"])
def test_start_gives_the_last_positions_of_the_full_forward(name):
    _, params, apply = model_of(name)
    tokens, mask = batch()
    np.testing.assert_allclose(apply(params, tokens, mask, start=5).logits, apply(params, tokens, mask).logits[:, 5:], atol=1e-5)


def test_start_of_scalars():
    _, params, apply = model_of("llama", "scalar")
    tokens, mask = batch()
    full = apply(params, tokens, mask).scalars
    assert full.shape == (B, L)
    np.testing.assert_allclose(apply(params, tokens, mask, start=6).scalars, full[:, 6:], atol=1e-5)


def test_a_window_hides_distant_keys():
    """One layer and a window of 3: the logits at t depend on tokens t−2..t, and on no other."""
    hf = {**tiny_models.VARIANTS["mistral-window"], "num_hidden_layers": 1, "initializer_range": 0.3}
    model = build_model(config_from_hf(hf))
    params = model.init(jax.random.key(0))
    tokens, mask = np.arange(2, 10)[None], np.ones((1, 8), bool)
    base = model.apply(params, tokens, mask).logits[0, -1]
    for slot, matters in ((4, False), (5, True)):
        changed = tokens.copy()
        changed[0, slot] = 20
        assert (np.abs(model.apply(params, changed, mask).logits[0, -1] - base).max() > 1e-3) == matters


def test_bfloat16_computes_the_same_function():
    config = config_from_hf({**tiny_models.VARIANTS["gpt_neox-old-spelling"], "initializer_range": 0.1})
    tokens, mask = batch()
    params = build_model(config).init(jax.random.key(0))
    low = build_model(config, dtype="bfloat16").apply(params, tokens, mask).logits
    exact = build_model(config).apply(params, tokens, mask).logits
    assert low.dtype == jnp.float32
    error = np.abs(low - exact)[mask].max()
    assert 0 < error < 0.03 * np.abs(exact)[mask].max()


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_saved_derivatives_equal_autodiff(name):
    plain = {"gelu": lambda x: jax.nn.gelu(x, approximate=False), "gelu_tanh": jax.nn.gelu, "silu": jax.nn.silu}[name]
    x = jnp.concatenate([jnp.linspace(-6, 6, 201), jnp.asarray([0.0, -40.0, 40.0])])
    value, pullback = jax.vjp(activations.ACTIVATIONS[name], x)
    expected, expected_pullback = jax.vjp(plain, x)
    cotangent = jnp.cos(x)
    np.testing.assert_allclose(value, expected, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(pullback(cotangent)[0], expected_pullback(cotangent)[0], atol=2e-6)


def test_learned_positions_have_an_end():
    config, _ = config_from_shape({"family": "gpt2", "hidden_size": 8, "num_layers": 1, "num_heads": 2}, 11, max_positions=6)
    model = build_model(config)
    params = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match="7 positions exceed the 6"):
        model.apply(params, np.zeros((1, 7), int), np.ones((1, 7), bool))
    with pytest.raises(ValueError, match="length 9 exceeds the 6"):
        model.prefill(params, np.zeros((1, 3), int), np.ones((1, 3), bool), length=9)


def test_errors_name_the_value_and_the_rule():
    sizes = {"vocab_size": 5, "hidden_size": 8, "num_layers": 1, "head_dim": 4, "intermediate_size": 8, "max_positions": 8}
    with pytest.raises(ValueError, match="num_heads 3 is not a multiple of num_kv_heads 2"):
        DecoderConfig("llama", num_heads=3, num_kv_heads=2, rotary_dim=4, **sizes)
    with pytest.raises(ValueError, match="rotary_dim 3 must be even"):
        DecoderConfig("llama", num_heads=2, num_kv_heads=2, rotary_dim=3, **sizes)
    with pytest.raises(ValueError, match="'reward' is not one of"):
        model_of("llama", "reward")
    model, params, _ = model_of("llama")
    tokens, mask = batch()
    with pytest.raises(ValueError, match="length 4 is less than the 8"):
        model.prefill(params, tokens, mask, length=4)
    with pytest.raises(ValueError, match="start 8 must lie"):
        model.apply(params, tokens, mask, start=8)
    scalar, scalar_params, _ = model_of("llama", "scalar")
    with pytest.raises(ValueError, match="score_tokens needs head 'lm'"):
        scalar.score_tokens(scalar_params, tokens, mask, start=2)
