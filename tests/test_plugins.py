"""`module:attribute`: what it finds, and what it says where there is nothing."""

import importlib
import sys

import pytest

from jaxrlhf.plugins import plugin, source_of


def test_finds_objects_and_attributes_of_objects():
    import json.decoder

    assert plugin("json.decoder:JSONDecoder.decode") is json.decoder.JSONDecoder.decode


@pytest.mark.parametrize("name", ["json", "json:", ":loads", "", ".json:loads"])
def test_malformed_names(name):
    with pytest.raises(ValueError, match=r"names no object; write `module:attribute`"):
        plugin(name)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(ImportError, match=r"no module 'no_such_module'; install it or put its folder on PYTHONPATH"):
        plugin("no_such_module.part:f")
    with pytest.raises(ImportError, match=r"no 'lodes' there; it has .*loads"):
        plugin("json:lodes")
    (tmp_path / "broken_plugin.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'no_such_dependency'$"):
        plugin("broken_plugin:f")  # the module is there: its own fault is shown as it is


def test_source_is_the_modules_text(tmp_path, monkeypatch):
    (tmp_path / "sourced_plugin.py").write_text("from functools import partial\nf = partial(print, 1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert source_of("sourced_plugin:f") == "from functools import partial\nf = partial(print, 1)\n"
    assert source_of("ppo") is None
    assert source_of("math:exp") is None  # built in: no text
    sys.modules.pop("sourced_plugin")


def test_the_text_is_that_of_the_code_that_runs(tmp_path, monkeypatch):
    """An edit under a running process changes neither; a reload, a new import and a module of that name elsewhere change both."""
    file = tmp_path / "a" / "edited_plugin.py"
    for folder, value in (("a", 1), ("b", 3)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "edited_plugin.py").write_text(f"f = {value}\n")
    monkeypatch.syspath_prepend(tmp_path / "a")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert plugin("edited_plugin:f") == 1
    file.write_text("f = 2  # edited\n")
    assert (plugin("edited_plugin:f"), source_of("edited_plugin:f")) == (1, "f = 1\n")
    importlib.reload(sys.modules["edited_plugin"])
    assert (plugin("edited_plugin:f"), source_of("edited_plugin:f")) == (2, "f = 2  # edited\n")
    monkeypatch.syspath_prepend(tmp_path / "b")
    assert source_of("edited_plugin:f") == "f = 2  # edited\n"  # it is read already
    del sys.modules["edited_plugin"]
    assert (plugin("edited_plugin:f"), source_of("edited_plugin:f")) == (3, "f = 3\n")
    sys.modules.pop("edited_plugin")


def test_a_module_that_hides_the_users_is_named():
    with pytest.raises(ImportError, match=r"'json:score': no 'score' there; it has .*loads.* \(the module is .*json.__init__.py\)"):
        plugin("json:score")
