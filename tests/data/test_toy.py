"""The embedded task: its posts, splits, demonstrations and tokenizer."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from jaxrlhf.data.toy import (
    CLASS_OF,
    EOS,
    FACT,
    MARK,
    PAD,
    POST_LENGTH,
    SPLITS,
    STOP,
    VOCABULARY,
    WORDS,
    Post,
    ToyTask,
    demonstrations,
    posts,
    prompts,
    read_post,
    reference_response,
    toy_tokenizer,
    write_post,
)

POST = Post(
    (("farmers", "sold", "apples", "downtown", "today"), ("nurses", "hid", "maps", "ashore", "late")), ("well", "anyway", "thanks"), 1
)
TEXT = "farmers sold apples downtown today . well anyway thanks . nurses hid maps ashore late . TL;DR:"


def test_vocabulary_has_64_different_words_in_the_documented_order():
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 64
    assert VOCABULARY[:5] == (PAD, EOS, "<unk>", ".", "TL;DR:")


def test_post_text_worked_by_hand_and_read_back():
    assert write_post(POST) == TEXT
    assert read_post(TEXT) == POST
    for place in range(3):
        moved = POST._replace(filler_place=place)
        assert read_post(write_post(moved)) == moved


@pytest.mark.parametrize(
    "text",
    [
        "",
        TEXT.removesuffix(f" {MARK}"),  # no mark
        TEXT.removeprefix("farmers "),  # truncated on the left
        TEXT.replace("apples", "oranges"),  # unknown word
        TEXT.replace("well anyway thanks", "well anyway maps"),  # no filler
        TEXT.replace("nurses", "farmers"),  # one word, two facts
        TEXT.replace(" late .", " . late"),
        f"{TEXT} {MARK}",
    ],
)
def test_what_is_no_post_is_refused(text):
    with pytest.raises(ValueError, match="not a post of the toy task"):
        read_post(text)


def test_posts_have_fixed_length_distinct_facts_and_all_three_orders():
    drawn = posts(3000, seed=0)
    for post in drawn:
        assert len(write_post(post).split()) == POST_LENGTH
        assert [tuple(CLASS_OF[w] for w in fact) for fact in post.facts] == [FACT, FACT]
        assert not set(post.facts[0]) & set(post.facts[1])
        assert len(set(post.filler)) == 3
        assert read_post(write_post(post)) == post
    counts = np.bincount([post.filler_place for post in drawn])
    assert len(counts) == 3 and counts.min() > 850  # 1000 expected, std 26
    for k, name in enumerate(FACT):  # every word in both facts, none favoured
        for side in (0, 1):
            seen = [post.facts[side][k] for post in drawn]
            share = np.array([seen.count(w) for w in WORDS[name]]) / len(drawn) * len(WORDS[name])
            assert share.min() > 0.7 and share.max() < 1.3


def test_splits_are_disjoint_by_facts_whatever_seed_and_order():
    def key(post):
        return frozenset(post.facts)

    by_split = {split: {key(p) for seed in (0, 1) for p in posts(400, seed, split)} for split in SPLITS}
    mains = list(enumerate(FACT[:3]))
    residues = {
        split: {sum(WORDS[name].index(fact[k]) for fact in facts for k, name in mains) % 10 for facts in by_split[split]}
        for split in SPLITS
    }
    assert residues == {"train": set(range(8)), "valid": {8}, "evaluation": {9}}  # of facts alone: no overlap
    assert not by_split["train"] & by_split["valid"] and not by_split["train"] & by_split["evaluation"]


def test_streams_of_one_split_stay_in_it_and_differ():
    plain, named, other_seed = posts(50, 0, "evaluation"), posts(50, 0, "evaluation/again"), posts(50, 1, "evaluation")
    assert plain != named and plain != other_seed and not set(plain) & set(named)
    with pytest.raises(ValueError, match="of no split"):
        posts(1, 0, "test")
    with pytest.raises(ValueError, match="≥ 0"):
        posts(1, -1)


@pytest.mark.parametrize("make", [prompts, demonstrations])
@pytest.mark.parametrize("stream", ["train", "evaluation"])
def test_rows_repeat_and_do_not_depend_on_how_many_are_made(make, stream):
    task = ToyTask()
    many = make(task, 120, 3, stream)
    assert many == make(task, 120, 3, stream)
    assert many[:7] == make(task, 7, 3, stream)
    assert make(task, 0, 3, stream) == []
    assert make(task, 7, 4, stream) != many[:7]
    assert len({row.id for row in many}) == 120
    assert (many[5].id, many[5].source) == (f"toy-{stream}-3-5", f"toy/{stream}/3:5")


PINNED_RESPONSES = [
    "painters apples .",
    "sailors moved boxes .",
    "sailors moved early .",
]
PINNED_PROMPT = "singers shared coins indoors tonight . honestly anyway thanks . pilots wanted coats abroad recently . TL;DR:"


def test_rows_are_pinned():
    """Data of a published seed must not change between releases: whoever changes it must see this fail."""
    assert [d.response for d in demonstrations(ToyTask(), 3, 0)] == PINNED_RESPONSES
    assert prompts(ToyTask(), 1, 0, "evaluation")[0].prompt == PINNED_PROMPT


def test_references_are_clean_by_hand():
    assert reference_response(ToyTask(), POST) == "farmers sold apples downtown today ."
    assert reference_response(ToyTask(reference_facts=2), POST) == "farmers sold apples . nurses hid maps ."
    row = prompts(ToyTask(), 1, 0)[0]
    assert row.reference == reference_response(ToyTask(), read_post(row.prompt))


NOISELESS: dict[str, Any] = {
    "demo_one_fact": 0.0, "demo_drop": 0.0, "demo_keep_detail": 0.0, "demo_invent": 0.0,
    "demo_misbind": 0.0, "demo_repeat": 0.0, "demo_filler": 0.0, "demo_ramble": 0.0,
}  # fmt: skip


def test_without_noise_a_demonstration_is_the_two_fact_reference():
    for d in demonstrations(ToyTask(**NOISELESS), 50, 0):
        assert d.response == reference_response(ToyTask(reference_facts=2), read_post(d.prompt))


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        ({"demo_drop": 1.0}, lambda post: {". ."}),
        ({"demo_keep_detail": 1.0}, lambda post: {" ".join((*post.facts[0], ".", *post.facts[1], "."))}),
        ({"demo_one_fact": 1.0}, lambda post: {" ".join((*f[:3], ".")) for f in post.facts}),
        ({"demo_misbind": 1.0}, lambda post: {" ".join((*post.facts[1][:3], ".", *post.facts[0][:3], "."))}),
        ({"demo_repeat": 1.0, "demo_one_fact": 1.0}, lambda post: {" ".join((*(w for w in f[:3] for _ in "12"), ".")) for f in post.facts}),
        ({"demo_ramble": 1.0, "demo_one_fact": 1.0}, lambda post: {" ".join((*f[:3], ".") * 2) for f in post.facts}),
        ({"demo_ramble": 1.0}, lambda post: {" ".join(((*post.facts[0][:3], ".", *post.facts[1][:3], ".") * 2)[:13])}),  # cut at max_words
    ],
)
def test_each_noise_alone_worked_by_hand(noise, expected):
    rows = demonstrations(ToyTask(**{**NOISELESS, **noise}), 40, 0)
    seen = [(d.response, expected(read_post(d.prompt))) for d in rows]
    assert all(response in allowed for response, allowed in seen)
    if noise.get("demo_one_fact"):  # both facts get told
        assert 5 < sum(response.startswith(read_post(d.prompt).facts[0][0]) for d, (response, _) in zip(rows, seen, strict=True)) < 35


def test_invented_words_keep_their_class_and_filler_words_are_the_posts():
    for d in demonstrations(ToyTask(**{**NOISELESS, "demo_invent": 1.0}), 40, 0):
        words = d.response.split()
        assert [CLASS_OF[w] for w in words] == ["subject", "verb", "object", STOP] * 2
        assert not set(words) - {STOP} & set(d.prompt.split())
    for d in demonstrations(ToyTask(**{**NOISELESS, "demo_filler": 1.0, "max_words": 20}), 40, 0):
        post, words = read_post(d.prompt), d.response.split()
        assert [w for w in words if CLASS_OF[w] != "filler"] == [*post.facts[0][:3], STOP, *post.facts[1][:3], STOP]
        assert {w for w in words if CLASS_OF[w] == "filler"} <= set(post.filler) and len(words) == 14


def test_noise_rates_are_the_fields():
    """Main words per demonstration: (1 + P[two facts]) · 3 · (1 − drop), with the noises that add words off."""
    task = ToyTask(demo_repeat=0.0, demo_filler=0.0, demo_ramble=0.0)
    rows = [d.response.split() for d in demonstrations(task, 4000, 0)]
    main = np.mean([sum(CLASS_OF[w] in FACT[:3] for w in words) for words in rows])
    details = np.mean([sum(CLASS_OF[w] in FACT[3:] for w in words) for words in rows])
    told = 2.0 - task.demo_one_fact
    assert abs(main - 3 * told * (1 - task.demo_drop)) < 0.1  # standard error 0.02
    assert abs(details - 2 * told * task.demo_keep_detail) < 0.06


def test_tokenizer_round_trip_over_the_whole_vocabulary_and_data():
    tokenizer = toy_tokenizer()
    text = " ".join(VOCABULARY[3:])
    ids = tokenizer(text)["input_ids"]
    assert ids == list(range(3, 64)) and tokenizer.decode(ids) == text and len(tokenizer) == 64
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    for d in demonstrations(ToyTask(), 500, 0):
        for part, length in ((d.prompt, POST_LENGTH), (d.response, len(d.response.split()))):
            encoded = tokenizer(part)["input_ids"]
            assert len(encoded) == length and 2 not in encoded
            assert tokenizer.decode([*encoded, 1, 0], skip_special_tokens=True) == part


def test_tokenizer_keeps_unknown_words_visible_and_survives_a_folder(tmp_path):
    tokenizer = toy_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    for t in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = t("farmers ate apples.")["input_ids"]
        assert ids == [VOCABULARY.index("farmers"), 2, 2]
        assert t.decode(ids, skip_special_tokens=True) == "farmers <unk> <unk>"
        assert t(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"] and t.decode(t(TEXT)["input_ids"]) == TEXT
        assert (t.pad_token_id, t.eos_token_id, t.padding_side) == (0, 1, "left")


@pytest.mark.parametrize("name", [f.name for f in fields(ToyTask)])
def test_bad_values_are_named(name):
    with pytest.raises(ValueError, match=name):
        ToyTask(**{name: -1})


def test_more_bad_values():
    bad: dict[str, Any]
    for bad in ({"demo_drop": 1.5}, {"overlong_penalty": float("nan")}, {"max_words": 7}, {"reference_facts": 3}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ToyTask(**bad)
    with pytest.raises(ValueError, match="exceed 1"):
        ToyTask(demo_invent=0.6, demo_misbind=0.6)
