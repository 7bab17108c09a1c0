"""The stored goldens are what their scripts make today, with torch; and the published OCRM loss, which belongs to no one loss alone."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.losses import bradley_terry_loss, importance_weights, relative_log_ratio

GOLDEN = Path(__file__).parents[1] / "golden"


def leaves(tree, path=""):
    if isinstance(tree, dict) or (isinstance(tree, list) and tree and isinstance(tree[0], dict)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
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
        if value.dtype.kind in "US":
            assert made[path] == value, path
        else:
            np.testing.assert_allclose(made[path], value, rtol=1e-5, atol=1e-6, err_msg=path)


def test_the_published_ocrm_loss_where_it_does_not_underflow(golden):
    """Weights, weighted loss and gradients of the public code's float32 formula, by our exact one: up to −47 nats they are one."""
    data = golden("ocrm_weights")["pairs"]
    policy, reference, scores = ([jnp.array(side) for side in data[name]] for name in ("policy", "reference", "scores"))
    assert len(data["cases"]) == 8 and {case["alpha"] for case in data["cases"]} == {0.0, 0.1}
    for case in data["cases"]:
        ratios = [relative_log_ratio(p, r, alpha=case["alpha"]) for p, r in zip(policy, reference, strict=True)]
        weights = importance_weights(*ratios, eta=case["eta"], normalize=case["normalize"])
        np.testing.assert_allclose(weights, case["weights"], rtol=2e-5)
        loss, gradients = jax.value_and_grad(lambda s, w=weights: bradley_terry_loss(s[0], s[1], w))(scores)
        assert float(loss) == pytest.approx(case["loss"], rel=2e-5)
        np.testing.assert_allclose(gradients, case["gradients"], rtol=1e-4, atol=1e-7)
