"""Parquet tables: what is written is read again, tokens, masks, margins and all."""

import numpy as np
import pytest

from jaxrlhf.data.pairs import Pair
from jaxrlhf.data.report import DataError
from jaxrlhf.data.tables import read_pair_table, read_table, text_batch, unpadded, write_pair_table, write_table
from jaxrlhf.types import PairBatch


def table(margin=None):
    rows = [
        Pair("a", "Frage: ü\n", "ja ", "nein", "f.jsonl:1", margin, True),
        Pair("b", "", "1", "2", "f.jsonl:9", None if margin is None else -margin),
    ]
    left, right = np.array([[False, True, True], [False, False, True]]), np.array([[True, True], [True, False]])
    sides = [np.arange(n, n + mask.size, dtype=np.int32).reshape(mask.shape) for n, mask in ((10, left), (20, right), (30, right))]
    # Padding is written with the pad id, whatever stood there.
    sides = [np.where(mask, side, 7) for side, mask in zip(sides, (left, right, right), strict=True)]
    ones = np.ones(2, np.float32)
    return rows, PairBatch(sides[0], left, sides[1], right, sides[2], right, ones, ones > 0, np.arange(2, dtype=np.int32))  # type: ignore[arg-type]


@pytest.mark.parametrize("margin", [None, 0.5])
def test_pairs_round_trip(tmp_path, margin):
    rows, tokens = table(margin)
    write_pair_table(tmp_path / "pairs.parquet", rows, tokens, pad_id=7)
    again, read = read_pair_table(tmp_path / "pairs.parquet")
    assert again == rows
    for name in (
        "prompt_BL",
        "prompt_mask_BL",
        "chosen_BT",
        "chosen_mask_BT",
        "rejected_BT",
        "rejected_mask_BT",
        "weights_B",
        "row_mask_B",
        "index_B",
    ):
        np.testing.assert_array_equal(getattr(read, name), getattr(tokens, name))
        assert getattr(read, name).dtype == getattr(tokens, name).dtype
    if margin is None:
        assert read.columns == {}
    else:
        assert read.columns["margin"].tolist() == [0.5, -0.5] and read.columns["margin"].dtype == np.float32
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.parquet"]  # nothing half-written stays


def test_a_broken_file_says_what_to_do(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"x.parquet cannot be read .*delete its stage folder to make it again"):
        read_table(tmp_path / "x.parquet")


def test_metadata_and_texts(tmp_path):
    write_table(tmp_path / "t.parquet", {"a": [[1, 2], [3]], "text": ["é", None]}, prompt_width=3, kind="x")
    columns, facts = read_table(tmp_path / "t.parquet")
    assert columns == {"a": [[1, 2], [3]], "text": ["é", None]} and facts == {"prompt_width": "3", "kind": "x"}
    batch = text_batch(columns["a"], [[5], [6, 7]], prompt_width=3, response_width=2, pad_id=0)
    assert batch.prompt_BL.tolist() == [[0, 1, 2], [0, 0, 3]] and batch.response_mask_BT.tolist() == [[True, False], [True, True]]
    assert unpadded(batch.prompt_BL, batch.prompt_mask_BL) == [[1, 2], [3]]  # type: ignore[arg-type]
