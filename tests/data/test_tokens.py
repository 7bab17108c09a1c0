"""Text → ids and masks, by hand with byte tokenizers (one token a byte), by property, and on real vocabularies."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxrlhf.data.pairs import DataError, Demonstration, Pair, Prompt, read_demonstrations
from jaxrlhf.data.tokenizer import BOS, EOS, PAD, train_tokenizer
from jaxrlhf.data.tokens import (
    Limits,
    decode_responses,
    eos_ids_of,
    finished_responses,
    pad_left,
    pad_right,
    retokenize_responses,
    tokenize_demonstrations,
    tokenize_pairs,
    tokenize_prompts,
    tokenizer_fingerprint,
)

PLAIN = train_tokenizer([], 258)
WITH_BOS = train_tokenizer([], 259, bos=True)
PAD_IS_EOS = train_tokenizer([], 258)
PAD_IS_EOS.pad_token = EOS
TOKENIZERS = {"plain": PLAIN, "bos": WITH_BOS, "pad is eos": PAD_IS_EOS}
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def valid(tokens, mask):
    return [row[m].tolist() for row, m in zip(np.asarray(tokens), np.asarray(mask), strict=True)]


def chat(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>", "<|end|>"]})
    tokenizer.chat_template = (
        "{{ bos_token or '' }}{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|bot|>' }}{{ m['content'] }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_pair_by_hand(name):
    tokenizer = TOKENIZERS[name]
    eos = tokenizer.eos_token_id
    table, report = tokenize_pairs([Pair("x", "abc", " de", " f", "s:1", 0.5)], tokenizer, Limits(6, 5), eos_ids=(eos,))
    lead = [tokenizer.bos_token_id] if name == "bos" else []
    assert table.prompt_BL.shape == (1, 6) and table.chosen_BT.shape == table.rejected_BT.shape == (1, 5)
    assert table.prompt_BL[0].tolist() == [tokenizer.pad_token_id] * (3 - len(lead)) + lead + ids(tokenizer, "abc")
    assert table.prompt_mask_BL[0].tolist() == [False] * (3 - len(lead)) + [True] * (3 + len(lead))
    assert table.chosen_BT[0].tolist() == [*ids(tokenizer, " de"), eos, tokenizer.pad_token_id]
    assert table.chosen_mask_BT[0].tolist() == [True] * 4 + [False]  # the EOS counts, also where PAD is the same id
    assert table.rejected_mask_BT[0].tolist() == [True] * 3 + [False] * 2
    assert table.prompt_BL.dtype == table.index_B.dtype == np.int32 and table.prompt_mask_BL.dtype == table.row_mask_B.dtype == bool
    assert table.weights_B.tolist() == [1.0] and table.index_B.tolist() == [0] and table.row_mask_B.all()
    assert table.columns["margin"].tolist() == [0.5] and report.rows == [0]


def test_lengths_at_the_limit():
    limits = Limits(4, 4)
    rows = [Demonstration(str(n), "p" * n, "r" * n, f"s:{n}") for n in (3, 4, 5)]
    table, report = tokenize_demonstrations(rows, PLAIN, limits, eos_ids=(1,))
    assert report.rows == [0, 1] and report.dropped == [("s:5", "prompt too long: 5 tokens, limit 4")]
    assert valid(table.response_BT, table.response_mask_BT) == [[*ids(PLAIN, "rrr"), 1], ids(PLAIN, "rrrr")]  # no room, no EOS
    assert report.counts["responses truncated"] == 1
    table, report = tokenize_demonstrations(rows, PLAIN, Limits(4, 4, "truncate", "drop"), eos_ids=(1,))
    assert report.rows == [0] and [r.split(":")[0] for _, r in report.dropped] == ["response too long"] * 2
    with pytest.raises(DataError, match=r"no row is left(.|\n)*prompt too long"):
        tokenize_demonstrations(rows[2:], PLAIN, limits, eos_ids=(1,))
    for wrong in ({"max_prompt_length": 0}, {"long_prompt": "cut"}):
        with pytest.raises(DataError, match=next(iter(wrong))):
            Limits(**({"max_prompt_length": 4, "max_response_length": 4} | wrong))


def test_left_truncation_keeps_the_end_and_bos():
    (row,) = rows = [Prompt("x", "abcdef", "s:1")]
    for tokenizer, lead in ((PLAIN, []), (WITH_BOS, [2])):
        table, report = tokenize_prompts(rows, tokenizer, Limits(4, 1, "truncate"))
        assert table.prompt_BL[0].tolist() == lead + ids(tokenizer, row.prompt[-(4 - len(lead)) :]) and table.prompt_mask_BL.all()
        assert report.counts["prompts truncated"] == 1


def test_pairs_that_truncation_makes_equal_are_dropped_and_named():
    rows = [Pair("a", "p", "same x", "same y", "s:1"), Pair("b", "p", "one", "two", "s:2")]
    table, report = tokenize_pairs(rows, PLAIN, Limits(4, 4), eos_ids=(1,))
    assert report.rows == [1] and table.index_B.tolist() == [0]
    assert report.dropped == [("s:1", "identical sides as tokens: after truncation chosen equals rejected")]
    assert [rows[i].id for i in report.rows] == ["b"]


@pytest.mark.parametrize("text", ["foo", f"foo{EOS}", f"foo{EOS}{EOS}\n", f"foo{EOS}{PAD}{PAD}"])
@pytest.mark.parametrize("templated", [False, True])
def test_a_response_never_gets_two_eos(tmp_path, text, templated):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "response": text, "templated": templated}))
    rows, _ = read_demonstrations(tmp_path / "a.jsonl", tokenizer=PLAIN)
    table, _ = tokenize_demonstrations(rows, PLAIN, Limits(4, 12), eos_ids=(1,))
    assert valid(table.response_BT, table.response_mask_BT) == [[*ids(PLAIN, "foo"), 1]]


def test_a_response_of_nothing_but_eos_is_dropped():
    rows = [Demonstration("x", "p", EOS, "s:1", templated=True), Demonstration("y", "p", "a", "s:2")]
    _, report = tokenize_demonstrations(rows, PLAIN, Limits(4, 4), eos_ids=(1,))
    assert report.dropped == [("s:1", "empty response: nothing but EOS")]


def test_special_tokens_in_text_stay_text_unless_a_template_wrote_them():
    row = Demonstration("x", f"a{EOS}b", f"c{EOS}d", "s")
    table, report = tokenize_demonstrations([row], PLAIN, Limits(40, 40), eos_ids=(1,))
    spelled = [b + 0 for b in ids(PLAIN, "<|endoftext|>".replace("end", "eND"))]
    assert len(valid(table.prompt_BL, table.prompt_mask_BL)[0]) == 2 + len(spelled)
    assert (table.prompt_BL[table.prompt_mask_BL] != 1).all()
    response = valid(table.response_BT, table.response_mask_BT)[0]
    assert response[-1] == 1 and 1 not in response[:-1] and len(response) == 2 + len(spelled) + 1
    assert report.counts["texts that spell a special token (kept as text)"] == 2
    table, _ = tokenize_demonstrations([replace(row, templated=True)], PLAIN, Limits(40, 40), eos_ids=(1,))
    assert valid(table.prompt_BL, table.prompt_mask_BL) == [[*ids(PLAIN, "a"), 1, *ids(PLAIN, "b")]]
    assert valid(table.response_BT, table.response_mask_BT) == [[*ids(PLAIN, "c"), 1]]  # nothing after the first EOS


def test_an_empty_prompt_becomes_one_start_token():
    rows = [Demonstration("x", "", "abc", "s")]
    for tokenizer, start in ((PLAIN, 1), (WITH_BOS, 2)):
        table, _ = tokenize_demonstrations(rows, tokenizer, Limits(3, 5), eos_ids=(1,))
        assert valid(table.prompt_BL, table.prompt_mask_BL) == [[start]]


def test_templated_rows_are_parsed_and_end_in_the_templates_end_token():
    tokenizer = chat(WITH_BOS)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert eos_ids_of(tokenizer) == (1, end)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False, add_generation_prompt=True)
    rows = [Demonstration("t", prompt, "yes", "s", True), Demonstration("u", "q", "yes", "s")]
    table, _ = tokenize_demonstrations(rows, tokenizer, Limits(12, 6), eos_ids=eos_ids_of(tokenizer))
    special = tokenizer.convert_tokens_to_ids
    first, second = valid(table.prompt_BL, table.prompt_mask_BL)
    assert first == [
        2,
        special("<|user|>"),
        *ids(tokenizer, "q"),
        end,
        *ids(tokenizer, "\n"),
        special("<|bot|>"),
    ]  # the template's BOS, once
    assert second == [2, *ids(tokenizer, "q")]
    assert [r[-1] for r in valid(table.response_BT, table.response_mask_BT)] == [end, 1]
    with pytest.raises(DataError, match=r"<\|end\|>.*eos_ids"):
        tokenize_demonstrations(rows, tokenizer, Limits(12, 6), eos_ids=(1,))


def test_eos_ids_must_be_given():
    with pytest.raises(DataError, match="eos_ids"):
        tokenize_demonstrations([Demonstration("x", "p", "r", "s")], PLAIN, Limits(4, 4), eos_ids=())
    bare = copy.deepcopy(PLAIN)
    bare.eos_token = None
    with pytest.raises(DataError, match="no EOS"):
        eos_ids_of(bare)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=5),
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from([*TOKENIZERS]),
)
def test_any_text_gives_left_and_right_padded_rows_with_one_bos_and_at_most_one_eos(texts, longest_prompt, longest_response, name):
    tokenizer = TOKENIZERS[name]
    rows = [Demonstration(str(i), p, r, "s") for i, (p, r) in enumerate(texts)]
    limits = Limits(longest_prompt, longest_response, "truncate", "truncate")
    table, _ = tokenize_demonstrations(rows, tokenizer, limits, eos_ids=(1,))
    prompt_mask, response_mask = np.asarray(table.prompt_mask_BL), np.asarray(table.response_mask_BT)
    assert (np.diff(prompt_mask.astype(int), axis=1) >= 0).all() and (np.diff(response_mask.astype(int), axis=1) <= 0).all()
    assert prompt_mask.any(axis=1).all() and response_mask.any(axis=1).all()
    for i, (prompt, response) in enumerate(texts):
        got = table.prompt_BL[i][prompt_mask[i]].tolist()
        whole = ([2] if name == "bos" else []) + ids_as_text(tokenizer, prompt)
        assert got.count(2) == 1 or name != "bos" or longest_prompt == 1
        assert len(got) == min(len(whole) or 1, longest_prompt)
        assert got[name == "bos" :] == (whole or [1])[len(whole or [1]) - len(got) + (name == "bos") :]
        answer = table.response_BT[i][response_mask[i]].tolist()
        assert answer == [*ids_as_text(tokenizer, response), 1][:longest_response]
        assert (table.response_BT[i][~response_mask[i]] == tokenizer.pad_token_id).all()


def ids_as_text(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXT.filter(str.strip), min_size=1, max_size=4))
def test_decoding_gives_the_text_back(texts):
    rows = [Demonstration(str(i), "p", t, "s") for i, t in enumerate(texts)]
    table, _ = tokenize_demonstrations(rows, PAD_IS_EOS, Limits(4, 60), eos_ids=(1,))
    assert decode_responses(table.response_BT, table.response_mask_BT, PAD_IS_EOS, (1,)) == texts
    assert finished_responses(table.response_BT, table.response_mask_BT, (1,)).all()


def test_decoding_stops_at_the_mask_and_at_any_eos_and_survives_ids_outside_the_vocabulary():
    a, b, c = ids(PLAIN, "abc")
    tokens = np.array([[a, b, 1, c], [a, b, c, c], [a, 5_000, 0, b], [1, a, b, c]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
    assert decode_responses(tokens, mask, PLAIN, (1, c)) == ["ab", "ab", "ab", ""]
    assert finished_responses(tokens, mask, (1, c)).tolist() == [True, False, False, True]
    assert decode_responses(tokens[:0], mask[:0], PLAIN, (1,)) == []


def test_retokenised_text_keeps_every_row_and_gives_eos_only_to_finished_responses():
    limits = Limits(3, 4)  # "drop" for prompts: not here
    table, report = retokenize_responses(
        ["ab", "abcdef", "x", "y"], ["hi", "hi", "too long", ""], PLAIN, limits, eos_ids=(1,), finished=[True, False, True, False]
    )
    assert valid(table.prompt_BL, table.prompt_mask_BL) == [ids(PLAIN, t) for t in ("ab", "def", "x", "y")]
    expected = [[*ids(PLAIN, "hi"), 1], ids(PLAIN, "hi"), ids(PLAIN, "too "), [1]]
    assert valid(table.response_BT, table.response_mask_BT) == expected
    assert report.counts["prompts truncated"] == 1 and report.counts["responses truncated"] == 1 and report.kept == 4
    with pytest.raises(DataError, match="2 prompts but 1"):
        retokenize_responses(["a", "b"], ["c"], PLAIN, limits, eos_ids=(1,))


def test_data_and_samples_share_their_ids():
    """A response read from data and the same response after sampling and retokenisation stand at the same ids."""
    text = " some response, with  spaces ."
    data, _ = tokenize_demonstrations([Demonstration("x", "prompt", text, "s")], PLAIN, Limits(8, 40), eos_ids=(1,))
    decoded = decode_responses(data.response_BT, data.response_mask_BT, PLAIN, (1,))
    sampled, _ = retokenize_responses(["prompt"], decoded, PLAIN, Limits(8, 40), eos_ids=(1,), finished=[True])
    for field in ("prompt_BL", "prompt_mask_BL", "response_BT", "response_mask_BT"):
        np.testing.assert_array_equal(getattr(data, field), getattr(sampled, field))


def test_padding_functions():
    tokens, mask = pad_left([[5], [6, 7, 8], []], 3, 9)
    assert tokens.tolist() == [[9, 9, 5], [6, 7, 8], [9, 9, 9]] and mask.tolist() == [[False, False, True], [True] * 3, [False] * 3]
    tokens, mask = pad_right([[5], [6, 9]], 3, 9)
    assert tokens.tolist() == [[5, 9, 9], [6, 9, 9]] and mask.tolist() == [[True, False, False], [True, True, False]]
    with pytest.raises(ValueError, match="row 0 has 2 tokens"):
        pad_right([[1, 2]], 1, 0)


def test_fingerprint_sees_what_changes_ids_and_nothing_else():
    base = tokenizer_fingerprint(PLAIN)
    same = copy.deepcopy(PLAIN)
    same.add_special_tokens({"pad_token": "<|another pad|>"})
    same(["a", "bb"], padding=True, truncation=True, max_length=1)  # leaves state in the backend
    assert tokenizer_fingerprint(same) == base
    longer = copy.deepcopy(PLAIN)
    longer.add_tokens(["ab"])
    others = [WITH_BOS, longer, train_tokenizer(["aa aa aa"], 300), chat(PLAIN)]
    assert len({base, *map(tokenizer_fingerprint, others)}) == 5


def test_fingerprint_survives_saving(tmp_path):
    for n, tokenizer in enumerate((PLAIN, WITH_BOS, chat(WITH_BOS))):
        tokenizer.save_pretrained(tmp_path / str(n))
        again = AutoTokenizer.from_pretrained(tmp_path / str(n))
        assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


# ---- a tokenizer of one's own


def test_trained_tokenizers_are_deterministic_and_round_trip_anything(tmp_path):
    texts = ["the cat sat on the mat", "the dog 🙂", "naïve café"] * 3
    one, two = train_tokenizer(texts, 300), train_tokenizer(iter(texts), 300)
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    assert (one.pad_token_id, one.eos_token_id, one.bos_token_id, len(one)) == (0, 1, None, len(set(one.get_vocab().values())))
    assert 258 < len(one) <= 300 and len(one("the cat").input_ids) < 7
    one.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("🙂 \x00 ÿ \u2028 中文", "  two  spaces ,and . stops", "\r\n\t"):
        assert again.decode(again(text).input_ids) == text
    with pytest.raises(DataError, match="use 259"):
        train_tokenizer(texts, 258, bos=True)
    assert WITH_BOS("a").input_ids[0] == WITH_BOS.convert_tokens_to_ids(BOS) == 2


# ---- real vocabularies


def test_real_sentencepiece_vocabulary_bos_once_and_leading_spaces(real_data):
    tokenizer = AutoTokenizer.from_pretrained(real_data / "models" / "stories260K")
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    rows = [Demonstration("x", "Once upon", " a time", "s"), Demonstration("y", "</s>Once", " a </s> b</s>", "s")]
    table, _ = tokenize_demonstrations(rows, tokenizer, Limits(32, 32), eos_ids=(2,))
    prompts, responses = valid(table.prompt_BL, table.prompt_mask_BL), valid(table.response_BT, table.response_mask_BT)
    assert [p.count(1) for p in prompts] == [1, 1] and [p[0] for p in prompts] == [1, 1] and 2 not in prompts[1]
    assert [r.count(2) for r in responses] == [1, 1] and [r[-1] for r in responses] == [2, 2]
    assert decode_responses(table.response_BT, table.response_mask_BT, tokenizer, (2,))[0] == " a time"
    np.testing.assert_array_equal(prompts[0] + responses[0][:-1], tokenizer("Once upon a time").input_ids)


def test_real_byte_level_vocabulary_with_pad_equal_to_eos_round_trips_dialogues(real_data):
    from jaxrlhf.data.pairs import read_pairs

    file = real_data / "tokenizers" / "neox20b" / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    pairs, _ = read_pairs(real_data / "hh_helpful" / "train.jsonl.gz", limit=200)
    table, report = tokenize_pairs(pairs, tokenizer, Limits(512, 1024), eos_ids=eos_ids_of(tokenizer))
    assert report.kept + len(report.dropped) == 200 and report.kept > 180
    for field in ("chosen", "rejected"):
        tokens, mask = getattr(table, f"{field}_BT"), getattr(table, f"{field}_mask_BT")
        kept = [getattr(pairs[i], field) for i in report.rows]
        # canonical composition is part of this vocabulary; nothing else may differ
        same = [a == b for a, b in zip(decode_responses(tokens, mask, tokenizer, (0,)), kept, strict=True)]
        assert np.mean(same) == 1.0
        assert (tokens[mask].reshape(-1) == 0).sum() == len(kept)  # one EOS a response, under the mask
