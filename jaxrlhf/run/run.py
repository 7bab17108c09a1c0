"""All stages of a run, in order, into a run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxrlhf import distributed, sharding
from jaxrlhf.algorithms.rounds import PREFERENCE, Method, Round, method_of, num_rounds, reward_update_named, round_of
from jaxrlhf.config import Config
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.plugins import plugin
from jaxrlhf.recipe import ConfigError, arms, load_config, to_yaml
from jaxrlhf.run import inputs
from jaxrlhf.run.data import check_update, pairs_stage, report_of, update_stage
from jaxrlhf.run.evaluate import evaluation_stage
from jaxrlhf.run.models import given_tokenizer, policy_stage, reward_stage, sft_stage, tokenizer_stage
from jaxrlhf.run.preference import preference_stage
from jaxrlhf.run.refit import refit_stage
from jaxrlhf.run.setting import Setting
from jaxrlhf.sharding.compile_cache import cache_compilations
from jaxrlhf.storage.remote_store import store_of
from jaxrlhf.storage.run_folder import check_places, folder_of, open_run, publish
from jaxrlhf.storage.stage import Done

UNTIL = ("sft", "reward", "ppo")  # where a single-stage command stops; the latter two in round 1

HEURISTIC = "the importance weights are a heuristic here, not the density ratio of the pairs"


def run(config: Config | str | Path, *, until: str | None = None, log: RunLog | None = None) -> Path:
    """Run a config (or the recipe at a path), or all its arms one after the other; the run folder.

    Finished stages are found again by what they depend on: a run that was stopped goes on from its last finished stage, inside that
    stage from its last checkpoint, and arms share what they have in common. `until`: stop after "sft", or after "reward" or "ppo" of
    round 1. Raises ConfigError, DataError and the like before anything is compiled where the config or the data cannot work.

    Of several processes that work as one (`jaxrlhf.distributed.group.start`) all call it with the same arguments; one writes and logs.
    """
    if not isinstance(config, Config):
        config = load_config(config)
    cache_compilations()
    if until is not None and until not in UNTIL:
        raise ValueError(f"until {until!r} is none of {', '.join(UNTIL)}.")
    for one in arms(config).values():
        check(one)
    check_same(config)
    check_places(config)
    folder = folder_of(config)
    if config.arms:
        open_run(config)
        write_whole(folder / "config.yaml", to_yaml(config))
    for one in arms(config).values():
        _run_one(one, until, log)
    return folder


def check_same(config: Config) -> None:
    """Raise ConfigError in a process whose config is not the leader's."""
    if distributed.agree(to_yaml(config), "the config") != to_yaml(config):
        raise ConfigError(f"process {distributed.index()} has another config than process 0; start all with the same command and recipe.")
    distributed.barrier("the same config")  # or process 0 would begin what cannot go on


def check(config: Config) -> None:
    """What the config alone cannot say of itself: unknown names, unreadable data and batches that do not divide are refused here."""
    from jaxrlhf.algorithms.ppo import check_rloo, policy_loss_of
    from jaxrlhf.algorithms.preference import REFERENCE, preference_loss
    from jaxrlhf.algorithms.reward import called, check_columns, reward_loss

    method = method_of(config.method, config.row, plugin)
    if method.reward_update is not None:
        reward_update_named(method.reward_update, plugin)
        check_update(config, method.reward_update)
    if method.ensemble is not None and not method.needs_reward:
        raise ConfigError(f"row.ensemble is {method.ensemble!r}, but {method.policy_update} uses no reward model; take it out of the row.")
    if config.lora.r and not method.restart_optimizer:
        raise ConfigError(
            f"row.restart_optimizer is false and lora.r {config.lora.r}: the moments of a round belong to adapters that it merged into its "
            "policy, and the next round's are new; let the optimizer restart, or set lora.r to 0."
        )
    loss = reward_loss(config.reward, plugin)
    columns = loss.columns
    if method.needs_reward:
        check_columns(loss, method.reward_update, name=called(config.reward))
    if method.policy_update in PREFERENCE:
        preference = preference_loss(config.dpo, method.policy_update, plugin)
        check_columns(preference, method.reward_update, name=f"dpo.loss {config.dpo.loss!r}", given=("margin", *REFERENCE))
        columns = (*columns, *preference.columns)
    else:
        policy_loss_of(config.ppo, plugin)
    if method.policy_update == "rloo":
        check_rloo(config.ppo)
    inputs.check(config, given_tokenizer(config), columns=columns)
    mesh = sharding.mesh_of(config.mesh)
    if config.model.offload_frozen:
        sharding.check_offload(mesh)
    used = ["sft"] + ["reward"] * method.needs_reward + ["dpo" if method.policy_update in PREFERENCE else "ppo"]
    check_shards(config, used, sharding.data_shards(mesh))


