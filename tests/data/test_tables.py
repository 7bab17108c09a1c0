"""Parquet tables: what is written is read again, tokens, masks, margins and all."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.data.batches import batches, take
from jaxrlhf.data.pairs import Pair
from jaxrlhf.data.read_report import DataError
from jaxrlhf.data.tables import read_pair_table, read_table, unpadded, write_pair_table, write_table
from jaxrlhf.data.tokens import Limits, text_batch
from jaxrlhf.steps.pair import make_pair_step
from jaxrlhf.steps.state import init_state
from jaxrlhf.types import Model, Outputs, PairBatch, PairLoss


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


def test_a_pair_without_a_margin_beside_one_that_has_it_has_0(tmp_path):
    rows, tokens = table(0.5)
    write_pair_table(tmp_path / "pairs.parquet", [rows[0], replace(rows[1], margin=None)], tokens, pad_id=7)
    assert read_pair_table(tmp_path / "pairs.parquet")[1].columns["margin"].tolist() == [0.5, 0.0]


def test_a_broken_file_says_what_to_do(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"x.parquet cannot be read .*delete its stage folder to make it again"):
        read_table(tmp_path / "x.parquet")


def test_metadata_and_texts(tmp_path):
    write_table(tmp_path / "t.parquet", {"a": [[1, 2], [3]], "text": ["é", None]}, prompt_width=3, kind="x")
    columns, facts = read_table(tmp_path / "t.parquet")
    assert columns == {"a": [[1, 2], [3]], "text": ["é", None]} and facts == {"prompt_width": "3", "kind": "x"}
    batch = text_batch(columns["a"], [[5], [6, 7]], Limits(3, 2), 0)
    assert batch.prompt_BL.tolist() == [[0, 1, 2], [0, 0, 3]] and batch.response_mask_BT.tolist() == [[True, False], [True, True]]
    assert unpadded(batch.prompt_BL, batch.prompt_mask_BL) == [[1, 2], [3]]  # type: ignore[arg-type]


COLUMNS = {
    "gap": (np.array([0.25, -1.5]), np.float32),
    "count": (np.array([2**24 + 1, -7], np.int64), np.int32),
    "limits": (np.array([2**31 - 1, -(2**31)], np.int64), np.int32),
    "seen": (np.array([True, False]), np.bool_),
    "vector": (np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float16), np.float32),
    "cluster": (np.array([[3, 2**24 + 3], [1, 0]], np.uint32), np.int32),
    "device": (jnp.array([0.5, 1.5], jnp.bfloat16), np.float32),
}


@pytest.mark.parametrize("margin", [None, 0.5])
def test_extra_columns_keep_shape_kind_and_every_bit(tmp_path, margin):
    rows, tokens = table(margin)
    tokens = replace(tokens, columns={name: values for name, (values, _) in COLUMNS.items()})
    write_pair_table(tmp_path / "pairs.parquet", rows, tokens, pad_id=7)
    again, read = read_pair_table(tmp_path / "pairs.parquet")
    assert again == rows and set(read.columns) == set(COLUMNS) | ({"margin"} if margin else set())
    for name, (values, dtype) in COLUMNS.items():
        assert read.columns[name].dtype == dtype and read.columns[name].shape == values.shape
        np.testing.assert_array_equal(read.columns[name], np.asarray(values).astype(dtype))


def test_no_pairs_keep_the_width_of_a_column(tmp_path):
    rows, tokens = table()
    none = take(replace(tokens, columns={"vector": np.ones((2, 3), np.float32)}), np.array([], int))
    write_pair_table(tmp_path / "pairs.parquet", rows[:0], none, pad_id=7)
    assert read_pair_table(tmp_path / "pairs.parquet")[1].columns["vector"].shape == (0, 3)


def test_a_margin_that_an_update_made_wins_over_the_datas(tmp_path):
    rows, tokens = table(0.5)
    tokens = replace(tokens, columns={"margin": np.array([2.0, 3.0])})
    write_pair_table(tmp_path / "pairs.parquet", rows, tokens, pad_id=7)
    again, read = read_pair_table(tmp_path / "pairs.parquet")
    assert again == rows and read.columns["margin"].tolist() == [2.0, 3.0]
    rows, tokens = table(None)
    write_pair_table(tmp_path / "made.parquet", rows, replace(tokens, columns={"margin": np.array([0.0, 0.0])}), pad_id=7)
    assert read_pair_table(tmp_path / "made.parquet")[1].columns["margin"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(3), r"column 'x' has shape \(3,\) and type float64 for 2 pairs; give numbers, \[N\] or \[N, D\]"),
        (np.ones((2, 1, 1)), r"shape \(2, 1, 1\)"),
        (np.float32(1), r"shape \(\)"),
        (np.array(["a", "b"]), r"type <U1 for 2 pairs; give numbers"),
        (np.array([1j, 0]), r"type complex128"),
        (np.array([1.0, np.nan]), r"column 'x' is nan in row 1 \(1 rows in all\); give finite numbers"),
        (np.array([[1e300, 1.0], [0.0, np.inf]]), r"in row 0 \(2 rows in all\)"),
        (np.array([2**31, 0]), r"whole numbers beyond 32 bits"),
        (np.array([0, -(2**31) - 1]), r"whole numbers beyond 32 bits"),
    ],
)
def test_columns_that_no_step_could_read_are_refused(tmp_path, values, message):
    rows, tokens = table()
    with pytest.raises(ValueError, match=message):
        write_pair_table(tmp_path / "pairs.parquet", rows, replace(tokens, columns={"x": values}), pad_id=7)
    assert not list(tmp_path.iterdir())


def test_rows_and_tokens_must_be_the_same_pairs(tmp_path):
    rows, tokens = table()
    with pytest.raises(ValueError, match=r"1 pairs, but the tokens of 2; `rows` and `tokens` are the same pairs"):
        write_pair_table(tmp_path / "pairs.parquet", rows[:1], tokens, pad_id=7)


def test_columns_reach_the_loss_row_for_row(tmp_path):
    """Written, read, shuffled into batches, through a step with accumulation: every pair's loss sees that pair's numbers."""
    rows, tokens = table()
    n = 6
    rows = [replace(rows[i % 2], id=str(i)) for i in range(n)]
    number = np.arange(n)
    columns = {"count": 2**24 + 1 + number, "vector": np.stack([number, 10.0 * number, 100.0 * number], axis=1)}
    tokens = replace(take(tokens, number % 2), index_B=number.astype(np.int32), columns=columns)
    write_pair_table(tmp_path / "pairs.parquet", rows, tokens, pad_id=7)
    read = read_pair_table(tmp_path / "pairs.parquet")[1]

    def apply(params, tokens_BL, mask_BL, *, start=0):
        return Outputs(scalars=params["w"] * jnp.ones((tokens_BL.shape[0], tokens_BL.shape[1] - start)))

    def loss(outputs, batch, *, total=None):
        right = jnp.where(batch.columns["count"] - (2**24 + 1) == batch.index_B, 1.0, jnp.nan)
        expected = batch.index_B[:, None] * jnp.array([1.0, 10.0, 100.0])
        right = jnp.where((batch.columns["vector"] == expected).all(axis=1), right, jnp.nan)
        value = jnp.where(batch.row_mask_B, right * outputs.chosen_B, 0.0).sum() / total
        return value, {"count": jnp.where(batch.row_mask_B, batch.columns["vector"][:, 0], 0.0).sum()}

    model = Model(None, apply, None, None, None)  # type: ignore[arg-type]
    optimizer = optax.sgd(0.0)
    step = jax.jit(make_pair_step(model, PairLoss("scalar", ("count", "vector"), loss), optimizer, accumulate=2))
    state = init_state({"w": jnp.float32(1.0)}, optimizer)
    seen = 0.0
    for batch in batches(read, 4, seed=3, epochs=1):
        state, metrics = step(state, batch)
        assert float(metrics["loss/pair"]) == 1.0
        seen += float(metrics["pair/count"])
    assert seen == number.sum()
