"""One device, pmap and four meshes of eight devices come to the same: parameters after three steps of every stage, texts and scores."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("every_way.py")
WAYS = ("pmap", "8,1,1", "2,4,1", "2,2,2", "1,1,8")
ROWS_ALONE = ("pmap", "8,1,1")  # every device has the whole model

# Leaves that no loss of the stage can move, with why. They must stay where they were, in every way; all others have moved.
STILL = {
    # A constant added to every score cancels between chosen and rejected.
    "reward": ("backbone/final_norm/bias",),
    # A constant added to every key moves all scores of a query alike, which softmax does not see (no rotary positions in between).
    "reward ppo": ("k/bias",),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{"WAY|STAGE/OPTIMIZER/LEAF": array}, and "start/STAGE/LEAF"."""
    file = tmp_path_factory.mktemp("ways") / "found.npz"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(SCRIPT), str(file)], env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(file) as arrays:
        return dict(arrays)


def leaves(found, way, stage, optimizer):
    """{leaf: (end, start)} in float64."""
    prefix = f"{way}|{stage}/{optimizer}/"
    names = [key.removeprefix(prefix) for key in found if key.startswith(prefix)]
    assert names
    return {name: (found[prefix + name].astype(float), found[f"start/{stage}/{name}"].astype(float)) for name in names}


def norm(arrays):
    return float(np.sqrt(sum(np.sum(np.square(array)) for array in arrays)))


def is_still(stage, leaf):
    if stage == "ppo" and not leaf.startswith("critic/"):
        return False
    return any(stage in stages.split() and leaf.endswith(names) for stages, names in STILL.items())


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
@pytest.mark.parametrize("way", WAYS)
def test_three_steps_of_gradient_descent_are_the_same(found, way, stage):
    """‖θ_a − θ_b‖ ≤ 1e-4 ‖θ_b − θ_0‖ for every leaf. One whose gradient is zero by construction moves by rounding alone, in every way."""
    one, other = leaves(found, "one", stage, "sgd"), leaves(found, way, stage, "sgd")
    moved = norm(end - start for end, start in one.values())
    for name, (end, start) in one.items():
        if is_still(stage, name):
            assert max(norm([end - start]), norm([other[name][0] - start])) < 1e-5 * moved, name
        else:
            assert norm([end - start]) > 1e-3 * norm([start]), f"{name} has not moved enough to tell"
            assert norm([other[name][0] - end]) <= 1e-4 * norm([end - start]), name


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
@pytest.mark.parametrize("way", WAYS)
def test_three_steps_of_adamw_are_the_same(found, way, stage):
    one, other = leaves(found, "one", stage, "adamw"), leaves(found, way, stage, "adamw")
    assert norm(end - start for end, start in one.values()) > 1e-3 * norm(end for end, _ in one.values())
    assert norm(other[name][0] - one[name][0] for name in one) <= 1e-5 * norm(end for end, _ in one.values())


@pytest.mark.parametrize("way", WAYS)
def test_texts_at_equal_weights(found, way):
    same = np.logical_and(found[f"{way}|tokens_BT"] == found["one|tokens_BT"], found[f"{way}|mask_BT"] == found["one|mask_BT"])
    lengths = found["one|mask_BT"].sum(axis=-1)
    assert lengths.max() == same.shape[-1] and len(np.unique(lengths)) > 4  # ragged, and some without an end
    assert same.all() if way in ROWS_ALONE else same.mean() >= 0.999


@pytest.mark.parametrize("name", ["logps", "scores", "vectors", "logp_BT"])
@pytest.mark.parametrize("way", WAYS)
def test_passes_without_training(found, way, name):
    expected = found[f"one|{name}"]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found[f"{way}|{name}"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_rollout_and_its_metrics_are_of_the_global_batch(found, way):
    """Whitening, means and the adaptive KL coefficient included."""
    names = [key.removeprefix("one|") for key in found if key.startswith(("one|rollout/", "one|metrics/", "one|ppo/kl_coef"))]
    assert len(names) > 20
    for name in names:
        expected = found[f"one|{name}"].astype(float)
        np.testing.assert_allclose(found[f"{way}|{name}"].astype(float), expected, rtol=1e-5, atol=1e-5, err_msg=name)