def check_shards(config: Config, sections: Sequence[str], shards: int) -> None:
    """Raise ValueError unless the microbatches of these sections divide over the data shards."""
    for name in sections:
        section = getattr(config, name)
        parts = section.gradient_accumulation_steps * (config.ppo.num_mini_batches if name == "ppo" else 1)
        sharding.check_batch_size(section.batch_size, shards, name=f"{name}.batch_size", parts=parts)
        if name == "ppo" and section.generation_batch_size is not None:
            sharding.check_batch_size(section.generation_batch_size, shards, name="ppo.generation_batch_size")


def _run_one(config: Config, until: str | None, log: RunLog | None) -> None:
    folder = folder_of(config)
    leads = distributed.is_leader()
    open_run(config)
    replaces = leads and (folder / "summary.json").exists() and (folder / "config.yaml").read_text(encoding="utf-8") != to_yaml(config)
    write_whole(folder / "config.yaml", to_yaml(config))
    store = store_of(config)
    mesh = sharding.mesh_of(config.mesh)
    wandb = {"project": config.log.wandb, "name": config.name} if config.log.wandb else None
    own = log or RunLog(folder if leads else None, tensorboard=config.log.tensorboard, wandb=wandb)
    if replaces:
        own.note(f"note: {folder} held another config's run, whose summary and links this one replaces; its stages stay in {store.root}")
    try:
        setting = Setting(config, store, folder, own, mesh)
        walk_through(setting, until)
        if until is None:
            setting.tidy(metrics=log is None)  # a log that was given may hold other runs
    finally:
        if log is None:
            own.close()
    if leads:
        publish(folder)


@dataclass
class Track:
    """What the rounds so far have made; policies and evaluations stand at the number of their round, 0 is π_SFT."""

    policies: list[Done]
    evaluations: list[Done] = field(default_factory=list)
    rewards: tuple[Done, ...] = ()  # the reward model in use: one, or the members of an ensemble
    update: Done | None = None  # the reward update it was fitted by
    refitted: int = 0  # the policy it was fitted for
    last: Round | None = None
    decision: Done | None = None  # whether this round refits, where that was a question


def walk_through(setting: Setting, until: str | None) -> None:
    """The stages of one method, in order. What a round needs is one row of the table; nothing here knows a method's name."""
    config = setting.config
    method = method_of(config.method, config.row, plugin)
    tokenizer = tokenizer_stage(setting)
    sft = sft_stage(setting, tokenizer)
    if until == "sft":
        return
    pairs = pairs_stage(setting, tokenizer, sft)
    track, summary = Track([sft]), Summary(setting, pairs)
    if until is None:
        track.evaluations.append(evaluation_stage(setting, 0, policy=sft, sft=sft, rewards=(), ensemble=None, before=None))
        summary.add(0, track.evaluations[0])
    if num_rounds(method, config.rounds) < config.rounds:
        summary.note(f"{config.method} has one round: a second one, from π_SFT on the same pairs, would repeat it.")
    for number in range(1, num_rounds(method, config.rounds) + 1):
        round = _next_round(setting, method, track, number, pairs)
        if track.decision is not None and not track.decision.record["result"]["due"]:
            summary.note(not_due(number, track.decision.record["result"], adapters=config.lora.r > 0))
        update = _reward(setting, round, track, pairs)
        if until == "reward":
            return
        track.policies.append(_policy(setting, method, round, track, pairs))
        if until == "ppo":
            return
        before = track.evaluations[round.policy_start]
        models = {"policy": track.policies[-1], "sft": sft, "rewards": track.rewards, "before": before}
        track.evaluations.append(evaluation_stage(setting, number, ensemble=round.ensemble, **models))
        if update is not None and update_report(update).get("needs_sampler") and (reasons := not_the_sampler(config)):
            summary.note(f"{HEURISTIC}: {'; '.join(reasons)}.")
        summary.add(number, track.evaluations[-1], rewards=track.rewards, update=update, decision=track.decision)
        track.last = round


def _next_round(setting: Setting, method: Method, track: Track, number: int, pairs: Done) -> Round:
    """The row's round `number`, with or without a refit."""
    done = method.reward_update is None or (method.update_rounds == "once" and track.update is not None)
    always = number == 1 or done or setting.config.refit.when == "round"
    track.decision = None if always else refit_stage(setting, number, track, pairs)
    due = track.decision is None or track.decision.record["result"]["due"]
    return round_of(method, number, track.last, due=due, updated=track.update is not None)


def _reward(setting: Setting, round: Round, track: Track, pairs: Done) -> Done | None:
    """The round's reward update and the reward models fitted by it, put into `track`; the update, if the round has one."""
    update, sft = None, track.policies[0]
    if round.reward_update is not None:
        models = {"sft": sft, "policy": track.policies[-1], "reward": track.rewards[0]}
        update = update_stage(setting, round, pairs=pairs, before=track.update, **models)
        track.update = update
    if round.fits_reward:
        track.refitted = round.number - 1
        members = setting.config.reward.ensemble_size if round.ensemble else 1
        track.rewards = tuple(
            reward_stage(setting, round, sft, track.rewards[n] if track.rewards else None, pairs, update, member=n) for n in range(members)
        )
    return update


