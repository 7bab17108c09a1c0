"""The policy of a round: PPO or RLOO against the round's reward model."""

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
from jaxrlhf.config import PPOConfig
from jaxrlhf.data.tokens import pad_id_of, tokenize_prompts
from jaxrlhf.models.hub import Loaded, eos_ids, reward_bias
from jaxrlhf.pipeline import inputs
from jaxrlhf.pipeline.stages.context import RoundInputs, RunContext, add_model
from jaxrlhf.pipeline.stages.divergence import Fed
from jaxrlhf.pipeline.stages.ensemble import reward_inputs, spread_of
from jaxrlhf.pipeline.stages.fixed_models import fixed_models, lora_slice, split_params
from jaxrlhf.pipeline.stages.lineage import policy_lineage, write_lineage
from jaxrlhf.plugins import plugin, source_of
from jaxrlhf.steps.state import init_state, joined, restarted_schedules
from jaxrlhf.storage.checkpoint import Checkpoints
from jaxrlhf.storage.stage import Done, Stage
from jaxrlhf.types import Params, PromptBatch, TrainState


def policy_stage(run: RunContext, round: Round, given: RoundInputs, *, carries: bool) -> Done:
    """The policy of a round: PPO or RLOO against the reward models; a critic starts as a copy of the first.

    `carries`: the next round takes over optimizer or critic, so the final training state stays in the folder. This one takes them from
    `given.previous`, where the method keeps them. RLOO has no critic: the row's restart_critic and the fields in
    `POLICY_UPDATES["rloo"].unread` are without effect.
    With LoRA every round has new adapters on the merged policy it starts from, and so a new optimizer.
    """
    config, way = run.config, POLICY_UPDATES[round.policy_update]
    restarts = (round.restart_optimizer or config.lora.r > 0, round.restart_critic or not way.critic)
    moved = round.moved_reference and config.ppo.kl_coef_previous is not None
    section = replace(config.ppo, kl_coef=config.ppo.kl_coef_previous if moved else config.ppo.kl_coef, kl_coef_previous=None)  # type: ignore[arg-type]
    again = round.number > 1 and section.round_prompts == "same"  # round 1 has the same prompts either way
    unread = (*way.unread, "generation_batch_size") + (() if again else ("round_prompts",))
    spread_coef = spread_of(round.ensemble, config)
    slice_ = {
        "ppo": {k: v for k, v in asdict(section).items() if k not in unread} | {"plugin": source_of(section.loss)},
        "round": round.number,
        "seed": config.seed,
        "data": inputs.data_identity(config),
        "limits": asdict(config.data.limits),
        "bucket": config.data.bucket,
        "dtype": config.model.dtype,
        "restart": list(restarts),
        "carries": carries,
    }
    slice_ |= ({} if spread_coef is None else {"spread_coef": spread_coef}) | lora_slice(config)
    sources = {"start": given.start, "reference": given.reference, **reward_inputs(given.rewards), "sft": given.sft}
    sources |= {} if all(restarts) else {"previous": given.previous}
    stage = Stage(f"r{round.number}-policy", "model", round.policy_update, slice_, sources, version=2, parent="start")

    def build(folder: Path) -> dict[str, Any]:
        return _train_policy(run, round, given, folder, section, restarts)

    return run.build(stage, build, round=round.number, keep_state=carries)


