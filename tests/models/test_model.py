import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from plain import token_logp

from jaxrlhf.models import build_model, config_from_hf, config_from_shape, with_head
from jaxrlhf.models import model as model_file
from jaxrlhf.models.heads import init_scalar_head

CONFIG = config_from_hf({**tiny_models.VARIANTS["gpt_neox-old-spelling"], "initializer_range": 0.3})
MODEL = build_model(CONFIG)
TIED = config_from_hf({**tiny_models.VARIANTS["qwen2"], "initializer_range": 0.3})
START = 3


def inputs():
    return tiny_models.padded("left")


def test_equal_arguments_give_the_same_functions():
    model = build_model(CONFIG)  # a new one where many others were built since MODEL
    assert build_model(CONFIG) is model
    assert build_model(config_from_hf(dict(CONFIG.hf, reward_bias=1.0))) is model  # what rides along changes no function


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_score_tokens_equals_the_reference_on_full_logits(config, temperature):
    model = build_model(config)
    params = model.init(jax.random.key(0))
    tokens, mask = inputs()
    stats = model.score_tokens(params, tokens, mask, start=START, temperature=temperature)
    logits = model.apply(params, tokens, mask).logits[:, START - 1 : -1]
    np.testing.assert_allclose(stats.logp_BT, token_logp(logits, tokens[:, START:], temperature=temperature), atol=1e-5)
    p = np.asarray(jax.nn.softmax(logits / temperature, axis=-1), np.float64)
    np.testing.assert_allclose(stats.entropy_BT, -(p * np.log(p)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(stats.log_sum_sq_BT, np.log((p**2).sum(-1)), atol=1e-5)


def test_chunks_change_neither_values_nor_gradients():
    params = MODEL.init(jax.random.key(0))
    tokens, mask = inputs()

    def loss(params, chunk):
        stats = MODEL.score_tokens(params, tokens, mask, start=START, temperature=0.7, chunk=chunk)
        return (stats.logp_BT * jnp.arange(1.0, 6.0)).sum() + (stats.entropy_BT**2).sum() + stats.log_sum_sq_BT.sum(), stats

    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    expected_gradient, expected = grad(params, None)
    for chunk in (1, 3):  # 5 positions: one at a time, and uneven
        gradient, stats = grad(params, chunk)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stats, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), gradient, expected_gradient)


