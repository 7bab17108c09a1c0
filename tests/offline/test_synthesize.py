"""Clusters of one meaning, and the pairs made of them: worked by hand, and against the rule as a plain loop."""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_encoder import write_tiny_bert  # pyright: ignore[reportMissingImports]

from jaxrlhf import sharding
from jaxrlhf.models.hub.encoder import load_classifier
from jaxrlhf.offline import synthesize
from jaxrlhf.offline.encoders import classify_pairs
from jaxrlhf.offline.synthesize import (
    Choice,
    as_pairs,
    check_columns,
    choose,
    entailment,
    entailment_column,
    fitting_contexts,
    in_context,
    joined,
    kept_prompts,
    meanings,
    measured,
    paired_prompts,
    same_by_entailment,
    same_by_vectors,
)
from jaxrlhf.rollouts.dataset import renumbered, repeated
from jaxrlhf.storage import blocks
from jaxrlhf.storage.blocks import Blocks
from jaxrlhf.types import PairBatch, PromptBatch, TextBatch

KEY = jax.random.key(3)


def relation(*pairs, asked=None):
    """Same meaning for these (earlier, later) texts alone."""

    def same(queries):
        if asked is not None:
            asked.extend(queries)
        return np.array([(q.first, q.second) in pairs for q in queries], bool)

    return same


def found_of(*rows):
    return measured(np.array(rows, np.int32))


# Clusters


def test_a_response_joins_the_first_cluster_whose_first_member_means_the_same():
    """b means a and c, but c does not mean a: whether c is in depends on who came first."""
    same = relation(("a", "b"), ("b", "a"), ("b", "c"))
    found = meanings([["a", "b", "c", "d"], ["b", "a", "c", "d"], ["d", "c", "b", "a"]], same)
    np.testing.assert_array_equal(found.cluster_Pn, [[0, 0, 1, 2], [0, 0, 0, 1], [0, 1, 2, 2]])
    np.testing.assert_array_equal(found.largest_P, [0, 0, 2])
    np.testing.assert_array_equal(found.count_P, [3, 2, 3])
    np.testing.assert_array_equal(found.confidence_P, [0.5, 0.75, 0.5])


def test_equal_texts_are_one_meaning_and_never_asked_about():
    asked = []
    found = meanings([["x", "y", "x", "y", "x"], ["x", "x", "x", "x", "x"]], relation(asked=asked))
    np.testing.assert_array_equal(found.cluster_Pn, [[0, 1, 0, 1, 0], [0] * 5])
    assert [tuple(q) for q in asked] == [(0, "x", "y")]
    np.testing.assert_array_equal(found.confidence_P, [0.6, 1.0])


def one_by_one(texts, same):
    """The rule as semantic entropy states it: every response against the first member of every cluster, in order."""
    first, numbers, seen, asked = [], [], {}, 0
    for text in texts:
        if text not in seen:
            for number, leader in enumerate(first):
                asked += 1
                if same(leader, text):
                    seen[text] = number
                    break
            else:
                first.append(text)
                seen[text] = len(first) - 1
        numbers.append(seen[text])
    return numbers, asked


def test_against_the_rule_as_a_plain_loop_which_asks_no_less():
    random = np.random.default_rng(0)
    words = "abcdefgh"
    for density in (0.1, 0.4, 0.8):
        yes = {pair for pair in itertools.permutations(words, 2) if random.random() < density}
        texts = [[str(word) for word in random.choice(list(words), 10)] for _ in range(20)]
        asked, steps = [], []

        def same(queries, yes=yes, asked=asked, steps=steps):
            steps.append(len(queries))
            asked.extend(queries)
            return np.array([(q.first, q.second) in yes for q in queries], bool)

        found = meanings(texts, same)
        plain = [one_by_one(row, lambda a, b, yes=yes: (a, b) in yes) for row in texts]
        np.testing.assert_array_equal(found.cluster_Pn, [numbers for numbers, _ in plain])
        assert len(asked) == sum(count for _, count in plain) and len(asked) == len(set(asked))
        assert len(steps) <= found.count_P.max() and all(steps)


def test_the_first_of_equally_large_clusters_counts():
    found = found_of([0, 1, 1, 0, 2], [0, 1, 2, 2, 1])
    np.testing.assert_array_equal(found.largest_P, [0, 1])


def test_confidence_reaches_its_floor_exactly():
    found = found_of([0, 0, 0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 2, 3, 4, 5, 6, 7, 8], [0] * 10)
    np.testing.assert_array_equal(kept_prompts(found, 0.3), [True, False, True])
    np.testing.assert_array_equal(kept_prompts(found, 0.31), [False, False, True])
    np.testing.assert_array_equal(paired_prompts(found, 0.3), [0])  # one meaning: nothing to prefer
    np.testing.assert_array_equal(paired_prompts(found, 0.2), [0, 1])
    assert not len(paired_prompts(found, 1.0)) and kept_prompts(found, 1.0).sum() == 1


