"""The stages that make data: preference pairs, and what a reward update makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf import rng
from jaxrlhf.algorithms.reward import with_weights
from jaxrlhf.algorithms.rounds import SECTIONS_READ, Round, reward_update_named
from jaxrlhf.algorithms.update import Pairs, RoundContext, encoder_options
from jaxrlhf.config import Config
from jaxrlhf.data.batches import take
from jaxrlhf.data.pairs import Prompt, ReadReport
from jaxrlhf.data.tables import read_pair_table, write_pair_table
from jaxrlhf.data.tokens import decode_responses, eos_ids_of, pad_id_of, tokenize_pairs, tokenize_prompts
from jaxrlhf.models.encoder_files import encoder_folder, load_classifier
from jaxrlhf.models.hub import Loaded, eos_ids, read_tokenizer
from jaxrlhf.offline.embed import encoder_identity, folder_hash
from jaxrlhf.offline.label import label_pairs
from jaxrlhf.offline.synthesize import entailment_column
from jaxrlhf.plugins import plugin, source_of
from jaxrlhf.rollouts.dataset import Sampling, sample_dataset
from jaxrlhf.run import inputs
from jaxrlhf.run.setting import Setting
from jaxrlhf.storage.stage import Done, Stage
from jaxrlhf.types import PairBatch, PromptBatch, TextBatch

TRAIN, VALID, UPDATED, WEIGHTS, REPORT = "train.parquet", "valid.parquet", "pairs.parquet", "weights.npy", "report.json"


def sampling_of(loaded: Loaded, *, max_new_tokens: int, temperature: float) -> Sampling:
    """Untruncated sampling from a policy, up to the run's response length (the same for every method)."""
    return Sampling(
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids(loaded),
        temperature=temperature,
        vocab_size=len(loaded.tokenizer),
        pad_id=pad_id_of(loaded.tokenizer),
    )


def pairs_stage(setting: Setting, tokenizer_done: Done, sft: Done) -> Done:
    """Training pairs (and held-out ones) with their tokens: as the data has them, or sampled from π_SFT and labelled by gold."""
    config = setting.config
    sampled = config.pairs.source == "sample"

    def build(folder: Path) -> dict[str, Any]:
        return sampled_pairs(setting, folder, setting.load(sft, head="lm")) if sampled else stored_pairs(setting, folder, tokenizer_done)

    slice_ = {
        "pairs": asdict(config.pairs) if sampled else "data",
        "data": inputs.identity(config),
        "limits": asdict(config.data.limits),
        "gold": inputs.gold_identity(config) if sampled else None,
        "response_length": config.ppo.response_length if sampled else None,
        "seed": config.seed,
    }
    sources = {"tokenizer": tokenizer_done} | ({"sft": sft} if sampled else {})
    return setting.build(Stage("pairs", "data", "pairs", slice_, sources), build)


def stored_pairs(setting: Setting, folder: Path, tokenizer_done: Done) -> dict[str, Any]:
    """The data's own pairs, tokenised."""
    tokenizer, limits = read_tokenizer(tokenizer_done.folder), inputs.limits_of(setting.config)
    train, valid, read = inputs.pairs_of(setting.config, tokenizer)
    counts = {}
    for name, rows in ((TRAIN, train), (VALID, valid)):
        table, cut = tokenize_pairs(rows, tokenizer, limits, eos_ids=eos_ids_of(tokenizer))
        setting.report_rows(folder, name.removesuffix(".parquet"), read if name == TRAIN else type(read)(), cut)
        write_pair_table(folder / name, [rows[i] for i in cut.rows], table, pad_id=pad_id_of(tokenizer))
        counts[name.removesuffix(".parquet")] = cut.kept
    return {**counts, "dropped": len(read.dropped)}


def sampled_pairs(setting: Setting, folder: Path, sft: Loaded) -> dict[str, Any]:
    """Two responses of π_SFT to each prompt, labelled by gold; held-out pairs from other prompts, labelled without noise."""
    config, tokenizer = setting.config, sft.tokenizer
    prompts, read = inputs.prompts_of(config, tokenizer)
    rows = _cycled(prompts, config.pairs.num_pairs)
    noisy = {"rule": config.pairs.label, "label_flip": config.pairs.label_flip}
    result = labelled(setting, folder, TRAIN, sft, rows, read, **noisy)
    held_out = inputs.valid_prompts_of(config, tokenizer)
    valid = labelled(setting, folder, VALID, sft, held_out, ReadReport(kept=len(held_out)), rule="strict", label_flip=0.0)
    return {"train": result["kept"], "valid": valid["kept"], "identical": result["identical"], "gold_mean": result["gold_mean"]}


