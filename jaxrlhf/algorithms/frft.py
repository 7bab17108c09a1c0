"""FRFT: the reward model is refitted on the offline pairs that look like what the policy writes now.

Krishna, Sahoo (2024), Solving the Inverse Alignment Problem for Efficient RLHF. Rules and defaults are those of its public code, with the
deviations that offline/select.py names.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf import distributed, rng
from jaxrlhf.algorithms.ocrm import importance_weighted
from jaxrlhf.algorithms.reward_update import Pairs, RoundContext, encoder_options
from jaxrlhf.config import FilterConfig
from jaxrlhf.data.batches import take
from jaxrlhf.data.columns import cached_columns, fingerprint
from jaxrlhf.data.pairs import Pair, dataset_hash
from jaxrlhf.data.tokens import Limits, tokenize_prompts
from jaxrlhf.evaluation.filter_report import filter_report, write_filter_report
from jaxrlhf.files import read_sealed, sealed, write_whole
from jaxrlhf.offline.encoder_identity import encoder_identity
from jaxrlhf.offline.nearest import nearest_index, nearest_similarity, own_similarity
from jaxrlhf.offline.select import NAMES, keep_flags, select, similarity_header, texts_of
from jaxrlhf.offline.select import random_subset as drawn_at_random
from jaxrlhf.offline.vectors import embed_cached
from jaxrlhf.rollouts.dataset import Sampling, renumbered, sample_texts
from jaxrlhf.storage.blocks import NOWHERE, Blocks
from jaxrlhf.types import Progress, PromptBatch

SIDES, RANDOM = ("chosen", "rejected"), "random"
SAMPLED = ("temperature", "top_k", "top_p")  # of the section: how the policy writes


class FilterPrompts(NamedTuple):
    """The prompts that the policy answers, and for every pair the number of its own prompt among them (None: compared with all)."""

    prompts: list[str]
    tokens: PromptBatch
    own_N: np.ndarray | None


class Filter(NamedTuple):
    """Pairs and the policy's texts they are compared with: what the filter of a round and that of files have in common.

    `answers` is what the policy wrote to `prompts`, `own_N` the number of the answer to each pair's own prompt (None: every response is
    compared with all answers), `embedding` the keywords of `embed_cached`, `progress(what)` what a pass reports to, `blocks` where one
    keeps what it has found.
    """

    section: FilterConfig
    pairs: Sequence[Pair]
    prompts: Sequence[str]
    answers: Sequence[str]
    own_N: np.ndarray | None
    embedding: dict[str, Any]
    mesh: Any
    progress: Callable[[str], Progress | None]
    blocks: Blocks = NOWHERE

    def similarities(self) -> dict[str, np.ndarray]:
        """{"chosen_similarity", "rejected_similarity"}: cosines of both sides with the policy's texts, float32 [N]."""
        answers, found = self._vectors(), {}
        for side in SIDES:
            vectors = self._vectors(side)
            if self.own_N is not None:
                found[f"{side}_similarity"] = own_similarity(vectors, answers[self.own_N])
            else:
                how = {"mesh": self.mesh, "blocks": self.blocks, "progress": self.progress(f"comparing {side} responses")}
                found[f"{side}_similarity"] = nearest_similarity(vectors, answers, k=self.section.k, **how)
        return found

    def select_nearest(self, similar: dict[str, np.ndarray]) -> np.ndarray:
        """Row numbers of the pairs that the section's rule keeps."""
        chosen, rejected = (similar[f"{side}_similarity"] for side in SIDES)
        limits = {name: getattr(self.section, name) for name in ("rule", "n", "threshold")}
        return select(chosen, rejected, self._ids(), keys=self._keys(), **limits)

    def select_at_random(self, n: int, seed: int) -> np.ndarray:
        """Row numbers of `n` pairs drawn without regard to similarity."""
        return drawn_at_random(self._ids(), n, seed=seed, keys=self._keys())

    def report(self, similar: dict[str, np.ndarray], kept: np.ndarray, folder: str | Path, **facts: Any) -> dict[str, Any]:
        """Write what the filter did to the data to `folder`; `facts` are further keywords of `filter_report`."""
        near = self.own_N if self.own_N is not None else self._nearest()
        said = {name: getattr(self.section, name) for name in ("rule", "n", "threshold", "compare", "k")}
        chosen, rejected = (similar[f"{side}_similarity"] for side in SIDES)
        report = filter_report(self.pairs, chosen, rejected, kept, generations=self.answers, nearest_N=near, **said | facts)
        write_filter_report(report, folder)
        return report

    def _nearest(self) -> np.ndarray:
        how = {"mesh": self.mesh, "blocks": self.blocks.of("index"), "progress": self.progress("finding the nearest")}
        return nearest_index(self._vectors("chosen"), self._vectors(), **how)

    def _ids(self) -> list[str]:
        return [pair.id for pair in self.pairs]

    def _keys(self) -> list[str] | None:
        return texts_of(self.pairs) if self.section.dedupe else None

    def _vectors(self, side: str | None = None) -> np.ndarray:
        """Unit vectors of a side's responses or of the policy's (with `embed: prompt+response` of both, here as there: one alone would
        compare prompts)."""
        texts = self.answers if side is None else [getattr(pair, side) for pair in self.pairs]
        if self.section.embed == "prompt+response":
            prompts = self.prompts if side is None else [pair.prompt for pair in self.pairs]
            texts = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        what = "the policy's text" if side is None else f"{side} responses"
        return embed_cached(texts, mesh=self.mesh, progress=self.progress(f"embedding {what}"), **self.embedding).vectors


