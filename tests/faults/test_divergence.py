"""Every training that diverges, in both dtypes, on one device, a mesh and under pmap: noticed at the step, and nothing of it stored."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrlhf import sharding
from jaxrlhf.pipeline.run import run
from jaxrlhf.pipeline.stages.divergence import Diverged
from jaxrlhf.sharding import mesh

# A loss and a reward update of a user's own: the loss is that of round 1 until the update has marked a pair.
POISON = """
from dataclasses import replace
import jax.numpy as jnp
import numpy as np
from jaxrlhf.losses import bradley_terry_loss
from jaxrlhf.types import PairLoss

def loss(outputs, batch, *, total=None):
    value = bradley_terry_loss(outputs.chosen_B, outputs.rejected_B, batch.weights_B, row_mask=batch.row_mask_B, total=total)
    return value + jnp.where(batch.columns["marked"] > 0, jnp.nan, 0.0).sum(), {}

marked = PairLoss("scalar", ("marked",), loss, (0.0,))

def mark(context, pairs):
    column = (np.arange(len(pairs.rows)) == 0).astype(np.float32)
    return pairs._replace(tokens=replace(pairs.tokens, columns={**pairs.tokens.columns, "marked": column})), np.ones(len(pairs.rows))
"""
FAR = {"learning_rate": 1e30, "lr_scheduler_type": "constant"}  # finite: the first step moves so far that the second is not
# family → (title of the training, its step, until, what of the recipe changes)
FAMILIES = {
    "sft": ("sft", 2, "sft", {"sft": {"batch_size": 32, **FAR}}),
    "reward": ("round 1 reward", 2, "reward", {"reward": {"batch_size": 16, "eval_batch_size": 32, "num_reference_rows": 32, **FAR}}),
    "ppo": ("round 1 policy", 2, "ppo", {"ppo__learning_rate": 1e30}),
    "rloo": ("round 1 policy", 2, "ppo", {"ppo__learning_rate": 1e30, "ppo__rloo_k": 2, "row": {"policy_update": "rloo"}}),
    "dpo": ("round 1 policy", 2, None, {"method": "dpo", "dpo": {"batch_size": 16, **FAR}}),
    "refit": (
        "round 2 reward",
        None,
        None,
        {"method": "retrain", "row": {"reward_update": "poison:mark"}, "reward__loss": "poison:marked"},
    ),
}


@pytest.fixture(autouse=True)
def poison(tmp_path, monkeypatch):
    (tmp_path / "poison.py").write_text(POISON)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("where", ["one", "mesh", "pmap"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_noticed_at_the_step(family, dtype, where, tmp_path, tiny_config, monkeypatch):
    devices = 1 if where == "one" else 4
    make = sharding.make_mesh
    for module in (mesh, sharding):
        monkeypatch.setattr(module, "make_mesh", lambda *axes: make(*axes, devices=jax.devices()[:devices]))
    title, step, until, changes = FAMILIES[family]
    how = changes | {"model__dtype": dtype, "mesh": {"engine": "pmap" if where == "pmap" else "jit"}, "checkpoint": {"every": 1, "keep": 2}}
    with pytest.raises(Diverged) as failed:
        run(tiny_config(tmp_path, **how), until=until)
    assert str(failed.value).startswith(f"{title}, step {step or ''}"), failed.value
    partial = next((tmp_path / ".stages").glob(".partial-*"))
    said = json.loads(next(partial.glob("nonfinite-step-*.json")).read_text())
    assert len({row["id"] for row in said["rows"]}) > 1 and said["metrics"]["nonfinite"] >= 1
    assert not (partial / "model.safetensors").exists()
    kept = sorted(int(path.name) for path in (partial / "checkpoint").iterdir() if path.name.isdigit())
    assert kept == ([said["step"] - 1] if said["step"] > 1 else [])
    stored = list((tmp_path / ".stages").glob("[!.]*/model.safetensors"))
    assert all(np.isfinite(leaf).all() for file in stored for leaf in load_file(file).values())