def labelled(
    setting: Setting, folder: Path, name: str, sft: Loaded, rows: list[Prompt], read: ReadReport, *, rule: Any, label_flip: float
) -> dict[str, Any]:
    """Write the pairs of two sampled responses to each of `rows` as the table `name`."""
    config, tokenizer, what = setting.config, sft.tokenizer, name.removesuffix(".parquet")
    gold = inputs.gold_of(config, setting.mesh)
    assert gold is not None, "a config that samples pairs names a gold scorer"
    table, cut = tokenize_prompts(rows, tokenizer, inputs.limits_of(config))
    setting.report_rows(folder, f"{what}-prompts", read, cut)
    rows = [rows[i] for i in cut.rows]
    sampling = sampling_of(sft, max_new_tokens=config.ppo.response_length, temperature=config.pairs.temperature)
    key = rng.stream(setting.key, f"pairs/{what}")
    size = min(config.pairs.batch_size, max(len(rows), 1))
    sides = [
        sample_dataset(
            sft.model,
            sft.params,
            renumbered(table, n),
            rng.stream(key, "side", n),
            sampling,
            batch_size=size,
            mesh=setting.mesh,
            progress=setting.progress(f"{what} pairs, response {n} of 2", tokens=size * sampling.max_new_tokens),
        )
        for n in (1, 2)
    ]
    texts = [decode_responses(side.response_BT, side.response_mask_BT, tokenizer, sampling.eos_ids) for side in sides]  # type: ignore[arg-type]
    asked = [row.prompt for row in rows]
    scores = [gold(asked, text) for text in texts]
    pairs, first, kept = label_pairs(rows, texts[0], texts[1], scores[0], scores[1], rule=rule, label_flip=label_flip, seed=config.seed)
    write_pair_table(folder / name, pairs, pair_batch(sides[0], sides[1], first, kept), pad_id=pad_id_of(tokenizer))
    identical = sum(a == b for a, b in zip(*texts, strict=True))
    for number, fault in ((identical, "got the same text twice"), (len(rows) - identical - len(kept), "got two texts of equal gold")):
        if number:
            setting.log.note(f"{what} pairs: {number} of {len(rows)} prompts {fault}; they say nothing and are left out")
    return {"kept": len(kept), "identical": identical, "gold_mean": float(np.mean(np.concatenate(scores)))}


def _cycled(rows: list[Prompt], n: int) -> list[Prompt]:
    """The first n prompts, from the start again where there are fewer (every turn is another sampling epoch)."""
    return [rows[i % len(rows)] for i in range(n)]


def renumbered(table: PromptBatch, number: int) -> PromptBatch:
    """The same prompts under row numbers of their own, so that no two samples share random numbers."""
    n = len(table.index_B)
    return replace(table, index_B=np.arange(n, dtype=np.int32) + number * n)


def pair_batch(first: TextBatch, second: TextBatch, first_is_chosen: np.ndarray, kept: np.ndarray) -> PairBatch:
    """Two tables of responses as pairs: the kept rows, chosen side by label."""
    a, b = take(first, kept), take(second, kept)
    wins = first_is_chosen[:, None]
    return PairBatch(
        a.prompt_BL,
        a.prompt_mask_BL,
        *(np.where(wins, x, y) for x, y in ((a.response_BT, b.response_BT), (a.response_mask_BT, b.response_mask_BT))),  # type: ignore[arg-type]
        *(np.where(wins, y, x) for x, y in ((a.response_BT, b.response_BT), (a.response_mask_BT, b.response_mask_BT))),  # type: ignore[arg-type]
        np.ones(len(kept), np.float32),  # type: ignore[arg-type]
        np.ones(len(kept), bool),  # type: ignore[arg-type]
        np.arange(len(kept), dtype=np.int32),  # type: ignore[arg-type]
    )


def check_update(config: Config, name: str) -> None:
    """Raise before anything is built where the update `name` cannot work with this config."""
    sections = SECTIONS_READ.get(name, ())
    if "synthesize" in sections and config.synthesize.nli is not None:
        entailment_column(load_classifier(config.synthesize.nli).labels)
    elif "encoder" in sections:
        encoder_identity(**encoder_options(config.encoder))