def nearest(context: RoundContext, pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """The pairs nearest to the policy's own text, with weight 1."""
    here, similar = similarities(context, pairs)
    return _reported(context, pairs, here, similar, np.flatnonzero(similar["keep"]), context.config.filter.rule)


def random_subset(context: RoundContext, pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """The control: as many pairs as `nearest` keeps, drawn at random, and nothing else different."""
    here, similar = similarities(context, pairs)
    drawn = here.select_at_random(int(similar["keep"].sum()), rng.number(rng.stream(context.key, "random-subset")))
    return _reported(context, pairs, here, similar, drawn, RANDOM)


def nearest_importance_weighted(context: RoundContext, pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """The nearest pairs, and among them OCRM's weights."""
    kept, _ = nearest(context, pairs)
    return importance_weighted(context, kept)


def similarities(context: RoundContext, pairs: Pairs) -> tuple[Filter, dict[str, np.ndarray]]:
    """How near every pair is to what the policy writes now, and whether it is kept: {"chosen_similarity", "rejected_similarity", "keep"}.

    From disk where these pairs and this policy have been seen before.
    """
    section, encoder, asked = context.config.filter, context.config.encoder, _asked(context, pairs)
    facts = {"policy": context.policy_hash, "prompts": asked.prompts, "seed": context.config.seed, "round": context.round}
    facts |= {"max_new_tokens": _max_new_tokens(context), **{name: getattr(section, name) for name in SAMPLED}}
    answers = _kept_on_disk(context.columns / f"texts-{fingerprint(facts)}.json", lambda: _answers(context, asked))
    embedding = {"folder": context.columns / "embeddings", "batch_size": encoder.batch_size, **encoder_options(encoder)}
    here = Filter(section, pairs.rows, asked.prompts, answers, asked.own_N, embedding, context.mesh, context.progress, context.blocks)
    header = similarity_header(
        section,
        dataset=dataset_hash(pairs.rows),
        policy=context.policy_hash,
        generations=fingerprint(facts),
        encoder=encoder_identity(**encoder_options(encoder)).key,
    )

    def compare() -> dict[str, np.ndarray]:
        similar = here.similarities()
        return similar | {"keep": keep_flags(here.select_nearest(similar), len(pairs.rows))}

    return here, cached_columns(context.columns / f"similarities-{fingerprint(header)}", pairs.ids, NAMES, header, compare)


def _reported(
    context: RoundContext, pairs: Pairs, here: Filter, similar: dict[str, np.ndarray], kept: np.ndarray, rule: str
) -> tuple[Pairs, np.ndarray]:
    """The pairs `kept`, with weight 1, and the account of them."""
    here.report(similar, kept, context.folder, rule=rule, round=context.round, previous=context.kept_before)
    means = {f"{side}_similarity": float(similar[f"{side}_similarity"][kept].mean()) for side in SIDES}
    context.report({"kept": len(kept), "kept_share": len(kept) / len(pairs.rows), **means})
    return pairs.select(kept), np.ones(len(kept), np.float32)


def _kept_on_disk(path: Path, make: Callable[[], list[str]]) -> list[str]:
    """A list of texts, made once."""
    leads = distributed.is_leader()
    if not distributed.agree(leads and path.exists(), f"texts {path.name}"):
        texts = make()
        if leads:
            write_whole(path, json.dumps(sealed({"texts": texts}), ensure_ascii=False))
    try:
        return distributed.agree(read_sealed(path)["texts"] if leads else None, f"the texts of {path.name}")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it, and the texts are written again.") from error


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
        **context.kept("what the policy writes now"),
    )
    return texts


def _max_new_tokens(context: RoundContext) -> int:
    return context.config.filter.max_new_tokens or context.config.ppo.response_length
