"""Nothing is written over a file that its command has not written, and nothing is read from outside of a model's folder."""

import json

import pytest

from jaxrlhf import cli
from jaxrlhf.models.hub.safetensors import INDEX, tensor_files
from jaxrlhf.recipe import MARK
from jaxrlhf.report.build import Report, write
from jaxrlhf.report.drawing import Figure
from jaxrlhf.report.page import MADE_BY as BY_REPORT


def test_generate_replaces_its_own_rows_and_nothing_else(monkeypatch, tmp_path, capsys):
    import jaxrlhf.rollouts.texts as module

    row = {"id": "0", "prompt": "p", "response": "r", "sample": 0, "finished": True}
    monkeypatch.setattr(module, "generate_texts", lambda **settings: iter([row]))
    target = tmp_path / "out.jsonl"
    for _ in range(2):
        assert cli.main(["generate", "folder", "a prompt", "--output", str(target)]) == 0
    theirs = '{"id": "0", "prompt": "mine"}\n'
    target.write_text(theirs)
    assert cli.main(["generate", "folder", "--file", str(target), "--output", str(target)]) == 1
    assert "out.jsonl exists and was not written by this command" in capsys.readouterr().err and target.read_text() == theirs


@pytest.mark.parametrize(("word", "name"), [("--json", "p.json"), ("--figure", "p.svg")])
def test_plan_refuses_before_it_plans(tmp_path, monkeypatch, capsys, word, name):
    from jaxrlhf.commands import plan as module

    monkeypatch.setattr(module, "plan", lambda *given, **how: pytest.fail("planned"))
    theirs = tmp_path / name
    theirs.write_text("{}")
    assert cli.main(["plan", "quickstart.yaml", word, str(theirs)]) == 1
    assert f"{name} exists and was not written by this command" in capsys.readouterr().err and theirs.read_text() == "{}"


def test_the_recipe_that_plan_prints_has_no_mark_of_a_run(monkeypatch, capsys):
    from jaxrlhf.commands import plan as module

    def planned(*given, **how):
        raise ValueError("planned")

    monkeypatch.setattr(module, "plan", planned)
    with pytest.raises(ValueError, match="planned"):
        cli.main(["plan", "quickstart.yaml"])
    out = capsys.readouterr().out
    assert "\nrounds: " in out and MARK.strip() not in out


@pytest.mark.parametrize("name", ["report.html", "summary.md", "figures/gold.svg"])
def test_a_report_replaces_a_report(tmp_path, name):
    done = Report(f"<p>{BY_REPORT}", f"# table\n{BY_REPORT}", [Figure("gold", "Gold", "", "", b"<svg/>", b"")], [])
    theirs = tmp_path / "theirs" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(FileExistsError, match="was not written by this command"):
        write(done, tmp_path / "theirs" / "report.html")
    assert [path for path in (tmp_path / "theirs").rglob("*") if path.is_file()] == [theirs] and theirs.read_text() == "mine"
    for _ in range(2):
        page = write(done, tmp_path / "ours" / "report.html")
    assert page.read_text() == done.html
    page.write_text("<footer>Made by <code>jaxrlhf report</code> from the run folders alone.</footer>")  # by an earlier version
    assert write(done, page).read_text() == done.html


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/../../b.safetensors", "sub/b.safetensors", 3])
def test_an_index_that_points_outside_is_refused(tmp_path, file):
    (tmp_path / "model.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(ValueError, match=r"index\.json names .*, which is no file of its own folder"):
        tensor_files(folder)
    (folder / "w.safetensors").symlink_to(tmp_path / "model.safetensors")  # a hub's cache is made of links
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "w.safetensors"}}))
    assert tensor_files(folder) == {"w": folder / "w.safetensors"}
