"""FRFT: the reward model is refitted on the offline pairs that look like what the policy writes now.

Krishna, Sahoo (2024), Solving the Inverse Alignment Problem for Efficient RLHF. Rules and defaults are those of its public code, with the
deviations that offline/select.py names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrlhf import distributed, rng
from jaxrlhf.algorithms.ocrm import importance_weighted
from jaxrlhf.algorithms.reward_update import Pairs, RoundContext, encoder_options
from jaxrlhf.config import FilterConfig
from jaxrlhf.data.batches import take
from jaxrlhf.data.columns import fingerprint
from jaxrlhf.data.pairs import dataset_hash
from jaxrlhf.data.tokens import Limits, tokenize_prompts
from jaxrlhf.evaluation.filter_report import filter_report, write_filter_report
from jaxrlhf.offline.encoder_identity import encoder_identity
from jaxrlhf.offline.nearest import nearest_index, nearest_similarity, own_similarity
from jaxrlhf.offline.select import keep_flags, read_similarities, select, similarity_header, texts_of, write_similarities
from jaxrlhf.offline.select import random_subset as drawn_at_random
from jaxrlhf.offline.vectors import embed_cached
from jaxrlhf.rollouts.dataset import Sampling, renumbered, sample_texts
from jaxrlhf.types import PromptBatch

SAMPLED = ("temperature", "top_k", "top_p")  # of the section: how the policy writes


class FilterPrompts(NamedTuple):
    """The prompts that the policy answers, and for every pair the number of its own prompt among them (None: compared with all)."""

    prompts: list[str]
    tokens: PromptBatch
    own_N: np.ndarray | None


class Similarities(NamedTuple):
    """What the filter knows; `columns` holds {"chosen_similarity", "rejected_similarity", "keep"} of every pair."""

    asked: FilterPrompts
    answers: list[str]
    columns: dict[str, np.ndarray]


def nearest(context: RoundContext, pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """The pairs nearest to the policy's own text, with weight 1."""
    found = similarities(context, pairs)
    return _reported(context, pairs, context.config.filter.rule, found, np.flatnonzero(found.columns["keep"]))