def test_cosines_at_the_threshold_count():
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    texts = ["a", "b", "c"]
    found = meanings([["a", "b", "c"], ["c", "b", "a"]], same_by_vectors(texts, vectors, 0.6))
    np.testing.assert_array_equal(found.cluster_Pn, [[0, 0, 1], [0, 0, 1]])
    np.testing.assert_array_equal(meanings([texts], same_by_vectors(texts, vectors, 0.61)).cluster_Pn, [[0, 1, 1]])
    np.testing.assert_array_equal(meanings([texts], same_by_vectors(texts, vectors, 0.9)).cluster_Pn, [[0, 1, 2]])


# Entailment


def test_entailment_must_hold_both_ways_and_sees_the_prompt():
    """ "all" entails "some", not the other way round; "some" and "a few" entail each other, after the first prompt only."""
    yes = {("P all", "P some"), ("P some", "P a few"), ("P a few", "P some"), ("Q some", "Q a few"), ("Q a few", "Q none")}
    calls = []

    def entails(premises, hypotheses):
        calls.append(list(zip(premises, hypotheses, strict=True)))
        return np.array([pair in yes for pair in calls[-1]], bool)

    same = same_by_entailment(["P", "Q "], entails)
    found = meanings([["all", "some", "a few"], ["all", "some", "a few"]], same)
    np.testing.assert_array_equal(found.cluster_Pn, [[0, 1, 1], [0, 1, 2]])
    # The way back is asked where the way there holds, and nowhere else.
    assert calls[0] == [("P all", "P some"), ("P all", "P a few"), ("Q all", "Q some"), ("Q all", "Q a few")]
    assert calls[1] == [("P some", "P all")]
    assert calls[2:] == [[("P some", "P a few"), ("Q some", "Q a few")], [("P a few", "P some"), ("Q a few", "Q some")]]


def test_a_space_only_where_there_is_none():
    assert in_context("Why?", "So.") == "Why? So."
    assert in_context("TL;DR:", " So.") == "TL;DR: So." and in_context("Why?\n", "So.") == "Why?\nSo."
    assert in_context("Why?", "") == "Why?" and in_context("", "So.") == "So."


def test_the_label_is_found_by_name():
    assert entailment_column(("contradiction", "neutral", "Entailment")) == 2
    assert entailment_column(("ENTAILMENT", "not_entailment")) == 0
    for labels in (("LABEL_0", "LABEL_1"), ("not_entailment", "neutral"), ()):
        with pytest.raises(ValueError, match=f"{', '.join(labels) or 'not named'}; exactly one must be called 'entailment'"):
            entailment_column(labels)


