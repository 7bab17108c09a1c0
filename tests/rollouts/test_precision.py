"""float32 means float32: how exact the products of whole programs are to be, read off what is traced. A CPU computes them all alike."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.lax import Precision

from jaxrlhf.losses import PAIR_LOSSES
from jaxrlhf.models import build_model, config_from_hf
from jaxrlhf.models.encoder import bert_config_from_hf, build_bert
from jaxrlhf.models.lora import adapters
from jaxrlhf.rollouts.generate import sample
from jaxrlhf.steps.pair import make_pair_step, response_scores
from jaxrlhf.steps.state import init_state
from jaxrlhf.types import PairBatch

CONFIG = config_from_hf({**tiny_models.VARIANTS["qwen2"], "num_hidden_layers": 1})
B, L, T = 2, 3, 4
SIDE = (jnp.ones((B, T), jnp.int32), jnp.ones((B, T), bool))
PROMPTS = (jnp.ones((B, L), jnp.int32), jnp.ones((B, L), bool))
SHAPE = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
BERT = bert_config_from_hf({"model_type": "bert", **SHAPE, "max_position_embeddings": 9})


def products(jaxpr: Jaxpr):
    """(dtype of the factors, precision) of every product of a program, those of its loops and of its backward pass included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.invars[0].aval.dtype.name, eqn.params["precision"]  # type: ignore[attr-defined]
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from products(getattr(value, "jaxpr", value))


def asked_for(program, *args):
    return {(dtype, precision and precision[0]) for dtype, precision in products(jax.make_jaxpr(program)(*args).jaxpr)}


def programs(*names, **how):
    """Name → what the products of a program ask for: the sampler, log-probs, scores and both kinds of training step, adapters included."""
    lm, scalar = (build_model(CONFIG, head=head, remat="dots", logits_chunk=2, **how) for head in ("lm", "scalar"))
    key = jax.random.key(0)
    params, reward = (jax.eval_shape(model.init, key) for model in (lm, scalar))
    text = (jnp.concatenate([PROMPTS[0], SIDE[0]], 1), jnp.concatenate([PROMPTS[1], SIDE[1]], 1))
    sampling = {"max_new_tokens": 3, "eos_ids": (1,), "pad_id": 0}
    columns = dict.fromkeys(PAIR_LOSSES["dpo"].columns, jnp.ones(B))
    pairs = PairBatch(*PROMPTS, *SIDE, *SIDE, jnp.ones(B), jnp.ones(B, bool), jnp.arange(B), columns)

    def step(model, loss, params, frozen=None):
        optimizer = optax.sgd(1.0)
        state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
        return asked_for(make_pair_step(model, PAIR_LOSSES[loss], optimizer), state, pairs, frozen)

    found = {
        "sampler": lambda: asked_for(lambda p, k: sample(lm, p, *PROMPTS, k, jnp.arange(B), **sampling), params, key),
        "log-probs": lambda: asked_for(lambda p: lm.score_tokens(p, *text, start=L), params),
        "scores": lambda: asked_for(lambda p: response_scores(scalar, p, *PROMPTS, *SIDE), reward),
        "reward step": lambda: step(scalar, "bradley_terry", reward),
        "adapter step": lambda: step(lm, "dpo", *jax.eval_shape(lambda p: adapters(p, key, r=2, alpha=1.0), params)),
    }
    return {name: found[name]() for name in names or found}


EXACT, FAST = ("float32", Precision.HIGHEST), ("float32", Precision.DEFAULT)


def test_products_of_float32_are_exact_unless_the_config_says_otherwise():
    exact = programs()
    assert exact == {name: {EXACT} for name in exact}
    # Scores are compared by their differences, and the product with their head costs nothing.
    assert programs("sampler", "scores", matmul_precision="default") == {"sampler": {FAST}, "scores": {FAST, EXACT}}


def test_products_of_bfloat16_keep_their_speed():
    low = ("bfloat16", Precision.DEFAULT)
    assert programs("sampler", "reward step", dtype="bfloat16") == {"sampler": {low}, "reward step": {low, FAST, EXACT}}


@pytest.mark.parametrize(("dtype", "precision"), [("float32", Precision.HIGHEST), ("bfloat16", Precision.DEFAULT)])
def test_an_encoder_says_how_exact_its_products_are(dtype, precision):
    bert = build_bert(BERT, dtype=dtype)
    params = jax.eval_shape(bert.init, jax.random.key(0))
    with jax.default_matmul_precision("tensorfloat32"):  # a flag of the process
        assert asked_for(bert.encode, params, np.ones((1, 4), np.int32), np.ones((1, 4), bool)) == {(dtype, precision)}
