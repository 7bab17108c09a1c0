"""RLP-SPG: the reward model is refitted on the offline pairs and on pairs made of what the policy writes now.

Lang, Huang, Li (2024), Fine-Tuning Language Models with Reward Learning on Policy. The weight λ of the unsupervised multi-view loss, the
paper's other variant, is 0 here: what follows is plain Bradley–Terry on D ∪ D̂.
"""

import logging
from collections import Counter
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf import rng
from jaxrlhf.algorithms.reward_update import Pairs, RoundContext, encoder_options
from jaxrlhf.data.batches import take
from jaxrlhf.data.pairs import Pair, Prompt
from jaxrlhf.data.tables import write_table
from jaxrlhf.data.tokens import Limits, pad_id_of, tokenize_prompts
from jaxrlhf.models.hub import reward_bias
from jaxrlhf.models.hub.encoder import encoder_folder, load_classifier
from jaxrlhf.offline.encoder_identity import folder_hash
from jaxrlhf.offline.synthesize import (
    Choice,
    Meanings,
    Same,
    as_pairs,
    check_columns,
    choose,
    entailment,
    fitting_contexts,
    joined,
    kept_prompts,
    meanings,
    paired_prompts,
    same_by_entailment,
    same_by_vectors,
)
from jaxrlhf.offline.vectors import embed_cached
from jaxrlhf.rollouts.dataset import Sampling, renumbered, repeated, sample_texts
from jaxrlhf.scorers.reward_model import score_responses
from jaxrlhf.types import PromptBatch, TextBatch

SAMPLES = "synthetic.parquet"

_log = logging.getLogger(__name__)


class Drawn(NamedTuple):
    """The policy's n responses to each of P prompts: as tokens [P · n, …], prompt by prompt, and as text [P][n]."""

    prompts: list[Prompt]
    table: TextBatch
    texts: list[list[str]]


