"""Preference pairs out of a policy's own text, as RLP-SPG makes them: what the policy mostly means is preferred to what it rarely means.

For every prompt the policy's n responses are put into clusters of one meaning; the prompt's confidence is |largest cluster| / n, and
prompts below γ are left out. The preferred response is the member of the largest cluster that the old reward model scores highest, the
other one a random member of any other cluster.

Lang, Huang, Li (2024), Fine-Tuning Language Models with Reward Learning on Policy; the clusters are those of semantic entropy: Kuhn, Gal,
Farquhar (2023), Semantic Uncertainty, algorithm 1. Arrays: P prompts, n responses to each, [P, n] row by row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf import rng
from jaxrlhf.data.batches import take
from jaxrlhf.models.hub.encoder import LoadedClassifier
from jaxrlhf.offline.encoders import classify_pairs
from jaxrlhf.offline.nearest import own_similarity
from jaxrlhf.storage.blocks import NOWHERE, Blocks
from jaxrlhf.types import PairBatch, TextBatch

ENTAILMENT = "entailment"


class Query(NamedTuple):
    """Do two different responses to one prompt mean the same?"""

    prompt: int  # row of the prompt
    first: str
    second: str


Same = Callable[[Sequence[Query]], np.ndarray]  # booleans, one a query
Entails = Callable[[Sequence[str], Sequence[str]], np.ndarray]  # (premises, hypotheses) → booleans, one a pair


class Meanings(NamedTuple):
    """The clusters of every prompt's responses, numbered in the order in which their first members were drawn."""

    cluster_Pn: np.ndarray  # int32: the cluster of each response
    largest_P: np.ndarray  # int32: the largest cluster; of equally large ones the one whose first member was drawn first
    confidence_P: np.ndarray  # float64: share of the responses in it
    count_P: np.ndarray  # int32: clusters


class Choice(NamedTuple):
    """K pairs: the row of the prompt, and which of its responses is preferred to which."""

    prompt_K: np.ndarray
    winner_K: np.ndarray
    loser_K: np.ndarray


def meanings(texts_Pn: Sequence[Sequence[str]], same: Same) -> Meanings:
    """Put each prompt's responses into clusters of one meaning.

    A response joins the first cluster whose *first* member means the same, as in semantic entropy; where there is none, it begins
    one. Meaning the same is not transitive, so two members may differ from each other, and the order of the responses, in which
    they were drawn, matters. Equal texts mean the same without being asked about. `same` is asked once a cluster number, about all prompts
    together: nothing is asked that the rule does not need.
    """
    rest = [list(dict.fromkeys(texts)) for texts in texts_Pn]
    cluster: list[dict[str, int]] = [{} for _ in texts_Pn]
    number = 0
    while any(rest):
        asked = [Query(p, texts[0], other) for p, texts in enumerate(rest) for other in texts[1:]]
        for p, texts in enumerate(rest):
            cluster[p] |= {text: number for text in texts[:1]}
        for query, yes in zip(asked, same(asked) if asked else (), strict=True):
            if yes:
                cluster[query.prompt][query.second] = number
        rest = [[text for text in texts if text not in cluster[p]] for p, texts in enumerate(rest)]
        number += 1
    return measured(np.array([[cluster[p][text] for text in texts] for p, texts in enumerate(texts_Pn)], np.int32))


def measured(cluster_Pn: np.ndarray) -> Meanings:
    """The largest cluster of each prompt and its share."""
    sizes = [np.bincount(row) for row in cluster_Pn]
    largest = np.array([size.argmax() for size in sizes], np.int32)  # the first of equals
    share = np.array([size.max() for size in sizes], np.float64) / cluster_Pn.shape[1]
    return Meanings(cluster_Pn, largest, share, np.array([len(size) for size in sizes], np.int32))


def same_by_vectors(texts: Sequence[str], vectors_ND: np.ndarray, similarity: float) -> Same:
    """Two responses mean the same if the cosine of their unit vectors is at least `similarity`; the prompt plays no part.

    `vectors_ND[i]` is the vector of `texts[i]`.
    """
    row = {text: i for i, text in enumerate(texts)}
    # As float32, like the similarities: 0.9 is a little more than the float32 next to it, which would not reach it.
    level = np.float32(similarity)

    def same(queries: Sequence[Query]) -> np.ndarray:
        first, second = ([row[getattr(q, side)] for q in queries] for side in ("first", "second"))
        return own_similarity(vectors_ND[first], vectors_ND[second]) >= level

    return same


