"""Recipes: every one resolves, and the steps of the large ones can be built at their real architectures without computing anything."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf.algorithms.policy_updates import ppo_trainer
from jaxrlhf.algorithms.ppo import num_updates
from jaxrlhf.algorithms.reward import pair_trainer, reward_loss
from jaxrlhf.algorithms.rounds import METHODS, method_of, num_rounds
from jaxrlhf.algorithms.training import sft_trainer
from jaxrlhf.models.families import config_from_hf
from jaxrlhf.models.model import build_model
from jaxrlhf.plugins import plugin
from jaxrlhf.recipe import arms, from_mapping, load_config, recipe_folder, to_mapping
from jaxrlhf.steps.state import init_state
from jaxrlhf.types import PairBatch, PromptBatch, TextBatch

RECIPES = sorted(path.name for path in recipe_folder().glob("*.yaml"))

# What config.json of the two base models says, and their published numbers of parameters.
PYTHIA_1B = {
    "model_type": "gpt_neox", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 8192,
    "vocab_size": 50304, "max_position_embeddings": 2048, "rotary_pct": 0.25, "rotary_emb_base": 10000, "hidden_act": "gelu",
    "layer_norm_eps": 1e-5, "use_parallel_residual": True, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
QWEN25_1P5B = {
    "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "intermediate_size": 8960, "vocab_size": 151936, "max_position_embeddings": 131072, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "use_sliding_window": False, "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151643,
}  # fmt: skip
LARGE = {
    "tldr_pythia1b_ocrm.yaml": (PYTHIA_1B, 50277, 1_011_781_632),
    "alpaca_qwen1.5b_ocrm.yaml": (QWEN25_1P5B, 151665, 1_543_714_304),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_resolves_and_opens_with_its_command(name):
    config = load_config(name)
    assert from_mapping(to_mapping(config)) == config
    for one in arms(config).values():
        assert num_rounds(method_of(one.method, one.row, plugin), one.rounds) >= 1
        reward_loss(one.reward, plugin)
    first = (recipe_folder() / name).read_text(encoding="utf-8").splitlines()[0]
    assert re.match(rf"# jaxrlhf \w+ configs/{re.escape(name)}\b", first), "the first line of a recipe is the command that runs it"


@pytest.mark.parametrize("name", LARGE)
def test_published_hyperparameters(name):
    """The figures both scripts share, and those in which they differ."""
    c = load_config(name)
    assert (c.method, c.rounds, c.pairs.num_pairs, c.pairs.temperature, c.pairs.label) == ("ocrm", 3, 278_496, 1.0, "argmax")
    assert (c.weights.alpha, c.weights.eta, c.weights.normalize, c.weights.temperature) == (0.1, 0.001, "none", 1.0)
    for section, schedule in ((c.sft, "cosine"), (c.reward, "cosine"), (c.ppo, "linear")):
        assert (section.learning_rate, section.lr_scheduler_type, section.warmup_steps) == (3e-6, schedule, 0)
        assert (section.adam_beta1, section.adam_beta2, section.adam_epsilon, section.weight_decay) == (0.9, 0.999, 1e-5, 0.01)
        assert section.max_grad_norm is None
    assert (c.sft.num_train_epochs, c.sft.batch_size, c.sft.loss_on, c.reward.num_train_epochs) == (1, 128, "all", 1)
    p = c.ppo
    assert (p.total_episodes, p.batch_size, p.num_mini_batches, p.num_ppo_epochs, num_updates(p)) == (100_000, 512, 1, 4, 195)
    assert (p.cliprange, p.cliprange_value, p.vf_coef, p.gamma, p.lam) == (0.2, 0.2, 0.1, 1.0, 0.95)
    assert (p.temperature, p.missing_eos_score, p.missing_eos_penalty, p.whiten_rewards) == (0.7, -1.0, None, False)
    assert (p.kl_estimator, p.adaptive_kl, p.entropy_coef, p.score_placement, p.kl_coef_previous) == ("k1", False, 0.0, "after_eos", None)
    own = {"tldr": (53, 192, 0.05), "alpa": (106, 128, 0.1)}[name[:4]]
    assert (p.response_length, c.reward.batch_size, p.kl_coef) == own
    assert (c.data.limits.max_prompt_length, c.data.limits.max_response_length) == (512, own[0])


def shapes(rows, *fields):
    """ShapeDtypeStructs for the fields of a batch: a width, or None for one value a row."""
    kinds = {"tokens": jnp.int32, "mask": jnp.bool_, "index": jnp.int32, "weights": jnp.float32}
    return [jax.ShapeDtypeStruct((rows,) if width is None else (rows, width), kinds[kind]) for kind, width in fields]


def unchanged(before, after):
    """The same tree of the same shapes and types: what a compiled step needs to be called again."""
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def built(name, layers=None):
    """Recipe, models and the shapes of their parameters. `layers`: all of a model's layers have the same shapes, so two can stand for
    all where tracing every one of them would take the time of a whole test suite."""
    hf, vocabulary, count = LARGE[name]
    config, decoder = load_config(name), config_from_hf(hf | ({"num_hidden_layers": layers} if layers else {}))
    policy, scalar = (build_model(decoder, head=head, dtype=config.model.dtype) for head in ("lm", "scalar"))
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = [jax.eval_shape(model.init, key) for model in (policy, scalar)]
    assert layers or sum(leaf.size for leaf in jax.tree.leaves(params[0])) == count
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    limits = config.data.limits
    return config, vocabulary, policy, scalar, *params, limits.max_prompt_length, limits.max_response_length


@pytest.fixture(scope="module", params=LARGE)
def two_layers(request):
    return built(request.param, layers=2)


@pytest.mark.parametrize("name", LARGE)
def test_sft_step_builds_at_full_depth(name):
    """Here the number of parameters is the published one, too."""
    config, _, policy, _, params, _, L, T = built(name)
    optimizer, step = sft_trainer(policy, config.sft, 900, None)
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    batch = TextBatch(
        *shapes(config.sft.batch_size, ("tokens", L), ("mask", L), ("tokens", T), ("mask", T), ("mask", None), ("index", None))
    )
    after, metrics = jax.eval_shape(step, state, batch)
    unchanged(state, after)
    assert metrics["loss/sft"].shape == () and metrics["loss/sft"].dtype == jnp.float32


def test_reward_step_builds(two_layers):
    config, _, _, scalar, _, params, L, T = two_layers
    optimizer, step = pair_trainer(scalar, reward_loss(config.reward, plugin), config.reward, 1450, None)
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    sides = [("tokens", L), ("mask", L), ("tokens", T), ("mask", T), ("tokens", T), ("mask", T)]
    batch = PairBatch(*shapes(config.reward.batch_size, *sides, ("weights", None), ("mask", None), ("index", None)))
    after, metrics = jax.eval_shape(step, state, batch)
    unchanged(state, after)
    assert all(value.shape == () for value in metrics.values())


def test_ppo_builds(two_layers):
    """Sampler, scoring with all five models of a later round, and the update, one handing its arrays to the next."""
    config, vocabulary, policy, scalar, params, head, L, T = two_layers
    B = config.ppo.batch_size
    trainer = ppo_trainer(policy, scalar, config.ppo, plugin, eos_ids=(0,), pad_id=0, vocab_size=vocabulary)
    prompts = PromptBatch(*shapes(B, ("tokens", L), ("mask", L), ("mask", None), ("index", None)))
    key, number = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.float32)
    completion = jax.eval_shape(trainer.sample, params, prompts, key)
    assert completion.tokens_BT.shape == completion.logp_BT.shape == (B, T) and completion.logp_BT.dtype == jnp.float32
    controller = {"kl_coef": number, "value_bias": number}
    both = {"policy": params, "critic": head}
    rollout, _ = jax.eval_shape(
        trainer.score, {**both, "reference": params, "reward": head, "sft": params}, (prompts, completion), controller, number
    )
    assert rollout.advantages_BT.shape == (B, T) and rollout.scores_B.shape == (B,)
    state = jax.eval_shape(lambda p, c: init_state(p, trainer.optimizer, c), both, controller)
    after, metrics = jax.eval_shape(trainer.update, state, rollout, key)
    unchanged(state, after)
    assert all(value.shape == () for value in metrics.values()) and "ppo/approxkl" in metrics


def test_importance_weights_build(two_layers):
    config, _, policy, _, params, _, L, T = two_layers
    tokens, mask = shapes(config.weights.batch_size, ("tokens", L + T), ("mask", L + T))
    score = lambda p, t, m: policy.score_tokens(p, t, m, start=L, temperature=config.weights.temperature)  # noqa: E731
    stats = jax.eval_shape(score, params, tokens, mask)
    assert stats.logp_BT.shape == (config.weights.batch_size, T) and stats.logp_BT.dtype == jnp.float32


def test_one_recipe_has_every_method_by_name():
    named = {name: one.method for name, one in arms(load_config("methods_toy.yaml")).items()}
    assert {name for name, method in named.items() if name.rsplit("/")[-1] == method} >= set(METHODS)