def synthetic(context: RoundContext, pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """All offline pairs and, after them, the policy's own (ids `synthetic-r{round}-{prompt id}`), every one with weight 1.

    Every response with its cluster, and the scores of those that were compared, is written as synthetic.parquet.
    """
    section = context.config.synthesize
    check_columns(pairs.tokens)
    drawn = sampled(context)
    same, how = _judge(context, drawn)
    found = meanings(drawn.texts, same)
    rows = paired_prompts(found, section.confidence)
    scores = _scores(context, drawn.table, rows, section.num_samples)
    choice = choose(found, rows, scores, rng.stream(context.key, "losers"))
    _write_samples(context, drawn, found, choice, scores)
    context.report(how | _facts(context, pairs, drawn, found, choice, scores))
    if not len(rows):
        _log.warning("no prompt gives a synthetic pair: the reward model is refitted on the offline pairs alone. Look at %s.", SAMPLES)
        return pairs, np.ones(len(pairs.rows), np.float32)
    tokens = joined(pairs.tokens, as_pairs(drawn.table, choice, section.num_samples), pad_id=pad_id_of(context.policy.tokenizer))
    both = Pairs(pairs.rows + _rows(context, pairs, drawn, choice), tokens)
    return both, np.ones(len(both.rows), np.float32)


def sampled(context: RoundContext) -> Drawn:
    """The policy's responses to the prompts of this round."""
    section, policy = context.config.synthesize, context.policy
    prompts, table = _asked(context)
    texts, said = sample_texts(
        policy,
        repeated(renumbered(table), section.num_samples),
        rng.stream(context.key, "samples"),
        Sampling.of(policy, max_new_tokens=context.config.ppo.response_length, temperature=section.temperature),
        batch_size=section.batch_size,
        mesh=context.mesh,
        **context.kept("what the policy writes now"),
    )
    n = section.num_samples
    return Drawn(prompts, texts, [said[start : start + n] for start in range(0, len(said), n)])


def _asked(context: RoundContext) -> tuple[list[Prompt], PromptBatch]:
    """So many of the run's prompts, other ones every round, from the start again where they end; none is asked twice in a round."""
    prompts = context.prompts()
    table, report = tokenize_prompts(prompts, context.policy.tokenizer, Limits(**asdict(context.config.data.limits)))
    wanted = context.config.synthesize.num_prompts
    first = (context.round - 2) * wanted  # corrections begin in round 2
    rows = np.arange(first, first + min(wanted, len(report.rows))) % len(report.rows)
    return [prompts[report.rows[i]] for i in rows], take(table, rows)


def _judge(context: RoundContext, drawn: Drawn) -> tuple[Same, dict[str, Any]]:
    """What says that two responses mean the same, and the record of it."""
    section, encoder = context.config.synthesize, context.config.encoder
    if section.nli is None:
        options = encoder_options(encoder)
        texts = list(dict.fromkeys(text for texts in drawn.texts for text in texts))
        progress = context.progress("embedding what the policy writes")
        how = {"folder": context.columns / "embeddings", "batch_size": encoder.batch_size, "mesh": context.mesh, "progress": progress}
        found = embed_cached(texts, **how, **options)  # kept as it goes, and what another round or arm has embedded is not computed again
        record = {"clusters": "embeddings", "encoder": found.identity._asdict()}
        return same_by_vectors(texts, found.vectors, section.similarity), record
    classifier = load_classifier(section.nli, mesh=context.mesh)
    how = {"batch_size": encoder.batch_size, "mesh": context.mesh, "progress": context.progress, "blocks": context.blocks}
    entails = entailment(classifier, **how)
    contexts, cut = fitting_contexts(classifier, [row.prompt for row in drawn.prompts], drawn.texts)
    named = {"files": folder_hash(encoder_folder(section.nli)), "source": section.nli, "labels": list(classifier.labels)}
    return same_by_entailment(contexts, entails), {"clusters": "nli", "nli": named, "prompts_cut": cut}


def _scores(context: RoundContext, table: TextBatch, rows_K: np.ndarray, n: int) -> np.ndarray:
    """The old reward model's scores [K, n] of all responses to the prompts `rows_K`."""
    reward = context.reward
    responses = take(table, (rows_K[:, None] * n + np.arange(n)).ravel())
    options = {"batch_size": context.config.reward.eval_batch_size, "mesh": context.mesh, "bias": reward_bias(reward)}
    options["blocks"] = context.blocks.of("scores")
    return score_responses(reward.model, reward.params, responses, **options).reshape(-1, n)


def _rows(context: RoundContext, pairs: Pairs, drawn: Drawn, choice: Choice) -> list[Pair]:
    """The synthetic pairs as text, under ids that no other pair has."""
    taken = set(pairs.ids)
    made = []
    for p, winner, loser in zip(*choice, strict=True):
        prompt, texts = drawn.prompts[p], drawn.texts[p]
        name = _free(f"synthetic-r{context.round}-{prompt.id}", taken)
        taken.add(name)
        made.append(Pair(name, prompt.prompt, texts[winner], texts[loser], prompt.source, templated=prompt.templated))
    return made


def _free(name: str, taken: set[str]) -> str:
    """`name`, or the first of `name-1`, `name-2` … that is free: pairs of an earlier run may be this run's data."""
    candidates = (f"{name}-{k}" if k else name for k in range(len(taken) + 1))
    return next(candidate for candidate in candidates if candidate not in taken)


def _facts(context: RoundContext, pairs: Pairs, drawn: Drawn, found: Meanings, choice: Choice, scores_Kn: np.ndarray) -> dict[str, Any]:
    """The account of the round. Whether the labels are right needs gold, which an update does not see; what the old model says, it does."""
    n, made = context.config.synthesize.num_samples, len(choice.prompt_K)
    kept = kept_prompts(found, context.config.synthesize.confidence)
    facts = {
        "prompts": len(drawn.prompts),
        "kept": int(kept.sum()),
        "confidence": float(found.confidence_P.mean()),
        "clusters_per_prompt": {str(k): count for k, count in sorted(Counter(found.count_P.tolist()).items())},
        "mean_clusters": float(found.count_P.mean()),
        "single_cluster": int((found.count_P == 1).sum()),
        "synthetic_pairs": made,
        "synthetic_share": made / (made + len(pairs.rows)),
    }
    if not made:
        return facts
    sides = {"winner": choice.winner_K, "loser": choice.loser_K}
    score = {name: scores_Kn[np.arange(made), side] for name, side in sides.items()}
    length = np.asarray(drawn.table.response_mask_BT).sum(axis=1)
    facts |= {f"{name}_score": float(values.mean()) for name, values in score.items()}
    facts |= {f"{name}_length": float(length[choice.prompt_K * n + side].mean()) for name, side in sides.items()}
    return facts | {"old_reward_agrees": float((score["winner"] > score["loser"]).mean())}


def _write_samples(context: RoundContext, drawn: Drawn, found: Meanings, choice: Choice, scores_Kn: np.ndarray) -> None:
    """One row a response: to see whether the clusters are what a person would call one meaning."""
    n, place = context.config.synthesize.num_samples, {int(p): k for k, p in enumerate(choice.prompt_K)}
    columns: dict[str, list[Any]] = {name: [] for name in ("id", "response", "cluster", "confidence", "score", "side")}
    for p, (prompt, texts) in enumerate(zip(drawn.prompts, drawn.texts, strict=True)):
        k = place.get(p)
        sides = {} if k is None else {int(choice.winner_K[k]): "chosen", int(choice.loser_K[k]): "rejected"}
        columns["id"] += [prompt.id] * n
        columns["response"] += texts
        columns["cluster"] += found.cluster_Pn[p].tolist()
        columns["confidence"] += [float(found.confidence_P[p])] * n
        columns["score"] += [None] * n if k is None else scores_Kn[k].tolist()
        columns["side"] += [sides.get(j, "") for j in range(n)]
    write_table(context.folder / SAMPLES, columns)
