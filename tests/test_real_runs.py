"""Whole runs on real preference rows and with a real pretrained model, a few steps each. Skipped where JAXRLHF_DATA is not set."""

import gzip
import json
import math

import jax
import numpy as np
import pytest

from jaxrlhf.data.pairs import read_demonstrations
from jaxrlhf.data.tables import read_pair_table
from jaxrlhf.models.hub import load
from jaxrlhf.pipeline.inputs import held_out_of
from jaxrlhf.pipeline.loop import HEURISTIC
from jaxrlhf.pipeline.run import run
from jaxrlhf.pipeline.table import findings, read_summaries
from jaxrlhf.recipe import from_mapping, load_config
from jaxrlhf.rollouts.texts import generate_texts

STEPS = {
    "sft": {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3},
    "reward": {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3, "num_reference_rows": 8, "eval_batch_size": 8},
    "ppo": {"total_episodes": 16, "batch_size": 8, "num_ppo_epochs": 1, "response_length": 12, "learning_rate": 1e-3},
    "weights": {"batch_size": 8},
    "evaluation": {"num_prompts": 8, "batch_size": 8},
    "log": {"tensorboard": False},
}


def rows_of(path):
    """{line number: row} of a .jsonl.gz, read without the library."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return {number: json.loads(line) for number, line in enumerate(file, start=1)}


def listed(stage, name):
    """{source: reason} of a list of dropped rows."""
    return {row["source"]: row["reason"] for row in map(json.loads, (stage / f"dropped-{name}.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def hh(real_data, tmp_path_factory):
    """(config, run folder, what it printed, files): two rounds of OCRM on HH-RLHF rows in their native form, edge cases first."""
    files = [str(real_data / "hh_helpful" / "raw" / f"{name}.jsonl.gz") for name in ("edge_cases", "train")]
    config = from_mapping(
        {
            "name": "hh",
            "method": "ocrm",
            "rounds": 2,
            "output": str(tmp_path_factory.mktemp("runs")),
            "data": {
                "train": files,
                "max_pairs": 60,
                "valid_fraction": 0.2,
                "limits": {"max_prompt_length": 96, "max_response_length": 12},
            },
            "model": {"shape": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}},
            "tokenizer": {"vocab_size": 512},
            **STEPS,
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        from jaxrlhf.monitoring.runlog import RunLog

        note = RunLog.note
        patch.setattr(RunLog, "note", lambda self, text: (said.append(text), note(self, text))[1])
        folder = run(config)
    return config, folder, said, files


def test_run_folder_of_real_rows(hh):
    config, folder, _, _ = hh
    assert load_config(folder / "config.yaml") == config
    names = [path.name for path in sorted((folder / "stages").iterdir())]
    first, later = ["tokenizer", "sft", "pairs", "sft-evaluation"], ["r2-update", "r2-reward", "r2-policy", "r2-evaluation"]
    order = [*first, "r1-reward", "r1-policy", "r1-evaluation", *later]
    assert names == [f"{number:02d}-{name}" for number, name in enumerate(order)]
    for name in names:
        record = json.loads((folder / "stages" / name / "stage.json").read_text())
        assert record["finished"] and record["name"] == name[3:]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {(step["stage"], step["round"]) for step in steps} >= {("sft", None), ("reward", 1), ("reward", 2), ("policy", 1), ("policy", 2)}
    assert all(math.isfinite(value) for step in steps for value in step.values() if isinstance(value, float))
    for stage in ("01-sft", "04-r1-reward", "05-r1-policy"):  # a shared stage brings its metrics along
        assert (folder / "stages" / stage / "metrics.jsonl").stat().st_size > 0


def test_summary_of_real_rows(hh):
    """No gold on real pairs: gold and win rates are null, the proxy is not; the weights are called a heuristic, once in every place."""
    _, folder, said, _ = hh
    summary = json.loads((folder / "summary.json").read_text())
    rows = summary["rounds"]
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert all(row["gold"] is None and row["win_rate"] is None and row["reward_accuracy"] is None for row in rows)
    assert rows[0]["kl_sft"] == 0 and all(math.isfinite(row[name]) for row in rows[1:] for name in ("proxy", "proxy_start", "kl_sft"))
    assert all(0 <= row["reward_accuracy_valid"] <= 1 for row in rows[1:])
    pairs = json.loads((folder / "stages" / "02-pairs" / "stage.json").read_text())["result"]
    assert [row["ess"] is None for row in rows] == [True, True, False] and 0 < rows[2]["ess"] <= pairs["train"] + 1e-3
    note, temperature = sorted(summary["notes"], key=lambda note: not note.startswith(HEURISTIC))
    assert "evaluation.temperature 1, and KL of a rollout that at ppo.temperature 0.7" in temperature
    assert note.startswith(HEURISTIC) and "not sampled from this run's SFT policy" in note
    assert findings(read_summaries(folder)).count(note) == 1
    assert sum(HEURISTIC in text for text in said) == 1


def test_every_dropped_row_is_named(hh):
    """File and line of each row that did not come through; the data say themselves which of the edge cases cannot be used."""
    config, folder, _, files = hh
    edge, train = (rows_of(path) for path in files)
    empty = {f"{files[0]}:{number}" for number, row in edge.items() if row["why"] == ["empty response"]}
    assert empty and len(empty) < len(edge)
    sft, pairs = folder / "stages" / "01-sft", folder / "stages" / "02-pairs"
    for stage, name in ((sft, "demonstrations-read"), (pairs, "train-read")):
        dropped = listed(stage, name)
        assert {source for source in dropped if source.startswith(files[0])} == empty
        assert {dropped[source] for source in empty} <= {"empty response: chosen", "empty response: rejected"}
    result = json.loads((sft / "stage.json").read_text())["result"]
    held = {row.prompt for row in held_out_of(config)}
    read, cut = listed(sft, "demonstrations-read"), listed(sft, "demonstrations-tokenised")
    left_out = sum(row.prompt in held for row in read_demonstrations(files)[0])
    assert held and result["rows"] + len(read) + len(cut) + left_out == len(edge) + len(train)
    assert all(reason.startswith("prompt too long: ") for reason in cut.values()) and read.keys().isdisjoint(cut)
    assert not held & {row.prompt for row in read_pair_table(pairs / "train.parquet")[0]}
    for prompts in ("05-r1-policy", "09-r2-policy"):
        assert all(reason.startswith("prompt too long: ") for reason in listed(folder / "stages" / prompts, "prompts-tokenised").values())


def test_a_pretrained_llama_goes_through_every_stage(real_data, tmp_path):
    """stories260K with its own tokenizer (BOS 1, EOS 2): loaded, fitted, scored, improved, exported, sampled from."""
    source = real_data / "models" / "stories260K"
    config = from_mapping(
        {
            "name": "stories",
            "method": "ppo",
            "rounds": 1,
            "output": str(tmp_path),
            "data": {
                "train": str(real_data / "hh_helpful" / "train.jsonl.gz"),
                "valid": str(real_data / "hh_helpful" / "valid.jsonl.gz"),
                "max_pairs": 40,
                "limits": {"max_prompt_length": 48, "max_response_length": 12, "long_prompt": "truncate"},
            },
            "model": {"source": str(source)},
            **STEPS,
        }
    )
    folder = run(config)
    stages = {path.name[3:]: path for path in (folder / "stages").iterdir()}
    _, table = read_pair_table(stages["pairs"] / "train.parquet")
    first = np.argmax(table.prompt_mask_BL, axis=1)
    assert (np.take_along_axis(np.asarray(table.prompt_BL), first[:, None], axis=1) == 1).all()
    base, policy, reward = load(source), load(stages["r1-policy"]), load(stages["r1-reward"], head="scalar")
    assert policy.config.family == "llama" and policy.config.hf["num_key_value_heads"] == base.config.hf["num_key_value_heads"] == 4
    text = "Once upon a time, there was a little girl."
    assert policy.tokenizer(text)["input_ids"] == base.tokenizer(text)["input_ids"]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), load(stages["sft"]).params, policy.params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1  # two steps at rate 1e-3 of Adam
    assert reward.config.hf["pad_token_id"] not in (1, 2) and math.isfinite(reward.config.hf["reward_bias"])
    (row,) = generate_texts(
        folder=str(stages["r1-policy"]), prompts=[text], file=None, max_new_tokens=12, max_prompt_length=48, temperature=0.0, top_k=0,
        top_p=1.0, num_samples=1, batch_size=1, seed=0,
    )  # fmt: skip
    assert row["response"].strip() and row["prompt"] == text
