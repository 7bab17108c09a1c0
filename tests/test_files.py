"""Files of ours that are broken: what can do without them does, and what cannot says which it is and what to do, in one line."""

import json
import os

import pytest

from jaxrlhf.algorithms.nearest_file import KEPT, _kept_ids
from jaxrlhf.comparison.candidates import check_model
from jaxrlhf.data.pairs import Pair, write_pairs
from jaxrlhf.data.read_report import DataError
from jaxrlhf.files import DamagedFile, read_json, read_json_lines
from jaxrlhf.pipeline.stages.lineage import read_lineage
from jaxrlhf.pipeline.stages.reward_update import report_of
from jaxrlhf.pipeline.table import read_summaries
from jaxrlhf.storage.record import check_fields, read_record
from jaxrlhf.storage.stage import StageError

BROKEN = {
    "empty": b"",
    "zeros": bytes(64),
    "not UTF-8": b'{"a": "\xff"}',
    "cut": b'{"a": [1, 2',
    "deep": b"[" * 99_999,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "another kind": b"[1]",
}


def find(folder):
    """As the store does that finds a stage there."""
    check_fields(folder, {"name": "a", "function": "b", "hash": "c", "inputs": {}, "config": {}, "seconds": 1} | read_record(folder))


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize(
    ("name", "read", "error"),
    [
        ("stage.json", read_record, StageError),
        ("lineage.json", read_lineage, DamagedFile),
        ("report.json", report_of, DamagedFile),
        ("summary.json", read_summaries, DamagedFile),
        ("config.json", lambda folder: check_model(folder, str(folder), head="lm"), DamagedFile),
    ],
)
def test_a_broken_file_is_named_with_the_way_out(tmp_path, name, content, read, error):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=r"(again|to build it)") as said:
        read(tmp_path)
    assert str(tmp_path / name) in str(said.value) and str(said.value).isprintable()


@pytest.mark.parametrize(
    ("name", "read", "body", "lacks"),
    [
        ("lineage.json", read_lineage, {"kind": "policy"}, "parent"),
        ("lineage.json", read_lineage, {"kind": "reward", "round": 1, "parent": {}, "data": {}}, "corrects_for"),
        ("summary.json", read_summaries, {"method": "ppo"}, "rounds"),
        ("stage.json", find, {"finished": "now"}, "result"),
        ("stage.json", find, {"finished": "now", "result": None, "seconds": "3"}, "seconds"),
    ],
)
def test_so_is_one_without_a_field(tmp_path, name, read, body, lacks):
    (tmp_path / name).write_text(json.dumps(body))
    with pytest.raises((DamagedFile, StageError), match=lacks) as said:
        read(tmp_path)
    assert str(tmp_path / name) in str(said.value)


def test_a_pipe_is_no_file(tmp_path):
    """To read one would wait for ever."""
    os.mkfifo(tmp_path / "x.json")
    for read in (lambda path: read_json(path, "try again"), lambda path: read_json_lines(path, bool)):
        with pytest.raises((DamagedFile, OSError), match=r"no regular file"):
            read(tmp_path / "x.json")


def test_lines_end_where_json_lines_do(tmp_path):
    """A text may hold U+2028, at which Python's splitlines ends a line: the pairs of a filter are read again."""
    write_pairs(tmp_path / KEPT, [Pair("a\u2028b", "p\u2029", "\x85c", "r", "")])
    assert _kept_ids(tmp_path) == ["a\u2028b"]
    (tmp_path / KEPT).write_text('{"id": 3}\n')
    with pytest.raises(DataError, match="does not list kept pairs"):
        _kept_ids(tmp_path)
