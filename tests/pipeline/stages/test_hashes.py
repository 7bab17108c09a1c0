"""What a stage depends on: a golden of every row's hashes; memory and the devices are no part of it, adapters are the policy's alone."""

import json
from pathlib import Path

import pytest
from make_stage_hashes import hashes_of, stage_hashes


@pytest.fixture
def hashes(tmp_path, tiny_config):
    """The hash of every stage of a first round, of which none is built."""
    return lambda **changes: hashes_of(tiny_config(tmp_path, **changes), tmp_path, until="ppo")


def test_the_hashes_of_every_row_are_what_they_were(tmp_path):
    """A run of an earlier version goes on only where these are the same: a change is meant and in the changelog, or it is a fault."""
    golden = json.loads((Path(__file__).parents[2] / "golden" / "stage_hashes.json").read_text())
    assert stage_hashes(tmp_path) == golden


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
        {"guards": {"kl": 1.0, "stop": "all"}},
        {"lora": {"alpha": 2.0, "target_modules": ["q"]}},  # without a rank there are none
    ):
        assert hashes(**knob) == plain, knob


def test_adapters_are_part_of_the_policy_alone(hashes):
    plain, adapted = hashes(), hashes(lora={"r": 2})
    assert {name for name in plain if plain[name] != adapted[name]} == {"r1-policy"}
    for other in ({"r": 3}, {"r": 2, "alpha": 8.0}, {"r": 2, "target_modules": ["q", "v"]}):
        assert hashes(lora=other)["r1-policy"] not in (plain["r1-policy"], adapted["r1-policy"]), other
    assert hashes(lora={"r": 2, "target_modules": ["down", "gate", "up", "out", "v", "k", "q"]}) == adapted  # the same set
