"""A run whose policy learns by adapters: one copy of base and reference, small checkpoints, an ordinary model at the end."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf import sharding
from jaxrlhf.models.lora import TARGETS
from jaxrlhf.monitoring.metrics_file import read
from jaxrlhf.pipeline.checks import check
from jaxrlhf.pipeline.run import run
from jaxrlhf.pipeline.stages import policy as stage
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.recipe import ConfigError
from jaxrlhf.sharding import host_memory
from jaxrlhf.storage.record import read_record

pytestmark = pytest.mark.usefixtures("one_device")

LORA = {"r": 2, "alpha": 4.0}
ARMS = {"ppo": {}, "dpo": {"method": "dpo", "dpo.batch_size": 16, "dpo.learning_rate": 1e-2, "dpo.beta": 0.5}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_config):
    """(run folder, {"fixed": the round's models, "states": the states that were trained}) of PPO and DPO with adapters."""
    seen: dict = {"fixed": [], "states": [], "bases": []}
    with pytest.MonkeyPatch.context() as patch:
        train_ppo, train, split = stage.train_ppo, RunContext.train, stage.split_params

        def watched(trainer, state, fixed, *given, **how):
            seen["fixed"].append(fixed)
            return train_ppo(trainer, state, fixed, *given, **how)

        def trained(self, folder, name, state, *given, **how):
            state = train(self, folder, name, state, *given, **how)
            seen["states"].append((name, jax.tree.map(np.asarray, state)))
            return state

        def halved(setting, policy, key):
            seen["bases"].append(policy.params)
            return split(setting, policy, key)

        patch.setattr(stage, "train_ppo", watched)
        patch.setattr(stage, "split_params", halved)
        patch.setattr(RunContext, "train", trained)
        config = tiny_config(
            tmp_path_factory.mktemp("runs"),
            rounds=1,
            lora=LORA,
            model__offload_frozen=True,
            ppo__learning_rate=3e-2,
            ppo__weight_decay=0.0,
            arms=ARMS,
        )
        return run(config), seen


def stages(folder: Path) -> dict[str, Path]:
    return {link.name[3:]: link.resolve() for link in sorted((folder / "stages").iterdir())}


def names(tree) -> set[str]:
    return {sharding.path_of(path).rsplit("/", 1)[-1] for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_reference_is_the_base_and_no_copy_of_it(finished):
    _, seen = finished
    (fixed,), (base, *_) = seen["fixed"], seen["bases"]
    under = dict((sharding.path_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(fixed.base["policy"]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(fixed.reference):
        assert leaf is under[sharding.path_of(path)]
    kinds = [{leaf.sharding.memory_kind for leaf in jax.tree.leaves(part)} for part in (fixed.reference, fixed.reward)]
    assert kinds == [{"device"}, {host_memory.HOST}] and fixed.offloaded  # the base is needed all the time, the reward model in its turn
    assert jax.tree.leaves(fixed.reference)[0] is jax.tree.leaves(base)[0] and fixed.sft is None


def test_state_and_checkpoint_hold_adapters_alone(finished):
    _, seen = finished
    ppo, dpo = (state for name, state in seen["states"] if name == "policy")
    assert names(ppo.params["policy"]) == names(dpo.params) == {"lora_a", "lora_b"}
    assert "kernel" in names(ppo.params["critic"])
    assert {leaf.shape for leaf in jax.tree.leaves(dpo.opt_state)} == {leaf.shape for leaf in jax.tree.leaves(dpo.params)} | {()}


def test_a_finished_round_is_an_ordinary_model_that_moved(finished):
    folder, seen = finished
    states = [state for name, state in seen["states"] if name == "policy"]
    for arm, state in zip(ARMS, states, strict=True):
        found = stages(folder / arm)
        before, after = (jaxrlhf.load(found[name]).params for name in ("sft", "r1-policy"))
        assert jax.tree.structure(after) == jax.tree.structure(before)
        learned = state.params["policy"] if arm == "ppo" else state.params
        q, parts = ("backbone", "layers_0", "attention", "q"), []
        for tree in (before, after, learned):
            for name in q:
                tree = tree[name]
            parts.append(tree)
        update = LORA["alpha"] / LORA["r"] * parts[2]["lora_a"] @ parts[2]["lora_b"]
        assert np.abs(update).max() > 1e-4
        np.testing.assert_allclose(parts[1]["kernel"] - parts[0]["kernel"], update, atol=1e-6)
        np.testing.assert_array_equal(after["backbone"]["embed"]["embedding"], before["backbone"]["embed"]["embedding"])
        assert read_record(found["r1-policy"])["config"]["lora"] == LORA | {"targets": sorted(TARGETS)}
        assert not any("lora" in read_record(found[name])["config"] for name in ("sft", "pairs", "r1-evaluation"))


def test_training_starts_at_the_reference(finished):
    folder, _ = finished
    first = {arm: next(line for line in read(folder / arm / "metrics.jsonl") if line["stage"] == "policy") for arm in ARMS}
    assert abs(first["ppo"]["rollout/kl"]) < 1e-5 and first["ppo"]["rollout/decode_mismatch"] < 1e-4
    assert first["ppo"]["ppo/approxkl_first"] < 1e-8 and first["ppo"]["grad_norm"] > 0
    assert first["dpo"]["loss/pair"] == pytest.approx(np.log(2), abs=2e-6)
    for arm in ARMS:
        assert abs(json.loads((folder / arm / "summary.json").read_text())["rounds"][-1]["kl_sft"]) > 1e-5


def test_moments_of_merged_adapters_are_not_carried(tmp_path, tiny_config):
    with pytest.raises(ConfigError, match=r"row\.restart_optimizer is false and lora\.r 2"):
        check(tiny_config(tmp_path, lora=LORA, row={"restart_optimizer": False}))
    with pytest.raises(ConfigError, match=r"lora\.r is -1; give a positive rank"):
        tiny_config(tmp_path, lora={"r": -1})
    with pytest.raises(ConfigError, match=r"lora\.target_modules"):
        tiny_config(tmp_path, lora={"r": 1, "target_modules": ["head"]})
