"""The short form of tests/faults/test_rows.py, and what that found."""

import gzip
import json

import mutated_rows as mutated
import pytest

from jaxrlhf.data.pairs import DataError, read_demonstrations, read_pairs


def test_kept_and_dropped_are_all_there_is(tmp_path):
    tokenizer = mutated.chat_tokenizer()
    counts = [mutated.attack(tmp_path, number, tokenizer) for number in range(12)]
    assert all(sum(count) for count in zip(*counts, strict=True))  # some were kept and some dropped


@pytest.mark.parametrize("name", ["x.json", "x.json.gz", "x.jsonl.gz"])
@pytest.mark.parametrize("damage", [lambda whole: whole[:12], lambda whole: whole[:2] + b"\0" * 40, lambda whole: whole[:30] + b"\xff" * 9])
def test_damaged_gzip_is_said_whatever_is_in_it(tmp_path, name, damage):
    path = tmp_path / name
    path.write_bytes(damage(gzip.compress(json.dumps([{"prompt": "p", "completion": str(n)} for n in range(99)]).encode())))
    with pytest.raises(DataError, match="damaged gzip"):
        read_demonstrations(path)


def test_an_array_that_is_nested_too_deeply_is_said(tmp_path):
    (tmp_path / "x.json").write_text("[" * 99_999)
    with pytest.raises(DataError, match=r"x.json starts as a JSON array but cannot be read: .*recursion"):
        read_pairs(tmp_path / "x.json")


def test_a_template_may_have_variables_of_any_name(tmp_path):
    """Those that `render` has for its own arguments too."""
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": mutated.TALK, "chat_template_kwargs": {"prompt": 1, "tokenizer": 2}}))
    (row,), _ = read_demonstrations(tmp_path / "x.jsonl", tokenizer=mutated.chat_tokenizer())
    assert row.response == "a"