def test_logits_of_all_positions_never_exist_when_they_are_many(monkeypatch):
    """Every float32 array of the compiled forward and backward pass is far smaller than [B, T, V]."""
    config, _ = config_from_shape({"family": "llama", "hidden_size": 16, "num_layers": 1, "num_heads": 2}, 5_000, max_positions=64)
    model = build_model(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens, mask = jax.ShapeDtypeStruct((4, 65), jnp.int32), jax.ShapeDtypeStruct((4, 65), bool)
    everything = 4 * 64 * 5_000 * 4

    def temporary_bytes():
        def loss(params, tokens, mask):
            return model.score_tokens(params, tokens, mask, start=1).logp_BT.sum()

        return jax.jit(jax.grad(loss)).lower(params, tokens, mask).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes() > everything
    monkeypatch.setattr(model_file, "LOGITS_AT_ONCE", 4 * 4 * 5_000)
    assert temporary_bytes() < everything / 2


def test_the_logits_at_once_are_those_of_a_device(monkeypatch):
    """With its rows cut over four devices a program may hold four times the logits: chunks of 8 positions, not of 2."""
    config, _ = config_from_shape({"family": "llama", "hidden_size": 8, "num_layers": 1, "num_heads": 2}, 100, max_positions=64)
    monkeypatch.setattr(model_file, "LOGITS_AT_ONCE", 2 * 4 * 100)
    chunks = []
    monkeypatch.setattr(model_file, "chunked_stats", lambda params, states, tokens, temperature, chunk: chunks.append(chunk))
    for shards in (1, 4):
        model = build_model(config, row_shards=shards)
        params = jax.eval_shape(model.init, jax.random.key(0))
        tokens, mask = jax.ShapeDtypeStruct((4, 33), jnp.int32), jax.ShapeDtypeStruct((4, 33), bool)
        jax.eval_shape(lambda *args, model=model: model.score_tokens(*args, start=1), params, tokens, mask)
    assert chunks == [2, 8]


def test_unused_statistics_cost_nothing():
    config, _ = config_from_shape({"family": "llama", "hidden_size": 8, "num_layers": 1, "num_heads": 2}, 2_000, max_positions=64)
    model = build_model(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens, mask = jax.ShapeDtypeStruct((2, 33), jnp.int32), jax.ShapeDtypeStruct((2, 33), bool)

    def transcendentals(*fields):
        def chosen(params, tokens, mask):
            stats = model.score_tokens(params, tokens, mask, start=1)
            return tuple(getattr(stats, name) for name in fields)

        analysis = jax.jit(chosen).lower(params, tokens, mask).compile().cost_analysis()
        return (analysis[0] if isinstance(analysis, list) else analysis)["transcendentals"]

    one, three = transcendentals("logp_BT"), transcendentals("logp_BT", "entropy_BT", "log_sum_sq_BT")
    logits = 2 * 32 * 2_000
    assert one < 1.5 * logits < 2.5 * logits < three


def test_start_zero_has_no_prediction():
    tokens, mask = inputs()
    with pytest.raises(ValueError, match=r"start 0 must lie in 1\.\.7"):
        MODEL.score_tokens(MODEL.init(jax.random.key(0)), tokens, mask, start=0)
    with pytest.raises(ValueError, match="chunk 0"):
        MODEL.score_tokens(MODEL.init(jax.random.key(0)), tokens, mask, start=1, chunk=0)


def test_a_scalar_head_starts_as_the_papers_does():
    kernel = init_scalar_head(jax.random.key(0), 4_095)["kernel"]
    assert kernel.shape == (4_095, 1)
    assert float(kernel.std()) == pytest.approx(4_096**-0.5, rel=0.05)
    assert abs(float(kernel.mean())) < 4 * 4_096**-0.5 / 64


def test_heads_are_exchanged_over_one_backbone():
    params = MODEL.init(jax.random.key(0))
    reward = with_head(params, jax.random.key(1), CONFIG, "scalar")
    assert set(reward["head"]) == {"kernel"} and reward["head"]["kernel"].shape == (32, 1)
    assert all(a is b for a, b in zip(jax.tree.leaves(reward["backbone"]), jax.tree.leaves(params["backbone"]), strict=True))
    assert with_head(reward, jax.random.key(2), CONFIG, "lm")["head"]["kernel"].shape == (32, 29)
    with pytest.raises(ValueError, match="pass key="):
        with_head(params, None, CONFIG, "scalar")
    tied = build_model(TIED).init(jax.random.key(0))
    assert "head" not in tied and "head" not in with_head(with_head(tied, jax.random.key(0), TIED, "scalar"), None, TIED, "lm")
    scalar = build_model(CONFIG, head="scalar")
    assert jax.tree.structure(scalar.init(jax.random.key(0))) == jax.tree.structure(reward)


def test_initial_weights_have_the_configured_spread():
    config, _ = config_from_shape({"family": "gpt2", "hidden_size": 64, "num_layers": 2, "num_heads": 4}, 500, max_positions=32)
    backbone = build_model(config).init(jax.random.key(0))["backbone"]
    assert float(backbone["embed"]["embedding"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(backbone["layers_1"]["mlp"]["up"]["kernel"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(backbone["layers_1"]["mlp"]["down"]["kernel"].std()) == pytest.approx(0.01, rel=0.05)
    assert float(jnp.abs(backbone["layers_0"]["attention"]["q"]["bias"]).max()) == 0
