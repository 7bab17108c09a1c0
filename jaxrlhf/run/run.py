"""All stages of a run, in order, into a run folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax

from jaxrlhf import sharding
from jaxrlhf.algorithms.rounds import Round, method_named, reward_update_named, rounds_of
from jaxrlhf.config import Config
from jaxrlhf.data.tables import read_pair_table
from jaxrlhf.plugins import plugin
from jaxrlhf.recipe import ConfigError, arms, load_config, to_yaml
from jaxrlhf.run import inputs
from jaxrlhf.run.data import VALID, pairs_stage, report_of, update_stage, updated_pairs
from jaxrlhf.run.evaluate import evaluation_stage
from jaxrlhf.run.models import given_tokenizer, policy_stage, reward_stage, sft_stage, tokenizer_stage
from jaxrlhf.run.setting import Setting
from jaxrlhf.run.stages import Done, Store
from jaxrlhf.runlog import RunLog

UNTIL = ("sft", "reward", "ppo")  # where a single-stage command stops; the latter two in round 1

HEURISTIC = "the importance weights are a heuristic here, not the density ratio of the pairs"


def run(config: Config | str | Path, *, until: str | None = None, log: RunLog | None = None) -> Path:
    """Run a config (or the recipe at a path), or all its arms one after the other; the run folder.

    Finished stages are found again by what they depend on: a run that was stopped goes on from its last finished stage, inside that
    stage from its last checkpoint, and arms share what they have in common. `until`: stop after "sft", or after "reward" or "ppo" of
    round 1. Raises ConfigError, DataError and the like before anything is compiled where the config or the data cannot work.
    """
    if not isinstance(config, Config):
        config = load_config(config)
    if jax.process_count() > 1:
        raise ConfigError(
            f"this is process {jax.process_index()} of {jax.process_count()}, and a run is one process, which uses all devices of its "
            "machine: start it once, without jax.distributed. (Runs of several processes come in a later version.)"
        )
    if until is not None and until not in UNTIL:
        raise ValueError(f"until {until!r} is none of {', '.join(UNTIL)}.")
    for one in arms(config).values():
        check(one)
    folder = Path(config.output) / config.name
    if config.arms:
        _write(folder / "config.yaml", to_yaml(config))
    for one in arms(config).values():
        _run_one(one, until, log)
    return folder


def check(config: Config) -> None:
    """What the config alone cannot say of itself: unknown names, unreadable data and batches that do not divide are refused here."""
    from jaxrlhf.algorithms.ppo import policy_loss_of
    from jaxrlhf.algorithms.reward import reward_loss

    method = method_named(config.method)
    if method.reward_update is not None:
        reward_update_named(method.reward_update, plugin)
    loss = reward_loss(config.reward, plugin)
    policy_loss_of(config.ppo, plugin)
    inputs.check(config, given_tokenizer(config), columns=loss.columns)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    shards = sharding.data_shards(mesh)
    sharding.check_batch_size(config.sft.batch_size, shards, name="sft.batch_size")
    sharding.check_batch_size(config.reward.batch_size, shards, name="reward.batch_size")
    sharding.check_batch_size(config.ppo.batch_size, shards, name="ppo.batch_size")


def _run_one(config: Config, until: str | None, log: RunLog | None) -> None:
    folder = Path(config.output) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.yaml", to_yaml(config))
    store = Store(config.store or Path(config.output) / ".stages")
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    own = log or RunLog(
        folder, tensorboard=config.log.tensorboard, wandb={"project": config.log.wandb, "name": config.name} if config.log.wandb else None
    )
    try:
        setting = Setting(config, store, folder, own, mesh)
        _stages(setting, until)
        if until is None:
            setting.tidy(metrics=log is None)  # a log that was given may hold other runs
    finally:
        if log is None:
            own.close()


def _stages(setting: Setting, until: str | None) -> None:
    """The stages of one method, in order. What a round needs is one row of `rounds_of`; nothing here knows a method's name."""
    config = setting.config
    method = method_named(config.method)
    tokenizer = tokenizer_stage(setting)
    sft = sft_stage(setting, tokenizer)
    if until == "sft":
        return
    pairs = pairs_stage(setting, tokenizer, sft)
    evaluations, summary = [], Summary(setting, pairs)
    if until is None:
        evaluations.append(evaluation_stage(setting, 0, policy=sft, sft=sft, reward=None, before=None))
        summary.add(0, evaluations[0])
    valid = read_pair_table(pairs.folder / VALID)[1]
    policies, reward = [sft], None
    rounds = rounds_of(method, config.rounds)
    for round in rounds:
        update = None
        if round.reward_update is not None:
            assert reward is not None, "round 1 fits the first reward model"
            update = update_stage(setting, round, pairs=pairs, sft=sft, policy=policies[-1], reward=reward)
            if update_report(update).get("needs_sampler") and not summary.notes and (reasons := not_the_sampler(config)):
                summary.notes.append(f"{HEURISTIC}: {'; '.join(reasons)}.")
                setting.log.note(f"note: {summary.notes[0]}")
        if round.fits_reward:
            tokens, weights = updated_pairs(update, pairs)
            sources = {"pairs": pairs} | ({"update": update} if update is not None else {})
            reward = reward_stage(setting, round, sft, reward, tokens, weights, valid, sources)
        assert reward is not None
        if until == "reward":
            return
        start = policies[round.policy_start]
        models = {"sft": sft, "start": start, "reference": policies[round.reference], "reward": reward, "previous": policies[-1]}
        policies.append(policy_stage(setting, round, **models, carries=_carried(rounds, round)))
        if until == "ppo":
            return
        before = evaluations[round.policy_start]
        evaluations.append(evaluation_stage(setting, round.number, policy=policies[-1], sft=sft, reward=reward, before=before))
        summary.add(round.number, evaluations[-1], reward=reward, update=update)


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