WORDS = ["farmers", "nurses", "sold", "hid", "apples", "maps", "ashore", "late", "well", "why"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return load_classifier(write_tiny_bert(tmp_path_factory.mktemp("nli"), WORDS, classifier=True))


def test_a_classifier_judges_by_its_likeliest_label_whatever_the_batch(classifier):
    random = np.random.default_rng(1)
    texts = [" ".join(random.choice(WORDS, random.integers(2, 5))) for _ in range(24)]
    first, second = texts[:12], texts[12:]
    rows = classifier.tokenizer(first, second, return_token_type_ids=True, padding=True, return_tensors="np")
    names = ("input_ids", "attention_mask", "token_type_ids")
    plain = np.asarray(classifier.bert.classify(classifier.params, *(rows[name] for name in names))).argmax(axis=1) == 1
    assert 0 < sum(plain) < 12
    seen = []
    judge = entailment(classifier, batch_size=4, progress=seen.append)
    np.testing.assert_array_equal(judge(first, second), plain)
    mesh = sharding.make_mesh(4)
    np.testing.assert_array_equal(entailment(classifier, batch_size=8, mesh=mesh)(first, second), plain)
    judge(second, first)
    assert seen == ["entailment, pass 1", "entailment, pass 2"]


def test_a_stopped_entailment_goes_on_behind_its_last_batches(classifier, tmp_path, monkeypatch):
    random = np.random.default_rng(2)
    texts = [" ".join(random.choice(WORDS, random.integers(2, 5))) for _ in range(100)]
    first, second = texts[:50], texts[50:]
    calls, classify = [], synthesize.classify_pairs

    def counted(classifier, first, second, **how):
        calls.append(len(first))
        if len(calls) == 3 and not stopped:
            raise InterruptedError
        return classify(classifier, first, second, **how)

    monkeypatch.setattr(synthesize, "classify_pairs", counted)
    monkeypatch.setattr(blocks, "APART", 0)
    stopped, judge = False, entailment(classifier, batch_size=1, blocks=Blocks(tmp_path))
    with pytest.raises(InterruptedError):
        judge(first, second)
    stopped = True
    found = judge(first, second)
    assert calls == [16, 16, 16, 16, 2]
    np.testing.assert_array_equal(found, entailment(classifier, batch_size=50)(first, second))
    assert judge([], []).shape == (0,)


def test_long_prompts_lose_their_left_end_so_that_responses_are_read(classifier):
    """64 positions, 3 special tokens: 30 for premise and hypothesis each."""
    long = " ".join(["nurses"] * 40 + ["why"])
    a, b = "farmers sold apples", "farmers hid maps"
    contexts, cut = fitting_contexts(classifier, [long, "why", "", long], [[a, b], [a, b], [a], [" ".join(["late"] * 35), a]])
    assert contexts == [" ".join(["nurses"] * 25 + ["why"]), "why", "", ""] and cut == 2
    ids = classifier.tokenizer(f"{contexts[0]} {a}", f"{contexts[0]} {b}")["input_ids"]
    assert 60 <= len(ids) <= classifier.max_length == 64
    judged = [classify_pairs(classifier, [in_context(context, a)], [in_context(context, b)]) for context in (contexts[0], long)]
    swapped = [classify_pairs(classifier, [in_context(context, b)], [in_context(context, a)]) for context in (contexts[0], long)]
    assert not np.allclose(judged[0], swapped[0])
    np.testing.assert_array_equal(judged[1], swapped[1])  # cut on the right the responses are gone: this is what the cut is for


# Pairs


def test_winner_is_the_best_of_the_largest_cluster_and_loser_any_other():
    found = found_of([0, 1, 0, 2, 0], [0, 1, 1, 2, 1], [0] * 5, [0, 1, 2, 0, 3])
    scores = np.array([[1, 9, 3, 9, 2], [9, 2, 1, 9, 2], [7, 0, 0, 6, 9]], np.float32)
    rows = np.array([0, 1, 3])
    losers = [set(), set(), set()]
    for seed in range(60):
        choice = choose(found, rows, scores, jax.random.key(seed))
        np.testing.assert_array_equal(choice.prompt_K, rows)
        np.testing.assert_array_equal(choice.winner_K, [2, 1, 0])  # of equals (row 1) the first drawn
        for k, loser in enumerate(choice.loser_K):
            losers[k].add(int(loser))
    assert losers == [{1, 3}, {0, 3}, {1, 2, 4}]


def test_a_loser_is_as_likely_as_any_other_and_depends_on_its_prompt_alone():
    found = found_of(*[[0, 0, 0, 1, 1, 2]] * 3000)
    rows = np.arange(3000)
    scores = np.zeros((3000, 6), np.float32)
    losers = choose(found, rows, scores, KEY).loser_K
    counts = np.bincount(losers, minlength=6)
    assert counts[:3].sum() == 0 and (abs(counts[3:] - 1000) < 4 * np.sqrt(3000 * 2 / 9)).all()  # 4 standard deviations
    np.testing.assert_array_equal(losers, choose(found, rows, scores, KEY).loser_K)
    some = np.array([7, 1200, 2999])
    np.testing.assert_array_equal(choose(found, some, scores[some], KEY).loser_K, losers[some])
    assert (choose(found, rows, scores, jax.random.key(4)).loser_K != losers).any()


def test_a_diverged_reward_model_is_named():
    with pytest.raises(ValueError, match="scores a response nan; it has diverged"):
        choose(found_of([0, 1, 0]), np.array([0]), np.array([[1, np.nan, 2]], np.float32), KEY)
    assert not len(choose(found_of([0, 0, 0]), np.zeros(0, int), np.zeros((0, 3), np.float32), KEY).winner_K)


def test_every_sample_has_a_row_number_of_its_own():
    prompts = PromptBatch(np.array([[5, 6], [7, 8]]), np.ones((2, 2), bool), np.ones(2, bool), np.array([40, 9]))  # type: ignore[arg-type]
    table = repeated(renumbered(prompts), 3)
    np.testing.assert_array_equal(table.prompt_BL, [[5, 6]] * 3 + [[7, 8]] * 3)
    np.testing.assert_array_equal(table.index_B, np.arange(6))
    assert np.asarray(table.index_B).dtype == np.int32 and np.asarray(table.row_mask_B).all()


def pair_table(L, T, n=2, *, first=10, columns=None):
    """n pairs as wide as can be, of ascending ids."""
    ids = iter(range(first, first + n * (L + 2 * T)))
    fields = []
    for width in (L, T, T):
        tokens = np.array([[next(ids) for _ in range(width)] for _ in range(n)], np.int32)
        fields += [tokens, np.ones((n, width), bool)]
    return PairBatch(*fields, np.ones(n, np.float32), np.ones(n, bool), np.arange(n, dtype=np.int32), columns or {})  # type: ignore[arg-type]


def test_tokens_of_the_pair_are_those_that_were_drawn():
    """Response j to prompt p is row p · n + j, and padding stays padding."""
    n, P, T = 3, 2, 4
    tokens = np.arange(P * n * T, dtype=np.int32).reshape(-1, T)
    mask = np.arange(T) < np.array([4, 1, 2, 3, 4, 2])[:, None]
    prompts = np.repeat(np.array([[90, 91], [92, 93]], np.int32), n, axis=0)
    prompt_mask = np.repeat(np.array([[False, True], [True, True]]), n, axis=0)
    samples = TextBatch(prompts, prompt_mask, tokens, mask, np.ones(P * n, bool), np.arange(P * n))  # type: ignore[arg-type]
    pairs = as_pairs(samples, Choice(np.array([1, 0]), np.array([2, 0]), np.array([0, 1])), n)
    np.testing.assert_array_equal(pairs.prompt_BL, [[92, 93], [90, 91]])
    np.testing.assert_array_equal(pairs.prompt_mask_BL, [[True, True], [False, True]])
    np.testing.assert_array_equal(pairs.chosen_BT, tokens[[5, 0]])
    np.testing.assert_array_equal(pairs.chosen_mask_BT, mask[[5, 0]])
    np.testing.assert_array_equal(pairs.rejected_BT, tokens[[3, 1]])
    np.testing.assert_array_equal(pairs.rejected_mask_BT, mask[[3, 1]])
    assert pairs.weights_B.dtype == np.float32 and (np.asarray(pairs.weights_B) == 1).all() and np.asarray(pairs.row_mask_B).all()


@pytest.mark.parametrize(("L", "T"), [(2, 3), (2, 5), (4, 3), (4, 5), (3, 4)])
def test_widths_grow_where_they_must_and_padding_stands_on_its_side(L, T):
    ours, theirs = pair_table(3, 4), pair_table(L, T, first=100)
    both = joined(ours, theirs, pad_id=7)
    W, S = max(L, 3), max(T, 4)
    np.testing.assert_array_equal(both.index_B, np.arange(4))
    for name, width, left in (("prompt", W, True), ("chosen", S, False), ("rejected", S, False)):
        suffix = "BL" if left else "BT"
        tokens, mask = (np.asarray(getattr(both, f"{name}{part}_{suffix}")) for part in ("", "_mask"))
        assert tokens.shape == mask.shape == (4, width) and mask.dtype == bool and tokens.dtype == np.int32
        assert (tokens[~mask] == 7).all()
        order = slice(None, None, -1) if left else slice(None)
        assert (np.diff(mask[:, order].astype(int), axis=1) <= 0).all()  # the text stands at its edge
        for table, rows in ((ours, slice(0, 2)), (theirs, slice(2, 4))):
            given = np.asarray(getattr(table, f"{name}_{suffix}"))
            np.testing.assert_array_equal(tokens[rows][mask[rows]].reshape(2, -1), given)


def test_padding_alone_widens_nothing():
    theirs = pair_table(3, 6, first=100)
    short = np.arange(6) < np.array([[4], [2]])
    both = joined(pair_table(3, 4), replace(theirs, chosen_mask_BT=short, rejected_mask_BT=short), pad_id=0)
    assert np.shape(both.chosen_BT) == np.shape(both.rejected_mask_BT) == (4, 4)
    np.testing.assert_array_equal(both.chosen_BT[2:], np.asarray(theirs.chosen_BT)[:, :4])


def test_margins_of_synthetic_pairs_are_0_and_other_columns_are_refused():
    ours = pair_table(2, 3, columns={"margin": np.array([0.5, -1], np.float32)})
    both = joined(ours, pair_table(2, 3, first=100), pad_id=0)
    np.testing.assert_array_equal(both.columns["margin"], [0.5, -1, 0, 0])
    assert both.columns["margin"].dtype == np.float32
    with pytest.raises(ValueError, match="column 'mine', and synthetic pairs have no value for it"):
        check_columns(pair_table(2, 3, columns={"mine": np.ones(2)}))
    with pytest.raises(ValueError, match="'mine'"):
        joined(pair_table(2, 3, columns={"mine": np.ones(2)}), pair_table(2, 3), pad_id=0)
