"""The public door: five names, resolved on first use, whatever was imported before."""

import subprocess
import sys

import pytest

import jaxrlhf

LOOK = """
import sys
import jaxrlhf
import jaxrlhf.losses
assert not {"flax", "transformers", "tokenizers"} & sys.modules.keys(), "the losses drag in the models"
first = jaxrlhf.run
import jaxrlhf.run.run, jaxrlhf.run.stages
for run in (first, jaxrlhf.run):
    assert callable(run)
    try:
        run("no_such_recipe.yaml")
    except ValueError as error:
        assert "no recipe at no_such_recipe.yaml" in str(error)
    else:
        raise AssertionError("a recipe that is not there was run")
from jaxrlhf import run
assert callable(run) and jaxrlhf.run.stages.Store
"""


def test_run_can_be_called_before_and_after_its_package_is_imported():
    """The package jaxrlhf.run and the function share a name: importing the one must not take the other away."""
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_name_of_the_door_is_there():
    assert jaxrlhf.__all__ == ["Loaded", "generate", "load", "run", "save"]
    assert all(callable(getattr(jaxrlhf, name)) for name in jaxrlhf.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'lod'"):
        jaxrlhf.lod  # noqa: B018