def _carried(rounds: list[Round], round: Round) -> bool:
    """Whether the round after this one takes over its optimizer or its critic."""
    later = next((other for other in rounds if other.number == round.number + 1), None)
    return later is not None and not (later.restart_optimizer and later.restart_critic)


class Summary:
    """summary.json, rewritten after every round so that a stopped run has one too."""

    def __init__(self, setting: Setting, pairs: Done):
        self._setting, self._pairs = setting, pairs
        self.notes: list[str] = []
        self._rounds: list[dict[str, Any]] = []
        self._counted = 0  # stages whose seconds stand in a round already

    def add(self, number: int, evaluation: Done, *, reward: Done | None = None, update: Done | None = None) -> None:
        figures = evaluation.record["result"]
        names = ("gold", "proxy_start", "proxy", "kl_sft")
        row: dict[str, Any] = {"round": number, **{name: figures.get(name) for name in names}}
        report = update_report(update)
        row |= {"ess": report.get("ess"), "ess_fraction": report.get("ess_fraction"), "eta": report.get("eta")}
        row |= {"reward_accuracy": figures.get("reward_accuracy")}
        row |= {"reward_accuracy_valid": reward.record["result"]["accuracy_valid"] if reward else None}
        row |= {name: figures.get(name) for name in ("win_rate", "win_rate_low", "win_rate_high", "tie_rate", "length", "eos_rate")}
        done = self._setting.stages[self._counted :]  # a reward model that is kept was paid for before
        self._counted = len(self._setting.stages)
        row["seconds"] = round(sum(stage.record["seconds"] for stage in done), 3)
        self._rounds.append(row)
        config = self._setting.config
        body = {"method": config.method, "seed": config.seed, "name": config.name, "rounds": self._rounds, "notes": self.notes}
        _write(self._setting.folder / "summary.json", json.dumps(body, indent=1) + "\n")


def update_report(update: Done | None) -> dict[str, Any]:
    return {} if update is None else report_of(update.folder)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
