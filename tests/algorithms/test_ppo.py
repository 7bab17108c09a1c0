"""The parts of a PPO round as the trainer puts them together; the mathematics is tested with the steps and the rollouts."""

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.algorithms.policy_updates import ppo_trainer
from jaxrlhf.algorithms.ppo import PPOTrainer, RoundModels, train_ppo
from jaxrlhf.config import PPOConfig
from jaxrlhf.plugins import plugin
from jaxrlhf.types import Completion, Model, Outputs, PromptBatch, TokenStats, TrainState

CONFIG = PPOConfig(batch_size=8, response_length=3, forward_batch_size=2)


def models(rows: list[int]) -> tuple[Model, Model]:
    """A policy whose log-prob of every token is its one parameter, and a scalar 0; `rows` lists how many rows a forward pass took."""

    def score_tokens(params, tokens, mask, *, start, temperature=1.0, chunk=None):
        rows.append(len(tokens))
        out = jnp.full(tokens[:, start:].shape, params["logp"])
        return TokenStats(out, out, out)

    def apply(params, tokens, mask, *, start=0):
        rows.append(len(tokens))
        return Outputs(scalars=jnp.zeros(tokens[:, start:].shape))

    return Model(None, None, None, None, score_tokens), Model(None, apply, None, None, None)  # type: ignore[arg-type]


def trainer_of(config: PPOConfig, rows: list[int]) -> PPOTrainer:
    return ppo_trainer(*models(rows), config, plugin, eos_ids=(1,), pad_id=0, vocab_size=None)


def prompts(rows=8) -> PromptBatch:
    return PromptBatch(np.full((rows, 2), 3, np.int32), np.ones((rows, 2), bool), np.ones(rows, bool), np.arange(rows))  # type: ignore[arg-type]


def test_every_forward_pass_of_scoring_keeps_to_its_size():
    """π_SFT too. Log-probs a token are −1, −2 and −4, responses have 3 tokens: KL 3 to the reference and 9 to π_SFT."""
    params = {name: {"logp": jnp.float32(logp)} for name, logp in (("policy", -1), ("reference", -2), ("sft", -4))}
    params |= {"critic": {}, "reward": {}}
    completion = Completion(jnp.full((8, 3), 4), jnp.ones((8, 3), bool), jnp.full((8, 3), -1.0))
    controller = {"kl_coef": jnp.float32(0.1), "value_bias": jnp.float32(0.0)}
    rows: list[int] = []
    trainer = trainer_of(replace(CONFIG, missing_eos_score=-2.0), rows)
    _, metrics = trainer.score(params, (prompts(), completion), controller, 0.0)
    assert set(rows) == {2} and len(rows) == 5
    assert float(metrics["rollout/score"]) == -2  # no response ends in EOS
    assert float(metrics["rollout/kl"]) == 3 and float(metrics["kl/sft"]) == 9
    del params["sft"]  # the reference is π_SFT
    _, metrics = trainer.score(params, (prompts(), completion), controller, 0.0)
    assert float(metrics["kl/sft"]) == float(metrics["rollout/kl"]) == 3


def test_the_update_is_the_sections(monkeypatch):
    monkeypatch.setattr(sharding, "step", lambda make_step, mesh: make_step)
    config = replace(
        CONFIG, num_ppo_epochs=3, num_mini_batches=2, gradient_accumulation_steps=4, adaptive_kl=True, kl_target=5.0, kl_horizon=70
    )
    given = trainer_of(config, []).update.keywords
    counts = {"num_ppo_epochs": 3, "num_mini_batches": 2, "accumulate": 4}
    assert given | counts | {"adaptive": {"target": 5.0, "horizon": 70}} == given
    assert trainer_of(replace(config, adaptive_kl=False), []).update.keywords["adaptive"] is None


def test_prompts_are_checked_before_they_are_placed():
    torn = replace(prompts(), prompt_mask_BL=np.array([[True, True]] * 7 + [[True, False]]))
    trainer = PPOTrainer(*[None] * 5)._replace(sample=lambda *_: pytest.fail("sampled"))  # type: ignore[arg-type]
    state = TrainState(jnp.int32(0), {"policy": {}, "critic": {}}, ())
    with pytest.raises(ValueError, match="row 7 is not left-padded"):
        next(train_ppo(trainer, state, RoundModels({}, {}, 0.0), iter([torn]), key=jax.random.key(0)))


def test_truncated_sampling_warns_once(caplog):
    with caplog.at_level(logging.WARNING):
        trainer_of(CONFIG, [])
        assert not caplog.records
        for kl_coef in (0.1, 0.2):
            trainer_of(replace(CONFIG, top_p=0.93, kl_coef=kl_coef), [])
        trainer_of(replace(CONFIG, top_k=7), [])
    assert [record.getMessage().split(" cut")[0] for record in caplog.records] == [
        "ppo.top_k 0 and ppo.top_p 0.93",
        "ppo.top_k 7 and ppo.top_p 1.0",
    ]
