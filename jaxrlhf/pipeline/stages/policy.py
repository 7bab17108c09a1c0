"""The policy of a round: PPO or RLOO against the round's reward model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf import rng, sharding
from jaxrlhf.algorithms.policy_updates import POLICY_UPDATES
from jaxrlhf.algorithms.ppo import as_compiled, num_updates, rollout_prompts, train_ppo
from jaxrlhf.algorithms.rounds import Round
from jaxrlhf.algorithms.training import own_copy
from jaxrlhf.data.tokens import pad_id_of, tokenize_prompts
from jaxrlhf.models.hub import Loaded, eos_ids, reward_bias
from jaxrlhf.pipeline import inputs
from jaxrlhf.pipeline.stages.context import RunContext, add_model
from jaxrlhf.pipeline.stages.ensemble import reward_inputs, spread_of
from jaxrlhf.pipeline.stages.fixed_models import fixed_models, lora_slice, split_params
from jaxrlhf.pipeline.stages.lineage import policy_lineage, write_lineage
from jaxrlhf.plugins import plugin, source_of
from jaxrlhf.steps.state import init_state, joined, restarted_schedules
from jaxrlhf.storage.checkpoint import Checkpoints
from jaxrlhf.storage.stage import Done, Stage
from jaxrlhf.types import Params, PromptBatch, TrainState


def prompt_table(setting: RunContext, folder: Path, tokenizer: Any) -> PromptBatch:
    """All PPO prompts as tokens."""
    rows, report = inputs.prompts_of(setting.config, tokenizer)
    table, cut = tokenize_prompts(rows, tokenizer, inputs.limits_of(setting.config))
    setting.report_rows(folder, "prompts", report, cut)
    return table


def policy_stage(
    setting: RunContext, round: Round, *, sft: Done, start: Done, reference: Done, rewards: tuple[Done, ...], previous: Done, carries: bool
) -> Done:
    """The policy of a round: PPO or RLOO from `start` against `rewards`, its KL taken to `reference`.

    `rewards` is one reward model, or the members of the round's ensemble; a critic starts as a copy of the first.
    `previous` is the policy of the round before, whose optimizer or critic the method may carry on (wherever the policy itself starts).
    `carries`: the next round takes over optimizer or critic, so the final training state stays in the folder.
    RLOO has no critic: the row's restart_critic and the fields in `POLICY_UPDATES["rloo"].unread` are without effect.
    With LoRA every round has new adapters on the merged policy it starts from, and so a new optimizer.
    """
    config, number = setting.config, round.number
    section, way, spread_coef = config.ppo, POLICY_UPDATES[round.policy_update], spread_of(round.ensemble, config)
    restarts = (round.restart_optimizer or config.lora.r > 0, round.restart_critic or not way.critic)
    kl_coef = section.kl_coef_previous if round.moved_reference and section.kl_coef_previous is not None else section.kl_coef

    def build(folder: Path) -> dict[str, Any]:
        write_lineage(folder, policy_lineage(round, start=start, reference=reference, sft=sft, rewards=rewards))
        policy, scorer = setting.load(start, head="lm"), setting.load(rewards[0], head="scalar")
        tokenizer = policy.tokenizer
        trainer = way.trainer(
            policy.model,
            scorer.model,
            as_compiled(section),
            plugin,
            eos_ids=eos_ids(policy),
            pad_id=pad_id_of(tokenizer),
            vocab_size=len(tokenizer),
            spread_coef=spread_coef,
            mesh=setting.mesh,
        )
        key = rng.stream(setting.key, "policy", number)
        learned, rest = split_params(setting, policy, rng.stream(key, "adapters"))
        state = initial_state(learned, scorer if way.critic else None, trainer.optimizer, kl_coef)
        state = with_previous_state(setting, sharding.place(state, setting.mesh), previous, restarts)
        at_hand, bias = {start.hash: policy.params, rewards[0].hash: scorer.params}, reward_bias(scorer)
        policy, scorer, learned = policy._replace(params=None), scorer._replace(params=None), None  # what is not fixed is in memory once
        models = {"reference": reference, "sft": sft, "rest": rest}
        fixed = fixed_models(setting, at_hand, rewards, bias, ensemble=spread_coef is not None, **models)
        updates, table = num_updates(section), prompt_table(setting, folder, tokenizer)
        before = 0 if section.round_prompts == "same" else (number - 1) * updates

        def loop(state: TrainState, done: int) -> Iterator:
            samples, bucket = way.samples(section), config.data.bucket
            stream = rollout_prompts(table, section, samples=samples, seed=config.seed, bucket=bucket, start=before + done)
            return train_ppo(trainer, state, fixed, islice(stream, updates - done), key=key, start=done, mesh=setting.mesh)

        tokens = section.batch_size * section.response_length
        state = setting.train(folder, "policy", state, loop, steps=updates, tokens=tokens, round=number)
        add_model(policy._replace(params=joined(state.params["policy"], rest)), folder)
        prompt_length = float(np.asarray(table.prompt_mask_BL).sum(axis=1).mean())
        result = {"updates": updates, "episodes": updates * section.batch_size, "kl_coef": float(state.controller["kl_coef"])}
        return result | {"prompt_length": prompt_length}  # mean tokens of a prompt: with the metrics, what the FLOPs are counted from

    again = number > 1 and section.round_prompts == "same"  # round 1 has the same prompts either way
    unread = (*way.unread, "generation_batch_size") + (() if again else ("round_prompts",))
    read = {k: v for k, v in asdict(replace(section, kl_coef=kl_coef, kl_coef_previous=None)).items() if k not in unread}
    slice_ = {
        "ppo": read | {"plugin": source_of(section.loss)},
        "round": number,
        "seed": config.seed,
        "data": inputs.data_identity(config),
        "limits": asdict(config.data.limits),
        "bucket": config.data.bucket,
        "dtype": config.model.dtype,
        "restart": list(restarts),
        "carries": carries,
    }
    slice_ |= ({} if spread_coef is None else {"spread_coef": spread_coef}) | lora_slice(config)
    sources = {"start": start, "reference": reference, **reward_inputs(rewards), "sft": sft}
    sources |= {} if all(restarts) else {"previous": previous}
    stage = Stage(f"r{number}-policy", "model", round.policy_update, slice_, sources, parent="start")
    return setting.build(stage, build, round=number, keep_state=carries)


def initial_state(policy: Params, critic: Loaded | None, optimizer: optax.GradientTransformation, kl_coef: float) -> TrainState:
    """The state a round starts from: copies of what learns of the policy and, where the method has one, of the reward model as critic."""
    params, controller = {"policy": policy}, {"kl_coef": jnp.float32(kl_coef)}
    if critic is not None:
        params["critic"], controller["value_bias"] = critic.params, jnp.float32(reward_bias(critic))
    return init_state(own_copy(params), optimizer, controller)


def with_previous_state(setting: RunContext, state: TrainState, previous: Done, restarts: tuple[bool, bool]) -> TrainState:
    """The state with the previous round's optimizer moments and critic, where the method keeps them; schedules restart.

    `restarts`: whether the optimizer, and whether the critic starts anew (always, where there is none).
    """
    restart_optimizer, restart_critic = restarts
    if restart_optimizer and restart_critic:
        return state
    with Checkpoints(setting.store.state_of(previous)) as checkpoints:
        found = checkpoints.restore(sharding.template(state, setting.mesh))
    if found is None:
        raise FileNotFoundError(f"{previous.folder} holds no training state to go on from; delete it to train that round again.")
    old = sharding.uncommitted(found[0], setting.mesh)
    opt_state = state.opt_state if restart_optimizer else restarted_schedules(old.opt_state)
    if restart_critic:
        return replace(state, opt_state=opt_state)
    params = {"policy": state.params["policy"], "critic": old.params["critic"]}
    return replace(state, params=params, opt_state=opt_state, controller={**state.controller, "value_bias": old.controller["value_bias"]})
