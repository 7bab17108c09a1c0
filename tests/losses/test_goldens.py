"""The stored goldens are what their scripts make today, with torch."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden"


def leaves(tree, path=""):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, np.asarray(tree)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["preference_losses", "ppo_losses", "ocrm_weights"])
def test_the_script_makes_the_golden(name):
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"make_{name}.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    stored, made = dict(leaves(json.loads((GOLDEN / f"{name}.json").read_text()))), dict(leaves(script.compute()))
    assert stored.keys() == made.keys()
    for path, value in stored.items():
        np.testing.assert_allclose(made[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
