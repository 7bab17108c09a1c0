import io
import os
import sys

import pytest
from rich.console import Console

from jaxrlhf.monitoring.output import Shown, shown_output
from jaxrlhf.monitoring.runlog import RunLog


def without_reader():
    """A stream to a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


@pytest.mark.parametrize("what", ["no reader", "full disk", "not to be written", "none"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_run_is_logged_whatever_becomes_of_its_terminal(tmp_path, monkeypatch, what, plain):
    if what == "no reader":
        stream = without_reader()
    else:
        name, mode = {"full disk": ("/dev/full", "w"), "not to be written": (os.devnull, "r"), "none": (os.devnull, "w")}[what]
        stream = None if what == "none" else open(name, mode)  # noqa: SIM115 (closed below)
    monkeypatch.setattr(sys, "stderr", stream)
    with RunLog(tmp_path, plain=plain, every=0) as log, log.stage("sft", total_steps=2) as stage:
        for n in (1, 2):
            stage.step(n, {"loss": 1.0})
        stage.note("±")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    if stream is not None:
        stream.close()  # as Python does at its end: what could not be written is forgotten


def test_lines_end_with_their_reader():
    """What is made only to be shown is not made for nobody."""
    made = []
    with without_reader() as stream:
        Shown(stream).writelines(made.append(n) or f"{n}\n" for n in range(9))
    assert made == [0]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_characters_that_a_terminal_lacks_are_replaced(monkeypatch, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with shown_output() as shown:
        print("±日\ud800")
        Console(width=1).print("±日\ud800")
        print("±日\ud800", file=sys.stderr)
    assert shown.lost is None and sys.stdout is out
    assert out.buffer.getvalue().startswith({"ascii": b"???\n", "cp1252": b"\xb1??\n", "utf-8": "±日?\n".encode()}[encoding])
    assert b"\\ud800" in err.buffer.getvalue()
