"""`module:attribute`: what it finds, and what it says where there is nothing."""

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
