"""The preference pairs of a run: read, or sampled from π_SFT and labelled by gold."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf import rng
from jaxrlhf.data.batches import take
from jaxrlhf.data.pairs import DataError, Prompt, ReadReport
from jaxrlhf.data.tables import read_pair_table, write_pair_table
from jaxrlhf.data.tokens import eos_ids_of, pad_id_of, tokenize_pairs, tokenize_prompts
from jaxrlhf.evaluation.baselines import pair_baselines
from jaxrlhf.models.hub import Loaded, read_tokenizer
from jaxrlhf.offline.label import label_pairs
from jaxrlhf.pipeline import inputs
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.rollouts.dataset import Sampling, renumbered, sample_texts
from jaxrlhf.storage.stage import Done, Stage
from jaxrlhf.types import PairBatch, PromptBatch, TextBatch

TRAIN, VALID, UPDATED, WEIGHTS, REPORT = "train.parquet", "valid.parquet", "pairs.parquet", "weights.npy", "report.json"


def pairs_stage(run: RunContext, tokenizer_done: Done, sft: Done) -> Done:
    """Training pairs (and held-out ones) with their tokens: as the data has them, or sampled from π_SFT and labelled by gold."""
    config = run.config
    sampled = config.pairs.source == "sample"

    def build(folder: Path) -> dict[str, Any]:
        counts = sampled_pairs(run, folder, run.load(sft, head="lm")) if sampled else stored_pairs(run, folder, tokenizer_done)
        (train, _), (valid, tokens) = (read_pair_table(folder / name) for name in (TRAIN, VALID))
        fitted, held = ([(pair.chosen, pair.rejected) for pair in rows] for rows in (train, valid))
        lengths = [np.asarray(mask).sum(axis=1) for mask in (tokens.chosen_mask_BT, tokens.rejected_mask_BT)]
        return counts | {"baselines": pair_baselines(fitted, held, lengths)}

    slice_ = {
        "pairs": asdict(config.pairs) if sampled else "data",
        "data": inputs.data_identity(config),
        "limits": asdict(config.data.limits),
        "gold": inputs.gold_identity(config) if sampled else None,
        "response_length": config.ppo.response_length if sampled else None,
        "seed": config.seed,
    }
    sources = {"tokenizer": tokenizer_done} | ({"sft": sft} if sampled else {})
    return run.build(Stage("pairs", "data", "pairs", slice_, sources, version=2), build)


def stored_pairs(run: RunContext, folder: Path, tokenizer_done: Done) -> dict[str, Any]:
    """The data's own pairs, tokenised."""
    tokenizer, limits = read_tokenizer(tokenizer_done.folder), inputs.limits_of(run.config)
    train, valid, read = inputs.pairs_of(run.config, tokenizer)
    counts = {}
    for name, rows in ((TRAIN, train), (VALID, valid)):
        table, cut = tokenize_pairs(rows, tokenizer, limits, eos_ids=eos_ids_of(tokenizer))
        run.report_rows(folder, name.removesuffix(".parquet"), read if name == TRAIN else type(read)(), cut)
        write_pair_table(folder / name, [rows[i] for i in cut.rows], table, pad_id=pad_id_of(tokenizer))
        counts[name.removesuffix(".parquet")] = cut.kept
    return {**counts, "dropped": len(read.dropped)}


def sampled_pairs(run: RunContext, folder: Path, sft: Loaded) -> dict[str, Any]:
    """Two responses of π_SFT to each prompt, labelled by gold; held-out pairs from other prompts, labelled without noise."""
    config, tokenizer = run.config, sft.tokenizer
    prompts, read = inputs.prompts_of(config, tokenizer)
    rows = [prompts[i % len(prompts)] for i in range(config.pairs.num_pairs)]  # every turn is another sampling epoch
    noisy = {"rule": config.pairs.label, "label_flip": config.pairs.label_flip}
    result = labelled(run, folder, TRAIN, sft, rows, read, **noisy)
    held_out = inputs.valid_prompts_of(config, tokenizer)
    valid = labelled(run, folder, VALID, sft, held_out, ReadReport(kept=len(held_out)), rule="strict", label_flip=0.0)
    facts = {"train": result["kept"], "valid": valid["kept"], "identical": result["identical"], "gold_mean": result["gold_mean"]}
    return facts | {"sampled_tokens": result["tokens"] + valid["tokens"]}  # of the pairs that are left out too