def _train_policy(
    run: RunContext, round: Round, given: RoundInputs, folder: Path, section: PPOConfig, restarts: tuple[bool, bool]
) -> dict[str, Any]:
    """Train and write the policy; what its record says."""
    write_lineage(folder, policy_lineage(round, given))
    config, way, spread_coef = run.config, POLICY_UPDATES[round.policy_update], spread_of(round.ensemble, run.config)
    policy, scorer = run.load(given.start, head="lm"), run.load(given.rewards[0], head="scalar")
    trainer = way.trainer(
        policy.model,
        scorer.model,
        as_compiled(section),
        plugin,
        eos_ids=eos_ids(policy),
        pad_id=pad_id_of(policy.tokenizer),
        vocab_size=len(policy.tokenizer),
        spread_coef=spread_coef,
        mesh=run.mesh,
    )
    key = rng.stream(run.key, "policy", round.number)
    trainable, frozen = split_params(run, policy, rng.stream(key, "adapters"))
    state = initial_state(trainable, scorer if way.critic else None, trainer.optimizer, section.kl_coef)
    state = with_previous_state(run, sharding.place(state, run.mesh), given.previous, restarts)
    loaded, bias = {given.start.hash: policy.params, given.rewards[0].hash: scorer.params}, reward_bias(scorer)
    policy, scorer, trainable = policy._replace(params=None), scorer._replace(params=None), None  # what is not fixed is in memory once
    fixed = fixed_models(run, given, loaded, bias, ensemble=spread_coef is not None, frozen=frozen)
    rows, report = inputs.prompts_of(config, policy.tokenizer)
    table, cut = tokenize_prompts(rows, policy.tokenizer, inputs.limits_of(config))
    run.report_rows(folder, "prompts", report, cut)
    updates = num_updates(section)
    before = 0 if section.round_prompts == "same" else (round.number - 1) * updates

    samples = way.samples(section)

    def stream(done: int) -> Iterator[PromptBatch]:
        how = {"samples": samples, "seed": config.seed, "bucket": config.data.bucket}
        return islice(rollout_prompts(table, section, start=before + done, **how), updates - done)

    def loop(state: TrainState, rows: Iterator[PromptBatch]) -> Iterator:
        return train_ppo(trainer, state, fixed, rows, key=key, start=int(state.step), mesh=run.mesh)

    tokens = section.batch_size * section.response_length
    fed = Fed(stream, [rows[i].id for i in cut.rows], samples)
    state = run.train(folder, "policy", state, loop, fed, steps=updates, tokens=tokens, round=round.number)
    add_model(policy._replace(params=joined(state.params["policy"], frozen)), folder)
    prompt_length = float(np.asarray(table.prompt_mask_BL).sum(axis=1).mean())
    result = {"updates": updates, "episodes": updates * section.batch_size, "kl_coef": float(state.controller["kl_coef"])}
    return result | {"prompt_length": prompt_length}  # mean tokens of a prompt: with the metrics, what the FLOPs are counted from


def initial_state(policy: Params, critic: Loaded | None, optimizer: optax.GradientTransformation, kl_coef: float) -> TrainState:
    """The state a round starts from: copies of what learns of the policy and, where the method has one, of the reward model as critic."""
    params, controller = {"policy": policy}, {"kl_coef": jnp.float32(kl_coef)}
    if critic is not None:
        params["critic"], controller["value_bias"] = critic.params, jnp.float32(reward_bias(critic))
    return init_state(own_copy(params), optimizer, controller)


def with_previous_state(run: RunContext, state: TrainState, previous: Done, restarts: tuple[bool, bool]) -> TrainState:
    """The state with the previous round's optimizer moments and critic, where the method keeps them; schedules restart.

    `restarts`: whether the optimizer, and whether the critic starts anew (always, where there is none).
    """
    restart_optimizer, restart_critic = restarts
    if restart_optimizer and restart_critic:
        return state
    with Checkpoints(run.store.state_of(previous), whole=previous.place) as checkpoints:
        found = checkpoints.restore(sharding.template(state, run.mesh))
    if found is None:
        raise FileNotFoundError(f"{previous.place} holds no training state to go on from; delete it to train that round again.")
    old = sharding.uncommitted(found[0], run.mesh)
    opt_state = state.opt_state if restart_optimizer else restarted_schedules(old.opt_state)
    if restart_critic:
        return replace(state, opt_state=opt_state)
    params = {"policy": state.params["policy"], "critic": old.params["critic"]}
    return replace(state, params=params, opt_state=opt_state, controller={**state.controller, "value_bias": old.controller["value_bias"]})
