"""Columns on disk: round trips, joins by id, and every way to be missing or stale."""

import json

import numpy as np
import pytest

from jaxrlhf.data import columns as C
from jaxrlhf.data.columns import ColumnError, column_header, join_columns, read_header, write_columns
from jaxrlhf.data.tokens import Limits

IDS = ["b", "a", "ü-1"]
HEADER = column_header(dataset="d", model="m", tokenizer="t", temperature=1.0, limits=Limits(8, 4), encoder="e")
COLUMNS = {
    "logp": np.array([-1.5, -2.25, -300.125], np.float32),
    "near": np.array([3, 1, 2], np.int32),
    "kept": np.array([True, False, True]),
    "vector": np.arange(6, dtype=np.float32).reshape(3, 2),
    "half": np.array([0.5, 1, 2], np.float16),
}


@pytest.fixture
def folder(tmp_path):
    return write_columns(tmp_path / "cols", IDS, COLUMNS, HEADER)


def test_round_trip_keeps_values_types_and_the_order_asked_for(folder):
    got = join_columns(["ü-1", "b"], folder, list(COLUMNS), expect=HEADER)
    for name, values in COLUMNS.items():
        assert got[name].dtype == values.dtype
        np.testing.assert_array_equal(got[name], values[[2, 0]])
    assert join_columns(IDS, folder, ["logp"], expect={"dataset": "d"}).keys() == {"logp"}
    said = read_header(folder)
    assert said["rows"] == 3 and said["format"] == 1 and said["columns"]["vector"] == {"dtype": "float32", "shape": [2]}


def test_a_fingerprint_sees_what_a_header_says_and_not_in_which_order():
    assert C.fingerprint(dict(sorted(HEADER.items()))) == C.fingerprint(HEADER) != C.fingerprint(HEADER | {"model": "n"})


def test_no_rows_are_columns_too(tmp_path):
    write_columns(tmp_path / "c", [], {"v": np.zeros((0, 2), np.float32), "x": np.zeros(0, np.float32)}, HEADER)
    got = join_columns([], tmp_path / "c", ["v", "x"], expect=HEADER)
    assert got["v"].shape == (0, 2) and got["x"].shape == (0,)


def test_many_shards_join_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(C, "_ROWS_PER_SHARD", 7)
    ids, values = [f"x{i}" for i in range(23)], np.random.default_rng(0).normal(size=(23, 3)).astype(np.float32)
    write_columns(tmp_path / "c", ids, {"v": values}, HEADER)
    assert len(read_header(tmp_path / "c")["shards"]) == 4
    np.testing.assert_array_equal(join_columns(ids[::-1], tmp_path / "c", ["v"], expect=HEADER)["v"], values[::-1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", "x"),
        ("model", None),
        ("tokenizer", "x"),
        ("temperature", 0.7),
        ("limits", Limits(8, 5)),
        ("encoder", "x"),
        ("unheard", 1),
    ],
)
def test_a_header_that_differs_is_stale_and_named(folder, field, value):
    with pytest.raises(ColumnError, match=rf"stale.*{field} .*again"):
        join_columns(IDS, folder, ["logp"], expect=HEADER | {field: value})


def test_missing_ids_and_columns_are_errors_that_name_them(folder):
    with pytest.raises(ColumnError, match=r"pair id 'zz' \(and 1 more\) has no row.*holds 3"):
        join_columns(["a", "zz", "yy"], folder, ["logp"], expect=HEADER)
    with pytest.raises(ColumnError, match=r"no column 'other'; it holds half, kept"):
        join_columns(IDS, folder, ["other"], expect=HEADER)
    with pytest.raises(ColumnError, match="run the precompute"):
        join_columns(IDS, folder / "nothing", ["logp"], expect=HEADER)


def test_damaged_folders_are_errors(folder):
    whole = next(folder.glob("*.parquet")).read_bytes()
    next(folder.glob("*.parquet")).write_bytes(b"PAR1")
    with pytest.raises(ColumnError, match="damaged"):
        join_columns(IDS, folder, ["logp"], expect=HEADER)
    file, raw = next(folder.glob("*.parquet")), whole
    file.write_bytes(raw[:6] + bytes([raw[6] ^ 1]) + raw[7:])  # no reader of Parquet sees that
    with pytest.raises(
        ColumnError, match=rf"{file} is damaged: its content \(sha256\) is another than was written. Compute the columns again"
    ):
        join_columns(IDS, folder, ["logp"], expect=HEADER)
    body = json.loads((folder / "header.json").read_text()) | {"format": 99}
    (folder / "header.json").write_text(json.dumps(body))
    with pytest.raises(ColumnError, match=r"header\.json cannot be read \(it is damaged"):
        join_columns(IDS, folder, ["logp"], expect=HEADER)
    del body["seal"]  # as of another version
    (folder / "header.json").write_text(json.dumps(body))
    with pytest.raises(ColumnError, match="format 99"):
        read_header(folder)


def test_unfit_columns_are_refused_and_leave_nothing_behind(tmp_path):
    bad = {
        r"is nan for pair id 'a' \(1 rows": {"x": np.array([0.0, np.nan, 1.0])},
        "is -inf for pair id 'b'": {"x": np.array([-np.inf, 0.0, 1.0])},
        "has shape": {"x": np.zeros(2)},
        "numbers": {"x": np.array(["a", "b", "c"])},
        "'id'": {"id": np.zeros(3)},
    }
    for message, columns in bad.items():
        with pytest.raises(ColumnError, match=message):
            write_columns(tmp_path / "c", IDS, columns, HEADER)
    with pytest.raises(ColumnError, match="'a' occurs twice"):
        write_columns(tmp_path / "c", ["a", "b", "a"], {"x": np.zeros(3)}, HEADER)
    assert list(tmp_path.iterdir()) == []


def test_writing_is_all_or_nothing(tmp_path, folder, monkeypatch):
    import pyarrow.parquet as pq

    with pytest.raises(FileExistsError, match="overwrite"):
        write_columns(folder, IDS, COLUMNS, HEADER)

    def broken(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", broken)
        with pytest.raises(OSError, match="disk full"):
            write_columns(folder, ["n"], {"logp": np.zeros(1)}, HEADER, overwrite=True)
    assert join_columns(IDS, folder, ["near"], expect=HEADER)["near"].tolist() == [3, 1, 2]  # the old one is whole
    assert [p.name for p in tmp_path.iterdir()] == ["cols"]
    write_columns(folder, ["n"], {"logp": np.ones(1)}, HEADER, overwrite=True)
    assert join_columns(["n"], folder, ["logp"], expect=HEADER)["logp"].tolist() == [1.0]
    assert [p.name for p in tmp_path.iterdir()] == ["cols"]
