"""The sampler and the scorer on real (tiny) transformers: a parallel rotary one and one with learned positions."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models import build_model, config_from_shape, load
from jaxrlhf.rollouts.credit import gae_credit
from jaxrlhf.rollouts.generate import generate
from jaxrlhf.rollouts.score import RolloutModels, score_rollout
from jaxrlhf.sharding import make_mesh, place, place_batch
from jaxrlhf.types import PromptBatch

VOCABULARY, B, L, T, EOS = 40, 8, 6, 10, 3
KEY = jax.random.key(11)


def tiny(family: str, head: str = "lm", seed: int = 0):
    shape = {"family": family, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    model = build_model(config_from_shape(shape, VOCABULARY, max_positions=64)[0], head=head)
    # Fresh parameters give almost uniform tokens; larger matrices give the model opinions.
    return model, jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, model.init(jax.random.key(seed)))


FAMILIES = ("gpt_neox", "gpt2")
MODELS = {family: tiny(family) for family in FAMILIES}


def prompts(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    mask = np.arange(L) >= random.integers(0, L - 1, B)[:, None]
    return np.where(mask, random.integers(4, VOCABULARY, (B, L)), EOS).astype(np.int32), mask  # PAD is EOS


def run(family: str, tokens: np.ndarray | None = None, mask: np.ndarray | None = None, **options):
    model, params = MODELS[family]
    if tokens is None or mask is None:
        tokens, mask = prompts()
    return generate(model, params, tokens, mask, KEY, **{"max_new_tokens": T, "eos_ids": (EOS,), "temperature": 1.3, **options})


@partial(jax.jit, static_argnames=("family", "temperature"))
def scored(family, tokens, mask, done, temperature):
    model, params = MODELS[family]
    text, text_mask = jnp.concatenate([tokens, done.tokens_BT], 1), jnp.concatenate([mask, done.mask_BT], 1)
    return model.score_tokens(params, text, text_mask, start=L, temperature=temperature).logp_BT


@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_logp_is_what_score_tokens_says(family):
    """At temperature 1.3, where a sampler that ignores it or forgets positions under left padding would differ; greedy reports 1."""
    tokens, mask = prompts()
    with jax.default_matmul_precision("highest"):
        done, greedy = run(family), run(family, temperature=0)
        again, greedy_again = scored(family, tokens, mask, done, 1.3), scored(family, tokens, mask, greedy, 1.0)
    lengths = np.asarray(done.mask_BT).sum(axis=1)
    assert (lengths < T).any() and (lengths > 1).all()
    assert np.abs(np.where(done.mask_BT, done.logp_BT - again, 0)).max() < 1e-5
    assert np.abs(np.where(greedy.mask_BT, greedy.logp_BT - greedy_again, 0)).max() < 1e-5
    assert np.asarray(done.logp_BT)[np.asarray(done.mask_BT)].std() > 0.1


def test_greedy_is_the_argmax_of_full_forward_passes():
    model, params = MODELS["gpt2"]
    tokens, mask = prompts()
    done = run("gpt2", temperature=0, eos_ids=())
    text = np.concatenate([tokens, np.zeros((B, T), np.int32)], axis=1)
    apply = jax.jit(model.apply)
    for t in range(T):  # right padding is masked, so one shape serves every length
        seen = np.concatenate([mask, np.broadcast_to(np.arange(T) < t, (B, T))], axis=1)
        logits = apply(params, text, seen).logits
        text[:, L + t] = np.asarray(logits)[:, L + t - 1].argmax(axis=1)
    assert np.array_equal(done.tokens_BT, text[:, L:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_its_own(family):
    """Other batch mates, another order, five more columns of padding filled with garbage: the same text."""
    tokens, mask = prompts()
    whole = run(family)
    order = np.array([6, 1, 4])
    wide = np.concatenate([np.full((3, 5), 17, np.int32), tokens[order]], axis=1)
    wide_mask = np.concatenate([np.zeros((3, 5), bool), mask[order]], axis=1)
    part = run(family, wide, wide_mask, index_B=order)
    assert np.array_equal(part.tokens_BT, np.asarray(whole.tokens_BT)[order])
    assert np.array_equal(part.mask_BT, np.asarray(whole.mask_BT)[order])
    np.testing.assert_allclose(part.logp_BT, np.asarray(whole.logp_BT)[order], atol=1e-5)


def test_samples_of_one_prompt():
    tokens, mask = prompts()
    tokens, mask = np.repeat(tokens[:1], B, axis=0), np.repeat(mask[:1], B, axis=0)
    texts = {tuple(row) for row in np.asarray(run("gpt2", tokens, mask).tokens_BT).tolist()}
    assert len(texts) == B
    same = run("gpt2", tokens, mask, index_B=np.zeros(B, np.int32))
    assert len({tuple(row) for row in np.asarray(same.tokens_BT).tolist()}) == 1


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "tensor": 2}])
def test_on_a_mesh(axes):
    """Sharded parameters and rows in, the same text out, still cut over the data axis."""
    model, params = MODELS["gpt_neox"]
    tokens, mask = prompts()
    mesh = make_mesh(**axes)
    prompt, prompt_mask, index = place_batch((tokens, mask, np.arange(B, dtype=np.int32)), mesh)
    done = generate(
        model, place(params, mesh), prompt, prompt_mask, KEY,
        max_new_tokens=T, eos_ids=(EOS,), temperature=1.3, index_B=index,
    )  # fmt: skip
    whole = run("gpt_neox")
    assert np.array_equal(done.tokens_BT, whole.tokens_BT) and np.array_equal(done.mask_BT, whole.mask_BT)
    np.testing.assert_allclose(done.logp_BT, whole.logp_BT, atol=1e-5)
    assert done.tokens_BT.sharding.shard_shape((B, T)) == (B // axes["data"], T)


def test_rollout_of_four_transformers():
    """Policy = reference: no KL at a temperature far from 1; scores and values are those of an unpadded row."""
    model, params = MODELS["gpt2"]
    scalar, scalar_params = tiny("gpt2", head="scalar", seed=5)
    scalar_params = scalar_params | {"head": jax.tree.map(lambda x: x + 0.1, scalar_params["head"])}
    models = RolloutModels(model, model, scalar, scalar)
    all_params = {"policy": params, "reference": params, "critic": scalar_params, "reward": scalar_params}
    tokens, mask = prompts()
    done = run("gpt2")

    options = {"temperature": 1.3, "eos_ids": (EOS,), "missing_eos_score": -1.0, "microbatch": 4}
    batch = PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.ones(B, bool), jnp.arange(B))
    credit = partial(gae_credit, kl_coef=0.05, gamma=1.0, lam=0.95)
    rollout, metrics = jax.jit(partial(score_rollout, models, credit=credit, **options))(all_params, batch, done)
    assert float(metrics["kl/penalty"]) == 0 and float(metrics["rollout/decode_mismatch"]) < 1e-5
    assert abs(float(jnp.where(rollout.mask_BT, rollout.advantages_BT, 0).sum())) < 1e-3

    # One row by itself, without any padding: the score is read at its EOS.
    apply = jax.jit(scalar.apply)
    row = int(np.argmax(np.asarray(done.mask_BT).sum(axis=1) < T))
    text = np.concatenate([tokens[row][mask[row]], np.asarray(done.tokens_BT)[row][np.asarray(done.mask_BT)[row]]])
    assert text[-1] == EOS
    alone = apply(scalar_params, text[None], np.ones((1, len(text)), bool)).scalars
    np.testing.assert_allclose(rollout.scores_B[row], alone[0, -1], rtol=1e-4, atol=1e-5)
    n = int(np.asarray(done.mask_BT)[row].sum())
    values = np.asarray(alone)[0, len(text) - n - 1 :]  # one before every token, and one after the last: n + 1 in all
    np.testing.assert_allclose(rollout.values_BT[row, : n + 1], values, rtol=1e-4, atol=1e-5)
    no_eos = ~(np.where(done.mask_BT, done.tokens_BT, -1) == EOS).any(axis=1)
    assert no_eos.any() and (np.asarray(rollout.scores_B)[no_eos] == -1).all() and float(rollout.scores_B[row]) != -1


def test_stories(real_data):
    """Greedy text of a trained model, token for token, and its log-probs, against a float64 reference."""
    folder = real_data / "models" / "stories260K"
    golden = json.loads((folder / "golden.json").read_text())
    loaded = load(folder)
    with jax.default_matmul_precision("highest"):
        done = generate(
            loaded.model, loaded.params, np.array([[golden["ids"][0]]], np.int32), np.ones((1, 1), bool), KEY,
            max_new_tokens=len(golden["token_logprobs"]), eos_ids=(1, 2), temperature=0,
        )  # fmt: skip
    assert bool(done.mask_BT.all())
    assert done.tokens_BT[0].tolist() == golden["ids"][1:]
    np.testing.assert_allclose(done.logp_BT[0], golden["token_logprobs"], atol=1e-4)
