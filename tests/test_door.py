"""The public door: five names, resolved on first use."""

import subprocess
import sys

import pytest

import jaxrlhf

LOOK = """
import sys
import jaxrlhf
import jaxrlhf.losses
assert not {"flax", "transformers", "tokenizers"} & sys.modules.keys(), "the losses drag in the models"
from jaxrlhf import run
try:
    run("no_such_recipe.yaml")
except ValueError as error:
    assert "no recipe at no_such_recipe.yaml" in str(error)
else:
    raise AssertionError("a recipe that is not there was run")
import jaxrlhf.pipeline.run, jaxrlhf.storage.store
assert jaxrlhf.run is run
"""


def test_the_losses_alone_load_no_models_and_run_is_a_function():
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_name_of_the_door_is_there():
    assert jaxrlhf.__all__ == ["Loaded", "generate", "load", "run", "save"]
    assert all(callable(getattr(jaxrlhf, name)) for name in jaxrlhf.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'lod'"):
        jaxrlhf.lod  # noqa: B018
