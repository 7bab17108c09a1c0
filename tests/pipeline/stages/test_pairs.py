"""What the stages that make data depend on."""

from jaxrlhf.pipeline.stages.reward_update import read_by_plugins


def test_the_knobs_of_memory_change_no_update_of_your_own(tmp_path, tiny_config):
    plain = read_by_plugins(tiny_config(tmp_path))
    for knob in ({"model__remat": "full"}, {"model__logits_chunk": 3}, {"model__offload_frozen": True}, {"lora__alpha": 2.0},
                 {"guards": {"kl": 1.0, "stop": "all"}}):  # fmt: skip
        assert read_by_plugins(tiny_config(tmp_path, **knob)) == plain, knob
    for change in ({"model__dtype": "bfloat16"}, {"lora__r": 2}, {"seed": 7}):
        assert read_by_plugins(tiny_config(tmp_path, **change)) != plain, change
