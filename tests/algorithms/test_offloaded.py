"""Frozen models that wait on the host: one at a time is brought over, and a round's policy has the same bits."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.algorithms.policy_updates import ppo_trainer
from jaxrlhf.algorithms.ppo import RoundModels, train_ppo
from jaxrlhf.algorithms.training import own_copy
from jaxrlhf.config import PPOConfig
from jaxrlhf.models import build_model, config_from_shape
from jaxrlhf.plugins import plugin
from jaxrlhf.sharding import host_memory
from jaxrlhf.steps.state import init_state
from jaxrlhf.types import PromptBatch

DECODER, _ = config_from_shape({"family": "llama", "hidden_size": 16, "num_layers": 1, "num_heads": 2}, 32, max_positions=16)
LM, SCALAR = build_model(DECODER), build_model(DECODER, head="scalar")
CONFIG = PPOConfig(batch_size=8, total_episodes=16, num_ppo_epochs=1, response_length=4, learning_rate=1e-2, forward_batch_size=4)


@pytest.fixture(scope="module")
def rounds():
    """Two updates against an ensemble and with π_SFT beside the reference, frozen models on the device and away: for each
    (the last state, metrics of both, how often the update had been compiled after either, models brought over)."""
    how = {"eos_ids": (1,), "pad_id": 0, "vocab_size": None, "spread_coef": 1.0}
    trainer = ppo_trainer(LM, SCALAR, CONFIG, plugin, **how)
    policy, reference, sft = (LM.init(jax.random.key(n)) for n in range(3))
    rewards = tuple(SCALAR.init(jax.random.key(n)) for n in (3, 4))
    prompts = [
        PromptBatch(np.full((8, 3), 5 + n, np.int32), np.ones((8, 3), bool), np.arange(8) < 7, np.arange(8, dtype=np.int32))  # type: ignore[arg-type]
        for n in range(2)
    ]

    def take(away: bool):
        place = sharding.offload if away else lambda tree: tree
        fixed = RoundModels(place(reference), tuple(map(place, rewards)), (0.1, -0.2), place(sft), offloaded=away)
        controller = {"kl_coef": jnp.float32(0.05), "value_bias": jnp.float32(0.1)}
        state = init_state(own_copy({"policy": policy, "critic": rewards[0]}), trainer.optimizer, controller)
        brought: list[list[weakref.ref]] = []

        def bring(tree, original=sharding.to_device):
            assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)} == {host_memory.HOST}
            assert not any(old() for before in brought for old in before), "an earlier model is still on the device"
            made = original(tree)
            brought.append([weakref.ref(leaf) for leaf in jax.tree.leaves(made)])
            return made

        compiled, last = [], state
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharding, "to_device", bring)
            for new, metrics in train_ppo(trainer, state, fixed, iter(prompts), key=jax.random.key(9)):
                compiled.append((metrics, trainer_cache(trainer)))
                last = new
        return last, [metrics for metrics, _ in compiled], [size for _, size in compiled], len(brought)

    return take(False), take(True)


def trainer_cache(trainer) -> int:
    """Programs that the update has been compiled to."""
    return trainer.update._cache_size()


def test_the_policy_has_the_same_bits(rounds):
    """Each of four models is brought over in each of two updates, when none of the others is there any more."""
    (state, metrics, _, none), (away, away_metrics, sizes, brought) = rounds
    assert (none, brought) == (0, 8)
    jax.tree.map(np.testing.assert_array_equal, state.params, away.params)
    assert sizes[0] == sizes[1], "the second update was compiled anew"
    for one, other in zip(metrics, away_metrics, strict=True):
        names = {name for name in one if not name.startswith("time/")}
        assert names == {name for name in other if not name.startswith("time/")} and {"kl/sft", "reward/ensemble_spread"} <= names
        for name in names:  # means over the batch, in programs of their own: the order of a sum
            np.testing.assert_allclose(other[name], one[name], rtol=2e-6, atol=1e-7, err_msg=name)
    assert abs(float(metrics[1]["kl/sft"]) - float(metrics[1]["rollout/kl"])) > 1e-3  # four models that differ


def test_offloaded_arrays_keep_their_layout():
    mesh = sharding.make_mesh(1, 2, 2)
    tree = sharding.place({"q": {"kernel": np.arange(32, dtype=np.float32).reshape(8, 4)}}, mesh)
    away = sharding.offload(tree)
    back = sharding.to_device(away)
    (one,), (other,), (third,) = map(jax.tree.leaves, (tree, away, back))
    assert [array.sharding.memory_kind for array in (one, other, third)] == ["device", "pinned_host", "device"]
    assert one.sharding.spec == other.sharding.spec and third.sharding == one.sharding
    np.testing.assert_array_equal(one, third)
    assert jax.tree.leaves(sharding.to_device(back))[0] is third


def test_a_device_without_pinned_memory_is_named(monkeypatch):
    monkeypatch.setattr(host_memory, "HOST", "moon")
    with pytest.raises(ValueError, match=r"has no moon memory, only .*pinned_host.*: model\.offload_frozen cannot work here"):
        sharding.check_offload(None)
