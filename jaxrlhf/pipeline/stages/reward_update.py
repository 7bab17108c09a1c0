"""A reward update as a stage: which pairs the next reward model is fitted on, and with which weights."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf import rng
from jaxrlhf.algorithms.reward import with_weights
from jaxrlhf.algorithms.reward_update import Pairs, RoundContext, encoder_options
from jaxrlhf.algorithms.rounds import SECTIONS_READ, Round, reward_update_named
from jaxrlhf.config import Config
from jaxrlhf.data.tables import read_pair_table, write_pair_table
from jaxrlhf.data.tokens import pad_id_of
from jaxrlhf.files import read_json
from jaxrlhf.models.hub.encoder import encoder_folder, load_classifier
from jaxrlhf.offline.encoder_identity import encoder_identity, folder_hash
from jaxrlhf.offline.synthesize import entailment_column
from jaxrlhf.pipeline import inputs
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.pipeline.stages.pairs import REPORT, TRAIN, UPDATED, WEIGHTS
from jaxrlhf.plugins import plugin, source_of
from jaxrlhf.storage.stage import Done, Stage


def check_update(config: Config, name: str) -> None:
    """Raise before anything is built where the update `name` cannot work with this config."""
    sections = SECTIONS_READ.get(name, ())
    if "synthesize" in sections and config.synthesize.nli is not None:
        entailment_column(load_classifier(config.synthesize.nli).labels)
    elif "encoder" in sections:
        encoder_identity(**encoder_options(config.encoder))


def update_stage(run: RunContext, round: Round, *, pairs: Done, sft: Done, policy: Done, reward: Done, before: Done | None) -> Done:
    """A reward update: which pairs the next reward model is fitted on, and with which weights. `before` is the last update."""
    config = run.config
    name = round.reward_update or ""

    def build(folder: Path) -> dict[str, Any]:
        rows, tokens = read_pair_table(pairs.folder / TRAIN)
        given, columns = Pairs(rows, tokens), set(tokens.columns)
        sampler = run.load(sft, head="lm")
        context = RoundContext(
            round=round.number,
            policy=run.load(policy, head="lm"),
            sft=sampler,
            reward=run.load(reward, head="scalar"),
            key=rng.stream(run.key, "update", round.number),
            folder=folder,
            config=config,
            columns=run.columns,
            policy_hash=policy.hash,
            sft_hash=sft.hash,
            mesh=run.mesh,
            progress=lambda what: run.progress(f"update, {what}", round=round.number),
            blocks=run.blocks,
            prompts=lambda: inputs.prompts_of(config, sampler.tokenizer)[0],
            kept_before=None if before is None else frozenset(updated_pairs(before, pairs)[0].ids),
        )
        update: Callable = reward_update_named(name, plugin)
        (folder / REPORT).unlink(missing_ok=True)  # of an attempt that was stopped
        run.log.note(f"round {round.number} update: {name} on {len(rows)} pairs")
        chosen, weights_N = update(context, given)
        try:
            with_weights(chosen.tokens, weights_N)
        except ValueError as error:
            raise ValueError(f"reward update {name!r}: {error}") from None
        if not len(weights_N):
            raise ValueError(f"reward update {name!r} left none of the {len(rows)} pairs; there is nothing to fit a reward model on.")
        np.save(folder / WEIGHTS, np.asarray(weights_N, np.float32), allow_pickle=False)
        if chosen is not given or set(chosen.tokens.columns) != columns:
            write_pair_table(folder / UPDATED, chosen.rows, chosen.tokens, pad_id=pad_id_of(context.sft.tokenizer))
        health = {
            name: value for name, value in report_of(folder).items() if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if health:
            with run.log.stage("update", round=round.number, total_steps=1, folder=folder) as stage:
                stage.step(1, {f"weights/{name}": value for name, value in health.items()})
        return {"update": name, "pairs": len(chosen.rows), "of": len(rows)}

    slice_ = {"update": name, "round": round.number, "seed": config.seed, **_read_by(name, config)}
    sources = {"pairs": pairs, "sft": sft, "policy": policy, "reward": reward} | ({} if before is None else {"before": before})
    stage = Stage(f"r{round.number}-update", "data", "update", slice_, sources, version=3, parent="policy")
    return run.build(stage, build, round=round.number)


def _read_by(name: str, config: Config) -> dict[str, Any]:
    """What the update `name` reads of the config; code that is not ours may read all of it."""
    if ":" in name:
        return {"plugin": source_of(name), "config": read_by_plugins(config)}
    sections: dict[str, Any] = {section: asdict(getattr(config, section)) for section in SECTIONS_READ[name]}
    nli = config.synthesize.nli if "synthesize" in sections else None
    if nli is not None:
        sections["encoder"] = None
        sections["synthesize"]["nli"] = folder_hash(encoder_folder(nli))
    elif "encoder" in sections:
        sections["encoder"] = encoder_identity(**encoder_options(config.encoder)).key
    if "encoder" in sections:
        sections["text"] = {"data": inputs.data_identity(config), "response_length": config.ppo.response_length}
    return sections


def report_of(folder: Path) -> dict[str, Any]:
    """What a reward update reported of itself (`report.json` in its folder), if anything."""
    path = folder / REPORT
    return read_json(path, f"delete {folder}, and the same run builds it again") if path.exists() else {}


def read_by_plugins(config: Config) -> dict[str, Any]:
    """The config less what names a run and where it is kept, logged and computed; no adapters where there are none."""
    elsewhere = ("name", "output", "store", "standalone", "arms", "method", "row", "rounds", "refit", "mesh", "checkpoint", "log", "guards")
    elsewhere += () if config.lora.r else ("lora",)
    read = {name: value for name, value in asdict(config).items() if name not in elsewhere}
    return read | {"model": {name: value for name, value in read["model"].items() if name not in inputs.OF_MEMORY}}


def updated_pairs(update: Done | None, pairs: Done) -> tuple[Pairs, np.ndarray]:
    """(pairs, weights_N) to be fitted on: all pairs with weight 1 where nothing was updated. ValueError where a stage of an earlier version
    has left none."""
    changed = update is not None and (update.folder / UPDATED).exists()
    path = update.folder / UPDATED if changed else pairs.folder / TRAIN  # type: ignore[union-attr]
    rows, tokens = read_pair_table(path)
    if not rows:
        raise ValueError(f"there is nothing to fit on: {path} has no pairs; change what chose them, and delete its folder to choose again.")
    weights = np.ones(len(rows), np.float32) if update is None else np.load(update.folder / WEIGHTS, allow_pickle=False)
    return Pairs(rows, tokens), weights
