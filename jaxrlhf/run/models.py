"""The stages that make models: tokenizer, π_SFT, reward models, policies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf import rng, sharding
from jaxrlhf.algorithms.ppo import POLICY_UPDATES, as_compiled, num_updates, rollout_prompts, train_ppo
from jaxrlhf.algorithms.reward import called, reward_loss, reward_trainer, score_pairs, with_columns, with_weights
from jaxrlhf.algorithms.rounds import Round
from jaxrlhf.algorithms.supervised import num_steps, own_copy, sft_trainer, train
from jaxrlhf.config import Config
from jaxrlhf.data import toy
from jaxrlhf.data.batches import batches
from jaxrlhf.data.tokenizer import train_tokenizer
from jaxrlhf.data.tokens import eos_ids_of, pad_id_of, tokenize_demonstrations, tokenize_prompts
from jaxrlhf.evaluation.diagnostics import VALID_SCORES, pair_accuracy
from jaxrlhf.models.families import config_from_shape
from jaxrlhf.models.hub import (
    Loaded,
    eos_ids,
    initialise,
    load,
    read_tokenizer,
    resolve,
    reward_bias,
    save,
    with_reward_bias,
    with_tokenizer,
)
from jaxrlhf.plugins import plugin, source_of
from jaxrlhf.run import inputs
from jaxrlhf.run.data import updated_pairs, valid_pairs
from jaxrlhf.run.ensemble import numbered, spread_of
from jaxrlhf.run.frozen import fixed_models, halves, lora_slice
from jaxrlhf.run.lineage import policy_lineage, reward_lineage, write_lineage
from jaxrlhf.run.setting import Setting
from jaxrlhf.scorers.reward_model import score_responses
from jaxrlhf.steps.state import init_state, joined, restarted_schedules
from jaxrlhf.storage.checkpoint import Checkpoints
from jaxrlhf.storage.stage import Done, Stage
from jaxrlhf.types import Params, PromptBatch, TextBatch, TrainState

OF_ENSEMBLES = ("ensemble_size", "spread_coef")  # of config.reward, but nothing that one reward model depends on


def tokenizer_stage(setting: Setting) -> Done:
    """The run's tokenizer: the one named, the model's own, the toy task's words, or a byte-level BPE of the run's own text."""
    config = setting.config
    trained = config.tokenizer.source is None and config.model.source is None and config.data.train != inputs.TOY

    def build(folder: Path) -> dict[str, Any]:
        if config.tokenizer.source or config.model.source:
            tokenizer = given_tokenizer(config)
        elif not trained:
            tokenizer = toy.toy_tokenizer()
        else:
            rows, _ = inputs.demonstrations_of(config)
            tokenizer = train_tokenizer((row.prompt + row.response for row in rows), config.tokenizer.vocab_size)
        tokenizer.save_pretrained(str(folder))
        return {"vocabulary": len(tokenizer)}

    slice_ = {
        "tokenizer": asdict(config.tokenizer) | {"source": inputs.tokenizer_identity(config.tokenizer.source)},
        "model": None if config.tokenizer.source else inputs.tokenizer_identity(config.model.source),
        "data": inputs.identity(config) if trained else config.data.train,
    }
    return setting.build(Stage("tokenizer", "data", "tokenizer", slice_), build)


def given_tokenizer(config: Config) -> Any:
    """The tokenizer that `tokenizer.source` or `model.source` names; None where neither is given."""
    source = config.tokenizer.source or config.model.source
    if source is None:
        return None
    # A folder of tokenizer files alone has no config.json and is no model folder.
    tokenizer = read_tokenizer(Path(source) if Path(source).is_dir() else resolve(source))
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer files; name a folder that has in tokenizer.source.")
    return tokenizer


def base_model(setting: Setting, tokenizer: Any) -> Loaded:
    """The model SFT starts from: read, or made from `model.shape` for this tokenizer."""
    config = setting.config
    how = {"dtype": config.model.dtype, "remat": config.model.remat, "logits_chunk": config.model.logits_chunk, "mesh": setting.mesh}
    if config.model.source is not None:
        base = load(config.model.source, head="lm", **how)
        return with_tokenizer(base, tokenizer)
    longest = config.data.limits.max_prompt_length + max(config.data.limits.max_response_length, config.ppo.response_length)
    shape = {name: value for name, value in asdict(config.model.shape).items() if value is not None}
    decoder, _ = config_from_shape(
        shape,
        len(tokenizer),
        max_positions=longest,
        pad_id=tokenizer.pad_token_id,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
    )
    key = rng.stream(rng.root_key(config.text_seed), "model/init")
    return initialise(decoder, key=key, tokenizer=tokenizer, **how)


def sft_stage(setting: Setting, tokenizer_done: Done) -> Done:
    """π_SFT: the base model fitted to the demonstrations; with `sft.max_steps: 0` the base model itself."""
    config = setting.config

    def build(folder: Path) -> dict[str, Any]:
        tokenizer = read_tokenizer(tokenizer_done.folder)
        rows, report = inputs.demonstrations_of(config, tokenizer)
        table, cut = tokenize_demonstrations(rows, tokenizer, inputs.limits_of(config), eos_ids=eos_ids_of(tokenizer))
        setting.report_rows(folder, "demonstrations", report, cut)
        base = base_model(setting, tokenizer)
        steps = num_steps(
            len(table.index_B),
            batch_size=config.sft.batch_size,
            num_train_epochs=config.sft.num_train_epochs,
            max_steps=config.sft.max_steps,
        )
        optimizer, step = sft_trainer(base.model, config.sft, max(steps, 1), setting.mesh)
        state = sharding.place(init_state(own_copy(base.params), optimizer), setting.mesh)
        base = base._replace(params=None)  # the memory is wanted for the training

        def loop(state: TrainState, start: int) -> Iterator:
            stream = batches(table, config.sft.batch_size, seed=config.text_seed, name="sft", bucket=config.data.bucket, start=start)
            return train(step, state, placed(setting, islice(stream, steps - start)))

        state = setting.train(folder, "sft", state, loop, steps=steps, tokens=config.sft.batch_size * width(table))
        add_model(base._replace(params=state.params), folder)
        tokens = int(np.asarray(table.prompt_mask_BL).sum() + np.asarray(table.response_mask_BT).sum())
        return {"steps": steps, "rows": len(table.index_B), "tokens": tokens}

    slice_ = {
        "sft": asdict(config.sft),
        "model": inputs.model_identity(config),
        "data": inputs.identity(config),
        "limits": asdict(config.data.limits),
        "positions": config.ppo.response_length,
        "bucket": config.data.bucket,
    }
    return setting.build(Stage("sft", "model", "sft", slice_, {"tokenizer": tokenizer_done}), build)


def reward_stage(
    setting: Setting, round: Round, sft: Done, previous: Done | None, pairs: Done, update: Done | None, *, member: int = 0
) -> Done:
    """The reward model of a round: Bradley–Terry on the (weighted) pairs, then the bias that puts reference responses at 0.

    Its scores of the held-out pairs, bias taken off, stay in the folder (float32 [2, M], chosen and rejected): what drift is told by.
    `member` numbers the models of an ensemble: each has its own new head and its own order of the pairs; 0 is the model of a run without.
    """
    config = setting.config
    continues = previous is not None and round.reward_start == "previous"
    start = previous if previous is not None and continues else sft
    of_member = f"/{member}" if member else ""

    def build(folder: Path) -> dict[str, Any]:
        key = rng.stream(setting.key, f"reward/head{of_member}", round.number)
        base = setting.load(start, head="scalar", key=None if continues else key)
        loss = reward_loss(config.reward, plugin)
        fitted, weights_N = updated_pairs(update, pairs)
        given = {"start": start, "sft": sft, "pairs": pairs, "update": update, "fitted": fitted, "weights_N": weights_N}
        write_lineage(folder, reward_lineage(round, **given))
        table = with_columns(with_weights(fitted.tokens, weights_N), loss, name=called(config.reward), updated=update is not None)
        valid = valid_pairs(pairs)
        n, section = len(table.index_B), config.reward
        steps = num_steps(n, batch_size=section.batch_size, num_train_epochs=section.num_train_epochs, max_steps=section.max_steps)
        optimizer, step = reward_trainer(base.model, loss, section, max(steps, 1), setting.mesh)
        state = sharding.place(init_state(own_copy(base.params), optimizer), setting.mesh)
        base = base._replace(params=None)

        def loop(state: TrainState, start: int) -> Iterator:
            name = f"reward{of_member}/r{round.number}"
            stream = batches(table, section.batch_size, seed=config.seed, name=name, bucket=config.data.bucket, start=start)
            return train(step, state, placed(setting, islice(stream, steps - start)))

        tokens = 2 * section.batch_size * (table.prompt_BL.shape[1] + table.chosen_BT.shape[1])
        state = setting.train(folder, "reward", state, loop, steps=steps, tokens=tokens, round=round.number)
        options = {"batch_size": section.eval_batch_size, "mesh": setting.mesh}
        references = reference_responses(setting, base.tokenizer)
        bias = float(score_responses(base.model, state.params, references, **options).mean())
        add_model(with_reward_bias(base._replace(params=state.params), bias), folder)
        scores = score_pairs(base.model, state.params, valid, **options)
        np.save(folder / VALID_SCORES, np.stack(scores).astype(np.float32) - np.float32(bias), allow_pickle=False)
        accuracy = pair_accuracy(*scores)
        return {"steps": steps, "pairs": n, "reward_bias": bias, "accuracy_valid": accuracy}

    slice_ = {
        "reward": {k: v for k, v in asdict(config.reward).items() if k not in OF_ENSEMBLES} | {"plugin": source_of(config.reward.loss)},
        "round": round.number,
        "seed": config.seed,
        "start": round.reward_start,
        "data": inputs.identity(config),
        "limits": asdict(config.data.limits),
        "bucket": config.data.bucket,
        "dtype": config.model.dtype,
    }
    slice_ |= {"member": member} if member else {}
    sources = {"previous" if continues else "sft": start, "pairs": pairs} | ({} if update is None else {"update": update})
    name = f"r{round.number}-reward" + (f"-{member + 1}" if member else "")
    stage = Stage(name, "model", "reward", slice_, sources, version=2, parent=next(iter(sources)))
    return setting.build(stage, build, round=round.number)


def reference_responses(setting: Setting, tokenizer: Any) -> TextBatch:
    """The responses whose mean score is 0 by definition: the demonstrations, as many as `reward.num_reference_rows`."""
    rows, _ = inputs.demonstrations_of(setting.config, tokenizer)
    limit = setting.config.reward.num_reference_rows
    table, _ = tokenize_demonstrations(rows[:limit], tokenizer, inputs.limits_of(setting.config), eos_ids=eos_ids_of(tokenizer))
    return table


def prompt_table(setting: Setting, folder: Path, tokenizer: Any) -> PromptBatch:
    """All PPO prompts as tokens."""
    rows, report = inputs.prompts_of(setting.config, tokenizer)
    table, cut = tokenize_prompts(rows, tokenizer, inputs.limits_of(setting.config))
    setting.report_rows(folder, "prompts", report, cut)
    return table


def policy_stage(
    setting: Setting, round: Round, *, sft: Done, start: Done, reference: Done, rewards: tuple[Done, ...], previous: Done, carries: bool
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
        learned, rest = halves(setting, policy, rng.stream(key, "adapters"))
        state = first_state(learned, scorer if way.critic else None, trainer.optimizer, kl_coef)
        state = taken_over(setting, sharding.place(state, setting.mesh), previous, restarts)
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
        "data": inputs.identity(config),
        "limits": asdict(config.data.limits),
        "bucket": config.data.bucket,
        "dtype": config.model.dtype,
        "restart": list(restarts),
        "carries": carries,
    }
    slice_ |= ({} if spread_coef is None else {"spread_coef": spread_coef}) | lora_slice(config)
    sources = {"start": start, "reference": reference, **numbered(rewards), "sft": sft}
    sources |= {} if all(restarts) else {"previous": previous}
    stage = Stage(f"r{number}-policy", "model", round.policy_update, slice_, sources, parent="start")
    return setting.build(stage, build, round=number, keep_state=carries)


def first_state(policy: Params, critic: Loaded | None, optimizer: optax.GradientTransformation, kl_coef: float) -> TrainState:
    """The state a round starts from: copies of what learns of the policy and, where the method has one, of the reward model as critic."""
    params, controller = {"policy": policy}, {"kl_coef": jnp.float32(kl_coef)}
    if critic is not None:
        params["critic"], controller["value_bias"] = critic.params, jnp.float32(reward_bias(critic))
    return init_state(own_copy(params), optimizer, controller)


def taken_over(setting: Setting, state: TrainState, previous: Done, restarts: tuple[bool, bool]) -> TrainState:
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


def add_model(loaded: Loaded, folder: Path) -> None:
    """Write the model into a stage's folder, beside its metrics, its list of dropped rows and its checkpoint (`save` replaces folders)."""
    fresh = folder / ".model"
    save(loaded, fresh)
    if fresh.is_dir():  # of several processes one writes
        for path in fresh.iterdir():
            os.replace(path, folder / path.name)
        fresh.rmdir()


def placed(setting: Setting, stream: Iterator) -> Iterator:
    return (sharding.place_batch(batch, setting.mesh) for batch in stream)


def width(table: TextBatch) -> int:
    return table.prompt_BL.shape[1] + table.response_BT.shape[1]