def update_stage(setting: Setting, round: Round, *, pairs: Done, sft: Done, policy: Done, reward: Done, before: Done | None) -> Done:
    """A reward update: which pairs the next reward model is fitted on, and with which weights. `before` is the last update."""
    config = setting.config
    name = round.reward_update or ""

    def build(folder: Path) -> dict[str, Any]:
        rows, tokens = read_pair_table(pairs.folder / TRAIN)
        given, columns = Pairs(rows, tokens), set(tokens.columns)
        sampler = setting.load(sft, head="lm")
        context = RoundContext(
            round=round.number,
            policy=setting.load(policy, head="lm"),
            sft=sampler,
            reward=setting.load(reward, head="scalar"),
            key=rng.stream(setting.key, "update", round.number),
            folder=folder,
            config=config,
            columns=setting.columns,
            policy_hash=policy.hash,
            sft_hash=sft.hash,
            mesh=setting.mesh,
            progress=lambda what: setting.progress(f"update, {what}", round=round.number),
            prompts=lambda: inputs.prompts_of(config, sampler.tokenizer)[0],
            kept_before=None if before is None else frozenset(updated_pairs(before, pairs)[0].ids),
        )
        update: Callable = reward_update_named(name, plugin)
        (folder / REPORT).unlink(missing_ok=True)  # of an attempt that was stopped
        setting.log.note(f"round {round.number} update: {name} on {len(rows)} pairs")
        chosen, weights_N = update(context, given)
        try:
            with_weights(chosen.tokens, weights_N)
        except ValueError as error:
            raise ValueError(f"reward update {name!r}: {error}") from None
        np.save(folder / WEIGHTS, np.asarray(weights_N, np.float32), allow_pickle=False)
        if chosen is not given or set(chosen.tokens.columns) != columns:
            write_pair_table(folder / UPDATED, chosen.rows, chosen.tokens, pad_id=pad_id_of(context.sft.tokenizer))
        health = {
            name: value for name, value in report_of(folder).items() if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if health:
            with setting.log.stage("update", round=round.number, total_steps=1, folder=folder) as stage:
                stage.step(1, {f"weights/{name}": value for name, value in health.items()})
        return {"update": name, "pairs": len(chosen.rows), "of": len(rows)}

    slice_ = {"update": name, "round": round.number, "seed": config.seed, **_read_by(name, config)}
    sources = {"pairs": pairs, "sft": sft, "policy": policy, "reward": reward} | ({} if before is None else {"before": before})
    stage = Stage(f"r{round.number}-update", "data", "update", slice_, sources, version=3, parent="policy")
    return setting.build(stage, build, round=round.number)


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
        sections["text"] = {"data": inputs.identity(config), "response_length": config.ppo.response_length}
    return sections


def report_of(folder: Path) -> dict[str, Any]:
    """What a reward update reported of itself (`report.json` in its folder), if anything."""
    path = folder / REPORT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_by_plugins(config: Config) -> dict[str, Any]:
    """The config less what names a run and where it is kept, logged and computed; no adapters where there are none."""
    elsewhere = ("name", "output", "store", "standalone", "arms", "method", "row", "rounds", "refit", "mesh", "checkpoint", "log")
    elsewhere += () if config.lora.r else ("lora",)
    read = {name: value for name, value in asdict(config).items() if name not in elsewhere}
    return read | {"model": {name: value for name, value in read["model"].items() if name not in inputs.OF_MEMORY}}


def updated_pairs(update: Done | None, pairs: Done) -> tuple[Pairs, np.ndarray]:
    """(pairs, weights_N) to be fitted on: all pairs with weight 1 where nothing was updated."""
    changed = update is not None and (update.folder / UPDATED).exists()
    rows, tokens = read_pair_table(update.folder / UPDATED if changed else pairs.folder / TRAIN)  # type: ignore[union-attr]
    weights = np.ones(len(rows), np.float32) if update is None else np.load(update.folder / WEIGHTS, allow_pickle=False)
    return Pairs(rows, tokens), weights


def valid_pairs(pairs: Done) -> PairBatch:
    """The held-out pairs: never filtered, never weighted, the same for every method."""
    return read_pair_table(pairs.folder / VALID)[1]