def labelled(
    run: RunContext, folder: Path, name: str, sft: Loaded, rows: list[Prompt], read: ReadReport, *, rule: Any, label_flip: float
) -> dict[str, Any]:
    """Write the pairs of two sampled responses to each of `rows` as the table `name`."""
    config, tokenizer, what = run.config, sft.tokenizer, name.removesuffix(".parquet")
    gold = inputs.gold_of(config, run.mesh)
    assert gold is not None, "a config that samples pairs names a gold scorer"
    table, cut = tokenize_prompts(rows, tokenizer, inputs.limits_of(config))
    run.report_rows(folder, f"{what}-prompts", read, cut)
    rows = [rows[i] for i in cut.rows]
    keys = [rng.stream(rng.stream(run.key, f"pairs/{what}"), "side", n) for n in (1, 2)]
    how = {"first": 1, "temperature": config.pairs.temperature, "batch_size": config.pairs.batch_size}
    sides, texts = two_responses(run, sft, table, keys, f"{what} pairs", **how)
    asked = [row.prompt for row in rows]
    scores = [gold(asked, text, run.blocks) for text in texts]
    identical = sum(a == b for a, b in zip(*texts, strict=True))
    if identical == len(rows) and name == TRAIN:
        raise DataError(
            f"no pair is left: π_SFT gave all {len(rows)} prompts the same text twice, and equal texts are no preference. Raise "
            f"pairs.temperature ({config.pairs.temperature:g}) or ppo.response_length ({config.ppo.response_length}), or train SFT less."
        )
    pairs, first, kept = label_pairs(rows, texts[0], texts[1], scores[0], scores[1], rule=rule, label_flip=label_flip, seed=config.seed)
    write_pair_table(folder / name, pairs, pair_batch(sides[0], sides[1], first, kept), pad_id=pad_id_of(tokenizer))
    for number, fault in ((identical, "got the same text twice"), (len(rows) - identical - len(kept), "got two texts of equal gold")):
        if number:
            run.log.note(f"{what} pairs: {number} of {len(rows)} prompts {fault}; they say nothing and are left out")
    tokens = sum(int(np.sum(side.prompt_mask_BL) + np.sum(side.response_mask_BT)) for side in sides)
    return {"kept": len(kept), "identical": identical, "gold_mean": float(np.mean(np.concatenate(scores))), "tokens": tokens}


def two_responses(
    run: RunContext, loaded: Loaded, table: PromptBatch, keys: Sequence[jax.Array], what: str, *, first: int, round: int | None = None,
    temperature: float, batch_size: int,
) -> tuple[tuple[TextBatch, ...], tuple[list[str], ...]]:  # fmt: skip
    """(tokens, texts) of two samples of a policy's responses, one a key, their rows renumbered from sample `first` on."""
    sampling = Sampling.of(loaded, max_new_tokens=run.config.ppo.response_length, temperature=temperature)
    size = min(batch_size, max(len(table.index_B), 1))
    both = []
    for n, key in enumerate(keys):
        how = run.kept(f"{what}, response {n + 1} of 2", round=round, tokens=size * sampling.max_new_tokens)
        both.append(sample_texts(loaded, renumbered(table, first + n), key, sampling, batch_size=size, mesh=run.mesh, **how))
    tables, texts = zip(*both, strict=True)
    return tables, texts


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


def valid_pairs(pairs: Done) -> PairBatch:
    """The held-out pairs: never filtered, never weighted, the same for every method."""
    return read_pair_table(pairs.folder / VALID)[1]