def random_subset(context: RoundContext, pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """The control: as many pairs as `nearest` keeps, drawn at random, and nothing else different."""
    found = similarities(context, pairs)
    seed, keys = rng.number(rng.stream(context.key, "random-subset")), _keys(context.config.filter, pairs)
    drawn = drawn_at_random(pairs.ids, int(found.columns["keep"].sum()), seed=seed, keys=keys)
    return _reported(context, pairs, "random", found, drawn)


def nearest_importance_weighted(context: RoundContext, pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """The nearest pairs, and among them OCRM's weights."""
    kept, _ = nearest(context, pairs)
    return importance_weighted(context, kept)


def similarities(context: RoundContext, pairs: Pairs) -> Similarities:
    """How near every pair is to what the policy writes now; from disk where these pairs and this policy have been seen before."""
    section, asked = context.config.filter, _asked(context, pairs)
    facts = {"policy": context.policy_hash, "prompts": asked.prompts, "seed": context.config.seed, "round": context.round}
    facts |= {"max_new_tokens": _max_new_tokens(context), **{name: getattr(section, name) for name in SAMPLED}}
    answers = _kept_on_disk(context.columns / f"generations-{fingerprint(facts)}.json", lambda: _answers(context, asked))
    header = similarity_header(
        dataset=dataset_hash(pairs.rows),
        policy=context.policy_hash,
        generations=fingerprint(facts),
        encoder=encoder_identity(**encoder_options(context.config.encoder)).key,
        **{name: getattr(section, name) for name in ("rule", "n", "threshold", "compare", "k", "embed", "dedupe")},
    )
    folder = context.columns / f"similarities-{fingerprint(header)}"
    leads = distributed.is_leader()
    if not distributed.agree(leads and folder.exists(), f"similarities {folder.name}"):
        found = _compare(context, pairs, asked, answers)
        if leads:
            write_similarities(folder, pairs.ids, found, header, overwrite=True)
    columns = read_similarities(pairs.ids, folder, expect=header) if leads else None
    return Similarities(asked, answers, distributed.agree_on_columns(columns, f"columns of {folder.name}"))


def _compare(context: RoundContext, pairs: Pairs, asked: FilterPrompts, answers: list[str]) -> dict[str, np.ndarray]:
    """Both sides and the policy's text are embedded and compared, and the rule decides."""
    section = context.config.filter
    generations = _vectors(context, "the policy's text", asked.prompts, answers)
    columns = {}
    for side in ("chosen", "rejected"):
        vectors = _side(context, pairs, side)
        if asked.own_N is not None:
            columns[f"{side}_similarity"] = own_similarity(vectors, generations[asked.own_N])
        else:
            columns[f"{side}_similarity"] = nearest_similarity(vectors, generations, k=section.k, mesh=context.mesh)
    chosen, rejected, keys = columns["chosen_similarity"], columns["rejected_similarity"], _keys(section, pairs)
    kept = select(chosen, rejected, pairs.ids, rule=section.rule, n=section.n, threshold=section.threshold, keys=keys)
    return columns | {"keep": keep_flags(kept, len(pairs.rows))}


def _reported(context: RoundContext, pairs: Pairs, rule: str, found: Similarities, kept: np.ndarray) -> tuple[Pairs, np.ndarray]:
    """The pairs `kept`, with weight 1, and the account of them."""
    section, similar = context.config.filter, found.columns
    near = found.asked.own_N
    if near is None:
        generations = _vectors(context, "the policy's text", found.asked.prompts, found.answers)
        near = nearest_index(_side(context, pairs, "chosen"), generations, mesh=context.mesh)
    report = filter_report(
        pairs.rows,
        similar["chosen_similarity"],
        similar["rejected_similarity"],
        kept,
        rule=rule,
        n=section.n,
        threshold=section.threshold,
        compare=section.compare,
        k=section.k,
        round=context.round,
        previous=context.kept_before,
        generations=found.answers,
        nearest_N=near,
    )
    write_filter_report(report, context.folder)
    means = {f"{side}_similarity": float(similar[f"{side}_similarity"][kept].mean()) for side in ("chosen", "rejected")}
    context.report({"kept": len(kept), "kept_share": len(kept) / len(pairs.rows), **means})
    return pairs.select(kept), np.ones(len(kept), np.float32)


def _side(context: RoundContext, pairs: Pairs, side: str) -> np.ndarray:
    return _vectors(context, f"{side} responses", [row.prompt for row in pairs.rows], [getattr(row, side) for row in pairs.rows])


def _vectors(context: RoundContext, what: str, prompts: list[str], responses: list[str]) -> np.ndarray:
    """Unit vectors of responses (with `embed: prompt+response` of both, here as there: one side alone would compare prompts)."""
    joined = context.config.filter.embed == "prompt+response"
    texts = [prompt + text for prompt, text in zip(prompts, responses, strict=True)] if joined else responses
    encoder = context.config.encoder
    return embed_cached(
        texts,
        folder=context.columns / "embeddings",
        batch_size=encoder.batch_size,
        mesh=context.mesh,
        progress=context.progress(f"embedding {what}"),
        **encoder_options(encoder),
    ).vectors


def _kept_on_disk(path: Path, make: Callable[[], list[str]]) -> list[str]:
    """A list of texts, made once."""
    leads = distributed.is_leader()
    if not distributed.agree(leads and path.exists(), f"texts {path.name}"):
        texts = make()
        if leads:
            partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
            os.replace(partial, path)
    return distributed.agree(json.loads(path.read_text(encoding="utf-8")) if leads else None, f"the texts of {path.name}")


def _asked(context: RoundContext, pairs: Pairs) -> FilterPrompts:
    """`compare: own`: every distinct prompt of the pairs. `nearest`: so many of the run's prompts, others every round if they are fresh."""
    section = context.config.filter
    if section.compare == "own":
        prompts = [row.prompt for row in pairs.rows]
        number = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
        own_N = np.array([number[prompt] for prompt in prompts])
        _, first = np.unique(own_N, return_index=True)
        tokens = pairs.tokens
        table = PromptBatch(tokens.prompt_BL, tokens.prompt_mask_BL, tokens.row_mask_B, tokens.index_B)
        return FilterPrompts(list(number), renumbered(take(table, first)), own_N)
    limits, prompts = context.config.data.limits, context.prompts()
    table, report = tokenize_prompts(prompts, context.policy.tokenizer, Limits(**asdict(limits)))
    kept = [prompts[i].prompt for i in report.rows]
    first = (context.round - 2) * section.num_prompts if section.round_prompts == "fresh" else 0
    rows = np.arange(first, first + section.num_prompts) % len(kept)  # from the start again where there are fewer
    return FilterPrompts([kept[i] for i in rows], renumbered(take(table, rows)), None)


def _answers(context: RoundContext, asked: FilterPrompts) -> list[str]:
    """The policy's text for every prompt."""
    section, how = context.config.filter, {name: getattr(context.config.filter, name) for name in SAMPLED}
    _, texts = sample_texts(
        context.policy,
        asked.tokens,
        rng.stream(context.key, "generations"),
        Sampling.of(context.policy, max_new_tokens=_max_new_tokens(context), **how),
        batch_size=section.batch_size,
        mesh=context.mesh,
        progress=context.progress("what the policy writes now"),
    )
    return texts


def _max_new_tokens(context: RoundContext) -> int:
    return context.config.filter.max_new_tokens or context.config.ppo.response_length


def _keys(section: FilterConfig, pairs: Pairs) -> list[str] | None:
    return texts_of(pairs.rows) if section.dedupe else None
