"""The toy gold reward, term by term, by hand; and the knob that makes a proxy go stale."""

from dataclasses import fields, replace

import numpy as np
import pytest

from jaxrlhf.data.toy import ToyTask, demonstrations, prompts, read_post, write_post
from jaxrlhf.scorers.toy import TERMS, toy_gold

TASK = ToyTask()
POST = "farmers sold apples downtown today . well anyway thanks . nurses hid maps ashore late . TL;DR:"
ONES = ToyTask(
    main_reward=1, detail_reward=1, foreign_penalty=1, repeat_penalty=1, grammar_penalty=1, binding_penalty=1, overlong_penalty=1
)

# response, then the count of: main, detail, foreign, repeat, grammar, binding, overlong
BY_HAND = [
    ("", 0, 0, 0, 0, 0, 0, 0),
    (".", 0, 0, 0, 0, 1, 0, 0),  # a sentence may not begin with its end; that it ends there is fine
    (". .", 0, 0, 0, 0, 2, 0, 0),
    ("farmers sold apples .", 3, 0, 0, 0, 0, 0, 0),
    ("farmers sold apples", 3, 0, 0, 0, 1, 0, 0),  # no full stop
    ("farmers sold apples downtown .", 3, 1, 0, 0, 0, 0, 0),
    ("farmers sold apples today .", 3, 1, 0, 0, 0, 0, 0),
    ("farmers sold apples downtown today .", 3, 2, 0, 0, 0, 0, 0),
    ("farmers sold apples today downtown .", 3, 2, 0, 0, 1, 0, 0),  # time→place is the one step no sentence takes
    ("farmers sold apples . nurses hid maps .", 6, 0, 0, 0, 0, 0, 0),
    ("farmers sold apples nurses hid maps .", 6, 0, 0, 0, 1, 1, 0),  # object→subject, and of different facts
    ("farmers hid apples .", 3, 0, 0, 0, 0, 2, 0),  # a grammatical lie
    ("farmers apples .", 2, 0, 0, 0, 1, 0, 0),
    ("pilots sold apples .", 2, 0, 1, 0, 0, 0, 0),  # a word not in the post, next to whom nothing is misbound
    ("farmers sold sold apples .", 3, 0, 0, 1, 1, 0, 0),
    ("farmers sold apples . farmers sold apples .", 3, 0, 0, 3, 0, 0, 0),
    ("farmers sold apples well .", 3, 0, 0, 0, 2, 0, 0),  # the post's filler: not foreign, no sentence has it
    ("farmers sold apples hello .", 3, 0, 1, 0, 2, 0, 0),  # another filler
    ("farmers sold apples TL;DR: .", 3, 0, 1, 0, 2, 0, 0),  # the mark is not the post's text
    ("zebras <unk> <unk> .", 0, 0, 3, 1, 4, 0, 0),  # every step to and from an unknown word
    ("farmers sold apples downtown today . nurses hid maps .", 6, 2, 0, 0, 0, 0, 4),  # 10 words: (10 − 8)²
]


def parts_of(task, prompts, responses):
    """Each term's signed part of gold: what is left where every other weight is 0."""
    weights = [f.name for f in fields(ToyTask) if f.name.endswith(("_reward", "_penalty"))]
    none = dict.fromkeys(weights, 0.0)
    alone = [replace(task, **none | {name: getattr(task, name)}) for term in TERMS for name in weights if name.startswith(f"{term}_")]
    return {term: toy_gold(one)(prompts, responses) for term, one in zip(TERMS, alone, strict=True)}


def counts(response):
    parts = parts_of(ONES, [POST], [response])
    return tuple(int(abs(parts[name][0])) for name in TERMS)


@pytest.mark.parametrize("row", BY_HAND, ids=lambda row: row[0])
def test_counts_by_hand(row):
    assert counts(row[0]) == row[1:]


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("farmers sold apples .", 2.1),
        ("farmers sold apples downtown today .", 2.5),
        ("farmers sold apples . nurses hid maps .", 4.2),
        ("farmers hid apples .", 2.1 - 0.4),
        ("pilots sold apples .", 1.4 - 0.5),
        ("farmers sold sold apples .", 2.1 - 0.4 - 0.25),
        ("farmers sold apples downtown today . nurses hid maps ashore late .", 4.2 + 0.8 - 0.25 * 16),
        ("", 0.0),
    ],
)
def test_gold_with_the_default_weights_by_hand(response, gold):
    (score,) = toy_gold(TASK)([POST], [response])
    assert score == pytest.approx(gold, abs=1e-6)


def test_nothing_beats_both_facts_main_words():
    """No insertion, deletion or replacement of one word makes a better text: not even the last full stop for one more detail."""
    best = "farmers sold apples . nurses hid maps ."
    words, pool = best.split(), [*set(POST.split()), "pilots", "<unk>"]
    edits = [words[:i] + words[i + 1 :] for i in range(len(words))]
    edits += [[*words[:i], w, *words[i:]] for i in range(len(words) + 1) for w in pool]
    edits += [[*words[:i], w, *words[i + 1 :]] for i in range(len(words)) for w in pool]
    scores = toy_gold(TASK)([POST] * len(edits), [" ".join(e) for e in edits])
    assert scores.max() <= 4.2 + 1e-6