def _policy(setting: Setting, method: Method, round: Round, track: Track, pairs: Done) -> Done:
    """The policy of a round."""
    sft, start, reference = track.policies[0], track.policies[round.policy_start], track.policies[round.reference]
    if round.policy_update in PREFERENCE:
        return preference_stage(setting, round, sft=sft, start=start, reference=reference, pairs=pairs, update=track.update)
    more = round.number < num_rounds(method, setting.config.rounds)
    skips = method.reward_update is not None and setting.config.refit.when != "round"
    carries = more and (skips or not (method.restart_optimizer and method.restart_critic))
    models = {"sft": sft, "start": start, "reference": reference, "rewards": track.rewards, "previous": track.policies[-1]}
    return policy_stage(setting, round, **models, carries=carries)


def not_the_sampler(config: Config) -> list[str]:
    """Why π_SFT, as the importance weights read it, is not what the pairs were drawn from; empty where it is."""
    pairs, weights = config.pairs, config.weights
    if pairs.source != "sample":
        return ["the pairs were not sampled from this run's SFT policy (pairs.source: sample)"]
    reasons = []
    if pairs.temperature != weights.temperature:
        reasons.append(
            f"the pairs were sampled at temperature {pairs.temperature} and are weighed at weights.temperature {weights.temperature}"
        )
    if weights.max_tokens is not None and weights.max_tokens < config.ppo.response_length:
        reasons.append(
            f"weights.max_tokens {weights.max_tokens} leaves out what follows in responses of up to {config.ppo.response_length}"
        )
    return reasons


def not_due(number: int, decision: dict[str, Any], *, adapters: bool) -> str:
    """Why round `number` has no refit, and what it goes on with: not the moments of adapters that the last round has merged."""
    value = "not to be had" if decision["value"] is None else f"{decision['value']:.3g}"
    what = f"{decision['when']} is {value}, the threshold {decision['threshold']:.3g}"
    kept = "reward model, reference and critic" if adapters else "reward model, reference, optimizer and critic"
    return f"round {number}: no refit was due ({what}); it goes on with the {kept} of the last one."


class Summary:
    """summary.json, rewritten after every round so that a stopped run has one too."""

    def __init__(self, setting: Setting, pairs: Done):
        self._setting, self._pairs = setting, pairs
        self.notes: list[str] = []
        self._rounds: list[dict[str, Any]] = []
        self._counted = 0  # stages whose seconds stand in a round already

    def note(self, text: str) -> None:
        """Something the reader of the figures has to know; said once."""
        if text not in self.notes:
            self.notes.append(text)
            self._setting.log.note(f"note: {text}")

    def add(
        self, number: int, evaluation: Done, *, rewards: tuple[Done, ...] = (), update: Done | None = None, decision: Done | None = None
    ) -> None:
        figures = evaluation.record["result"]
        names = ("gold", "proxy_start", "proxy", "kl_sft")
        row: dict[str, Any] = {"round": number, **{name: figures.get(name) for name in names}}
        report = update_report(update)
        row |= {"ess": report.get("ess"), "ess_fraction": report.get("ess_fraction"), "eta": report.get("eta")}
        row |= {"reward_accuracy": figures.get("reward_accuracy")}
        valid = [done.record["result"]["accuracy_valid"] for done in rewards]  # of an ensemble's members one by one
        row |= {"reward_accuracy_valid": sum(valid) / len(valid) if valid and None not in valid else None}
        row |= {
            "pairs": rewards[0].record["result"]["pairs"] if rewards else None,
            "refit": update is not None,
            "update": update.record["result"]["update"] if update else None,
            "refit_value": decision.record["result"]["value"] if decision else None,
        }
        row |= {name: figures.get(name) for name in ("win_rate", "win_rate_low", "win_rate_high", "tie_rate", "length", "eos_rate")}
        done = self._setting.stages[self._counted :]  # a reward model that is kept was paid for before
        self._counted = len(self._setting.stages)
        row["seconds"] = round(sum(stage.record["seconds"] for stage in done), 3)
        self._rounds.append(row)
        config = self._setting.config
        body = {"method": config.method, "row": config.row, "seed": config.seed, "name": config.name}
        body |= {"rounds": self._rounds, "notes": self.notes}
        write_whole(self._setting.folder / "summary.json", json.dumps(body, indent=1) + "\n")


def update_report(update: Done | None) -> dict[str, Any]:
    return {} if update is None else report_of(update.folder)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that readers see whole or not at all. Of several processes the leader writes."""
    if not distributed.is_leader():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
