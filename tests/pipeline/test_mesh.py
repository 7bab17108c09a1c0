"""A whole run on a mesh of four devices, with what is awkward: PAD is EOS, and evaluation batches that four does not divide."""

import json
import math

import pytest

import jaxrlhf
from jaxrlhf import sharding
from jaxrlhf.data.toy import EOS, toy_tokenizer
from jaxrlhf.monitoring.metrics_file import read
from jaxrlhf.pipeline.run import run


@pytest.mark.parametrize("engine", ["jit", "pmap"])
def test_a_run_on_four_devices_with_pad_equal_to_eos(tmp_path, tiny_config, engine):
    tokenizer = toy_tokenizer()
    tokenizer.pad_token = EOS
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    folder = run(
        tiny_config(
            tmp_path, rounds=1, tokenizer__source=str(tmp_path / "tokenizer"), evaluation={"num_prompts": 11, "batch_size": 6},
            pairs__batch_size=10, pairs__num_pairs=30, reward__eval_batch_size=7, mesh__engine=engine,
        )
    )  # fmt: skip
    row = json.loads((folder / "summary.json").read_text())["rounds"][1]
    assert all(math.isfinite(row[name]) for name in ("gold", "proxy", "kl_sft", "win_rate", "reward_accuracy"))
    lines = [line for line in read(folder / "metrics.jsonl") if line["stage"] == "policy"]
    assert lines[0]["ppo/approxkl_first"] < 1e-6 and abs(lines[0]["rollout/kl"]) < 1e-5 and lines[0]["rollout/decode_mismatch"] < 1e-4
    reward = jaxrlhf.load(folder / "stages" / "04-r1-reward", head="scalar")
    # transformers finds a text's end by PAD, so the reward model has a pad token of its own, in a row of its own.
    assert reward.tokenizer.pad_token_id != reward.tokenizer.eos_token_id
    assert reward.params["backbone"]["embed"]["embedding"].shape[0] == len(reward.tokenizer)


def test_pmap_holds_whole_models_only(tmp_path, tiny_config):
    with pytest.raises(ValueError, match=r"must be 1; set them, or mesh\.engine jit"):
        run(tiny_config(tmp_path, mesh={"engine": "pmap", "fsdp": 2}))
    assert not (tmp_path / "tiny").exists()


def test_microbatches_that_do_not_divide_are_refused_at_once(tmp_path, tiny_config):
    with pytest.raises(
        ValueError, match=r"sft\.batch_size 32 does not divide over 4 data shards × 16 minibatches or microbatches; try 64\."
    ):
        run(tiny_config(tmp_path, sft__gradient_accumulation_steps=16))


def test_a_batch_that_does_not_divide_is_refused_at_once(tmp_path, tiny_config):
    with pytest.raises(ValueError, match=r"ppo.batch_size 18 does not divide over 4 data shards; try 16."):
        run(tiny_config(tmp_path, ppo__batch_size=18))
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(("rows", "batch_size", "expected"), [(11, 6, 8), (30, 10, 12), (3, 128, 4), (500, 250, 252), (8, 8, 8), (0, 5, 4)])
def test_passes_without_training_round_up(rows, batch_size, expected):
    assert sharding.rows_at_once(rows, batch_size, sharding.make_mesh(4)) == expected
    assert sharding.rows_at_once(rows, batch_size, None) == min(batch_size, max(rows, 1))