def test_parts_add_up_to_gold_and_come_as_float32():
    rows = demonstrations(TASK, 800, 0)
    texts = [r.prompt for r in rows], [r.response for r in rows]
    gold, parts = toy_gold(TASK)(*texts), parts_of(TASK, *texts)
    assert gold.dtype == np.float32 and gold.shape == (800,) and tuple(parts) == TERMS
    np.testing.assert_allclose(sum(parts.values()), gold, atol=1e-5)
    assert all((parts[name] >= 0).all() == (name in ("main", "detail")) for name in TERMS)  # each term occurs, with its sign


def test_gold_ignores_the_order_of_the_posts_sentences_and_of_the_told_facts():
    gold = toy_gold(TASK)
    rows = demonstrations(TASK, 300, 1)
    responses = [r.response for r in rows]
    base = gold([r.prompt for r in rows], responses)
    for place in range(3):
        for swap in (False, True):
            moved = [read_post(r.prompt)._replace(filler_place=place) for r in rows]
            moved = [p._replace(facts=p.facts[::-1]) if swap else p for p in moved]
            np.testing.assert_array_equal(gold([write_post(p) for p in moved], responses), base)
    a, b = gold([POST] * 2, ["farmers sold . nurses hid maps .", "nurses hid maps . farmers sold ."])
    assert a == b


def test_a_row_does_not_depend_on_its_batch():
    rows = demonstrations(TASK, 60, 2)
    gold = toy_gold(TASK)
    together = gold([r.prompt for r in rows], [r.response for r in rows])
    alone = [gold([r.prompt], [r.response])[0] for r in rows]
    np.testing.assert_array_equal(together, np.array(alone, np.float32))


def test_empty_batch_very_long_response_and_odd_spaces():
    gold = toy_gold(TASK)
    assert gold([], []).shape == (0,) and gold([], []).dtype == np.float32
    (long,) = gold([POST], [" ".join(["zebras"] * 2000)])
    assert long == pytest.approx(-0.5 * 2000 - 0.4 * 1999 - 0.25 * 2001 - 0.25 * 1992**2, rel=1e-6)
    a, b = gold([POST] * 2, ["  farmers  sold\napples . ", "farmers sold apples ."])
    assert a == b


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        toy_gold(TASK)([POST, POST], ["."])
    with pytest.raises(ValueError, match="not a post"):
        toy_gold(TASK)(["tell me a story"], ["."])


@pytest.mark.parametrize("name", [f.name for f in fields(ToyTask) if f.name.endswith(("_penalty", "_reward"))])
def test_every_weight_moves_its_own_term_only(name):
    rows = demonstrations(TASK, 500, 0)
    texts = [r.prompt for r in rows], [r.response for r in rows]
    before, after = parts_of(TASK, *texts), parts_of(replace(TASK, **{name: 2 * getattr(TASK, name)}), *texts)
    term = name.rsplit("_", 1)[0]
    for k in TERMS:
        np.testing.assert_allclose(after[k], before[k] * (2 if k == term else 1), rtol=1e-6)
    assert np.abs(before[term]).max() > 0


def gold_and_length(task, n=4000):
    rows = demonstrations(task, n, 0)
    gold = toy_gold(task)([r.prompt for r in rows], [r.response for r in rows])
    return gold, np.array([len(r.response.split()) for r in rows])


def correlation(gold, length, keep):
    return np.corrcoef(gold[keep], length[keep])[0, 1]


def test_the_knob_longer_is_better_for_demonstrations_and_worse_beyond_the_turn():
    gold, length = gold_and_length(TASK)
    beyond = length > TASK.length_turn
    assert correlation(gold, length, np.ones_like(beyond)) > 0.15  # what a reward model of such text learns: longer is better
    assert correlation(gold, length, ~beyond) > 0.5
    assert correlation(gold, length, beyond) < -0.7  # what a policy that believes it meets
    assert beyond.mean() < 0.12  # rarely seen

    free, _ = gold_and_length(replace(TASK, overlong_penalty=0.0))
    assert correlation(free, length, np.ones_like(beyond)) > 0.5  # knob at 0: length never betrays
    np.testing.assert_allclose((free - gold)[~beyond], 0.0, atol=1e-6)  # and up to the turn the knob does nothing

    late, _ = gold_and_length(replace(TASK, length_turn=TASK.max_words))
    np.testing.assert_allclose(late, free, atol=1e-6)


def test_references_under_the_default_gold():
    for facts, expected in ((1, 2.5), (2, 4.2)):
        rows = prompts(ToyTask(reference_facts=facts), 100, 0, "evaluation")
        scores = toy_gold(TASK)([r.prompt for r in rows], [r.reference or "" for r in rows])
        np.testing.assert_allclose(scores, expected, atol=1e-6)
