"""What a stage depends on: the knobs of memory and the devices are no part of it, and adapters are of the policy's alone."""

from pathlib import Path

import pytest

from jaxrlhf.run.run import walk_through
from jaxrlhf.run.setting import Setting
from jaxrlhf.run.stages import Done
from jaxrlhf.runlog import RunLog


@pytest.fixture
def hashes(tmp_path, tiny_config, monkeypatch):
    """The hash of every stage of a first round, of which none is built."""

    def of(**changes) -> dict[str, str]:
        found: dict[str, str] = {}

        def build(self, stage, fn, **how):
            found[stage.name] = stage.hash
            return Done(stage.name, Path("nowhere"), stage.hash, {"result": {}})

        monkeypatch.setattr(Setting, "build", build)
        config = tiny_config(tmp_path, **changes)
        walk_through(Setting(config, None, tmp_path, RunLog(None), None), "ppo")  # type: ignore[arg-type]
        return found

    return of


def test_memory_and_devices_change_no_stage(hashes):
    plain = hashes()
    assert list(plain) == ["tokenizer", "sft", "pairs", "r1-reward", "r1-policy"]
    for knob in (
        {"model__remat": "full"},
        {"model__logits_chunk": 3},
        {"model__offload_frozen": True},
        {"ppo__generation_batch_size": 4},
        {"mesh": {"engine": "pmap"}},
        {"mesh": {"fsdp": 2}},
        {"log": {"recompiles": "off"}},
        {"lora": {"alpha": 2.0, "target_modules": ["q"]}},  # without a rank there are none
    ):
        assert hashes(**knob) == plain, knob


def test_adapters_are_part_of_the_policy_alone(hashes):
    plain, adapted = hashes(), hashes(lora={"r": 2})
    assert {name for name in plain if plain[name] != adapted[name]} == {"r1-policy"}
    for other in ({"r": 3}, {"r": 2, "alpha": 8.0}, {"r": 2, "target_modules": ["q", "v"]}):
        assert hashes(lora=other)["r1-policy"] not in (plain["r1-policy"], adapted["r1-policy"]), other
    assert hashes(lora={"r": 2, "target_modules": ["down", "gate", "up", "out", "v", "k", "q"]}) == adapted  # the same set