def same_by_entailment(contexts: Sequence[str], entails: Entails) -> Same:
    """Two responses mean the same if each, read after its prompt (`contexts[p]`), entails the other read after it.

    The second direction is asked only where the first holds.
    """

    def same(queries: Sequence[Query]) -> np.ndarray:
        first = [in_context(contexts[q.prompt], q.first) for q in queries]
        second = [in_context(contexts[q.prompt], q.second) for q in queries]
        both = np.array(entails(first, second), bool)
        asked = np.flatnonzero(both)
        if len(asked):
            both[asked] = entails([second[i] for i in asked], [first[i] for i in asked])
        return both

    return same


def in_context(context: str, response: str) -> str:
    """The response after its prompt, with a space between them where neither brings any."""
    bare = context and response and not context[-1].isspace() and not response[0].isspace()
    return f"{context} {response}" if bare else context + response


def entailment(
    classifier: LoadedClassifier,
    *,
    batch_size: int,
    mesh: Any = None,
    progress: Callable[[str], Callable[[int, int], None] | None] = lambda what: None,
    blocks: Blocks = NOWHERE,
) -> Entails:
    """The classifier as a judge: the premise entails the hypothesis where "entailment" is its likeliest label.

    Raises ValueError where no label of the classifier is called that, in any case of letters ("not_entailment" is not).
    """
    column = entailment_column(classifier.labels)
    passes = iter(range(1, 2**31))

    def entails(premises: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
        report = progress(f"entailment, pass {next(passes)}")
        # Several batches at once, so that those of like length are computed together. At least one: of no pairs there are logits too.
        starts = range(0, max(len(premises), 1), 16 * batch_size)

        def logits_from(first: int) -> Iterator[tuple[np.ndarray]]:
            for rows in (slice(start, start + starts.step) for start in starts[first:]):
                yield (classify_pairs(classifier, premises[rows], hypotheses[rows], batch_size=batch_size, mesh=mesh),)

        kept = blocks.of(f"entailment by {starts.step}", premises, hypotheses)
        (logits,) = kept.collect(len(starts), logits_from, progress=report)
        return logits.argmax(axis=1) == column

    return entails


def entailment_column(labels: Sequence[str]) -> int:
    """Which of the classifier's labels says that the first text entails the second."""
    found = [n for n, label in enumerate(labels) if label.strip().lower() == ENTAILMENT]
    if len(found) != 1:
        raise ValueError(
            f"the labels of synthesize.nli are {', '.join(labels) or 'not named'}; exactly one must be called {ENTAILMENT!r} (id2label in "
            "its config.json). Name a model of natural language inference, or leave synthesize.nli out to cluster by embeddings."
        )
    return found[0]


def fitting_contexts(classifier: LoadedClassifier, prompts: Sequence[str], texts_Pn: Sequence[Sequence[str]]) -> tuple[list[str], int]:
    """(contexts, how many were cut): each prompt, less as much of its left end as two of its responses need in the classifier's window.

    The window holds premise and hypothesis, and with them the prompt twice. The tokenizer would cut both on the right: the responses, all
    that is compared. Responses too long to leave room for any prompt are cut by it after all.
    """
    tokenizer = classifier.tokenizer
    room = classifier.max_length - tokenizer.num_special_tokens_to_add(pair=True)
    options = {"add_special_tokens": False, "verbose": False}
    responses = [text for texts in texts_Pn for text in dict.fromkeys(texts)]
    lengths = iter(len(ids) for ids in tokenizer(responses, **options)["input_ids"]) if responses else iter(())
    longest = [max(next(lengths) for _ in dict.fromkeys(texts)) for texts in texts_Pn]
    contexts, cut = [], 0
    for prompt, length in zip(prompts, longest, strict=True):
        offsets = tokenizer(prompt, return_offsets_mapping=True, **options)["offset_mapping"] if prompt else []
        free = max(room // 2 - length - 1, 0)  # one less: prompt and response may part into tokens otherwise where they meet
        if len(offsets) > free:
            cut += 1
            prompt = prompt[offsets[-free][0] :] if free else ""
        contexts.append(prompt)
    return contexts, cut


def kept_prompts(found: Meanings, confidence: float) -> np.ndarray:
    """Booleans [P]: the prompts whose confidence is at least γ."""
    return found.confidence_P >= confidence


def paired_prompts(found: Meanings, confidence: float) -> np.ndarray:
    """Row numbers of the prompts that give a pair: those kept whose responses mean more than one thing."""
    return np.flatnonzero(kept_prompts(found, confidence) & (found.count_P > 1))


def choose(found: Meanings, rows_K: np.ndarray, scores_Kn: np.ndarray, key: jax.Array) -> Choice:
    """The pair of each of the prompts `rows_K`, whose responses the old reward model gives `scores_Kn`.

    Winner: the highest score in the largest cluster, of equals the one drawn first. Loser: each response outside of the largest cluster is
    as likely as any other (a meaning that is written twice is twice as likely), drawn from (key, row of the prompt) alone.

    Raises ValueError for a score that is not finite.
    """
    if not len(rows_K):
        return Choice(rows_K, rows_K, rows_K)
    if not np.isfinite(scores_Kn).all():
        raise ValueError(f"the reward model scores a response {scores_Kn[~np.isfinite(scores_Kn)][0]}; it has diverged.")
    in_largest = found.cluster_Pn[rows_K] == found.largest_P[rows_K, None]
    winner = np.where(in_largest, scores_Kn, -np.inf).argmax(axis=1)
    others = np.cumsum(~in_largest, axis=1)
    bits = np.asarray(jax.vmap(rng.bits)(rng.per_row(key, np.asarray(rows_K, np.int32))), np.int64)  # type: ignore[arg-type]
    nth = bits % others[:, -1] + 1  # of the responses outside, counted from 1; 2³² is many times their number, so none is favoured
    return Choice(rows_K, winner, (others == nth[:, None]).argmax(axis=1))


def as_pairs(samples: TextBatch, choice: Choice, n: int) -> PairBatch:
    """The chosen responses as numpy pairs, their tokens as the sampler drew them. Response j to prompt p is row p · n + j of `samples`."""
    a, b = (take(samples, choice.prompt_K * n + side) for side in (choice.winner_K, choice.loser_K))
    count = len(choice.prompt_K)
    sides = (a.prompt_BL, a.prompt_mask_BL, a.response_BT, a.response_mask_BT, b.response_BT, b.response_mask_BT)
    return PairBatch(*sides, np.ones(count, np.float32), np.ones(count, bool), np.arange(count, dtype=np.int32))  # type: ignore[arg-type]


def check_columns(pairs: PairBatch) -> None:
    """ValueError where the pairs carry a column that synthetic ones have no value for: what it says of a pair nobody has worked out."""
    unknown = sorted(set(pairs.columns) - {"margin"})
    if unknown:
        raise ValueError(
            f"the pairs carry the column {unknown[0]!r}, and synthetic pairs have no value for it; leave the column out, or add its values "
            "in a reward update of your own that calls this one."
        )


def joined(pairs: PairBatch, more: PairBatch, *, pad_id: int) -> PairBatch:
    """Both tables as one, renumbered from 0; as wide as `pairs`, or wider where a text of `more` needs it.

    Prompts are padded on the left, responses on the right. A column `margin` is 0 for the rows of `more`, as for every pair without one.
    Raises as `check_columns`.
    """
    check_columns(pairs)
    prompt_width = _width(pairs.prompt_mask_BL, more.prompt_mask_BL)
    response_width = _width(pairs.chosen_mask_BT, more.chosen_mask_BT, more.rejected_mask_BT)
    parts = [_resized(replace(table, columns={}), prompt_width, response_width, pad_id) for table in (pairs, more)]
    both = jax.tree.map(lambda *halves: np.concatenate(halves), *parts)
    n = len(more.index_B)
    columns = {name: np.concatenate([np.asarray(values), np.zeros(n, np.float32)]) for name, values in pairs.columns.items()}
    return replace(both, index_B=np.arange(len(both.index_B), dtype=np.int32), columns=columns)


def _width(mask_BT: Any, *more: Any) -> int:
    """The width of the first, or the longest text of the others where it is longer."""
    return max(np.shape(mask_BT)[1], *(int(np.asarray(mask).sum(axis=1).max(initial=0)) for mask in more))


def _resized(table: PairBatch, prompt_width: int, response_width: int, pad_id: int) -> PairBatch:
    fields = {}
    for tokens, mask in (("prompt_BL", "prompt_mask_BL"), ("chosen_BT", "chosen_mask_BT"), ("rejected_BT", "rejected_mask_BT")):
        left = tokens == "prompt_BL"
        width = prompt_width if left else response_width
        fields[tokens] = _padded(np.asarray(getattr(table, tokens)), width, pad_id, left=left)
        fields[mask] = _padded(np.asarray(getattr(table, mask)), width, False, left=left)
    return replace(table, **fields)


def _padded(values_BT: np.ndarray, width: int, fill: Any, *, left: bool) -> np.ndarray:
    """As wide as `width`, by padding added or cut on the side it stands on."""
    more = width - values_BT.shape[1]
    if more < 0:
        return values_BT[:, -more:] if left else values_BT[:, :width]
    return np.pad(values_BT, ((0, 0), (more, 0) if left else (0, more)), constant_values=fill)
