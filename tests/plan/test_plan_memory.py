"""What a plan takes from the compiler, from a device's name and from the parts of a phase."""

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf.plan.compile import compiled
from jaxrlhf.plan.counts import counts_of
from jaxrlhf.plan.devices import DEVICES, device_of_kind
from jaxrlhf.plan.memory import GIB, Planned, advice
from jaxrlhf.plan.models import planned_models
from jaxrlhf.plan.phases import phases_of
from jaxrlhf.plan.planner import Phase, Planner, Program
from jaxrlhf.plan.training import sft_phase

PROGRAM = Program(arguments=0, fresh=0, temp=0, code=0, flops=0, traffic=0, sent=0, seconds=0)
HELD = {"policy": {"backbone": {"final_norm": {"scale": jax.ShapeDtypeStruct((64,), jnp.float32)}}}}


def test_remat_is_planned_as_accelerators_compile_it(tmp_path, tiny_config):
    """A CPU's compiler drops the barriers of model.remat, and with them all that it saves."""
    temps = {}
    for remat in ("none", "full"):
        config = tiny_config(tmp_path, model__remat=remat, model__shape__num_layers=3, data__limits__max_response_length=64)
        planner = Planner(config, planned_models(config, uses_encoder=False), counts_of(config), None)
        temps[remat] = compiled(sft_phase(planner), None).temp
    assert temps["full"] < 0.6 * temps["none"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40S", None),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
    ],
)
def test_a_device_that_is_like_another_is_not_taken_for_it(kind, name):
    assert device_of_kind(kind) is (None if name is None else DEVICES[name])


def tips(name, knobs, parts, config):
    phase = Phase("policy", name, None, (), HELD, (), 1, 1, 4, knobs)  # type: ignore[arg-type]
    return {tip.setting: tip.saves for tip in advice(Planned(phase, PROGRAM, parts), DEVICES["h100"], config, None)}


def test_advice_on_what_is_learned_and_what_is_frozen(tmp_path, tiny_config):
    """Adapters replace the policy's moments, not the critic's; the pass that reads the frozen models has one of them at a time."""
    config = tiny_config(tmp_path)
    learning = {"policy": 4.0 * GIB, "critic": 12.0 * GIB, "optimizer": 32.0 * GIB, "gradients": 16.0 * GIB}
    assert tips("update", ("lora.r",), learning, config) == {"lora.r 16": 12.0 * GIB}
    alone = {name: size for name, size in learning.items() if name != "critic"}
    assert tips("step", ("lora.r",), alone, config) == {"lora.r 16": 48.0 * GIB}
    frozen = learning | {"reference": 4.0 * GIB, "reward": 5.0 * GIB, "π_SFT": 3.0 * GIB}
    for name, saved in (("sample", 12.0 * GIB), ("update", 12.0 * GIB), ("score (from round 2 on)", 7.0 * GIB)):
        assert tips(name, ("model.offload_frozen",), frozen, config) == {"model.offload_frozen true": saved}


def test_no_advice_changes_the_training(tmp_path, tiny_config):
    """Every knob that is named is one of memory: a batch size only where the results do not depend on it."""
    config = tiny_config(tmp_path, method="ocrm")
    planner = Planner(config, planned_models(config, uses_encoder=False), counts_of(config), None)
    parts = {"policy": 400.0 * GIB, "reference": 1.0 * GIB, "reward": 1.0 * GIB, "activations": 100.0 * GIB, "batch": 1.0 * GIB}
    for phase in phases_of(planner):
        held = {name: 0.0 for name in phase.held}
        for tip in advice(Planned(phase, PROGRAM, held | parts), DEVICES["h100"], config, None):
            assert not tip.setting.startswith(("ppo.batch_size", "sft.batch_size", "reward.batch_size", "dpo.batch_size")), phase.title
