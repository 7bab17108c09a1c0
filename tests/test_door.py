"""The public door: five names, resolved on first use."""

import importlib
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


PUBLIC = {
    "jaxrlhf.models.hub": "load save Loaded initialise rehead read_config read_tokenizer eos_ids head_of reward_bias with_reward_bias",
    "jaxrlhf.rollouts.generate": "generate",
    "jaxrlhf.recipe": "load_config",
    "jaxrlhf.config": "Config DataConfig PPOConfig RewardConfig SFTConfig DPOConfig WeightsConfig FilterConfig LoraConfig ToyTask",
    "jaxrlhf.types": "PairBatch PromptBatch TextBatch Completion Rollout TokenStats TrainState PairOutputs PairLoss PolicyLoss Model",
    "jaxrlhf.losses": "PAIR_LOSSES POLICY_LOSSES bradley_terry_loss dpo_loss importance_weights ppo_policy_loss relative_log_ratio",
    "jaxrlhf.sharding": "step Replicas make_mesh place place_batch",
    "jaxrlhf.algorithms.rounds": "METHODS Method Round",
    "jaxrlhf.offline.embed": "embed_texts",
    "jaxrlhf.offline.logprobs": "pair_logps",
    "jaxrlhf.pipeline.stages.lineage": "lineage",
    "jaxrlhf.distributed": "start finish agree barrier is_leader",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_documented_names_are_where_the_documentation_says(module):
    found = importlib.import_module(module)
    assert [name for name in PUBLIC[module].split() if not hasattr(found, name)] == []
