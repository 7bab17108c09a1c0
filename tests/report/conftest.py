"""Run folders with figures that can be worked out on paper, in the fields that the stages of a real run wrote (stage_results.json)."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml

EVIL = '</script><img src=x onerror="alert(1)"><!-- & `|$x_1$'


REAL = json.loads((Path(__file__).parents[1] / "golden" / "stage_results.json").read_text())


def written(real, changes, what):
    """What a real run wrote, with other values: never with other fields."""
    assert changes.keys() <= real.keys(), f"no {what} has {sorted(changes.keys() - real.keys())}"
    return real | changes


def write_json(path, body):
    path.write_text(json.dumps(body), encoding="utf-8")


def write_parquet(path, columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


def write_model(folder, parameters):
    """A safetensors file of two tensors, `parameters` numbers in all: its header alone is what a report reads."""
    header = json.dumps({
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [parameters - 4, 1], "data_offsets": [0, 0]},
        "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 0]},
    }).encode()  # fmt: skip
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


class Made:
    """Writes the stages of one run in order."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def stage(self, name, function, *, kind="model", inputs=None, result=None, config=None, seconds=1.0, parameters=None):
        path = self.folder / "stages" / f"{self.count:02d}-{name}"
        path.mkdir(parents=True)
        self.count += 1
        real, what = REAL["stages"][function], f"{function} stage"
        assert set(inputs or {}) <= set(real["inputs"]), f"a {what} has the inputs {real['inputs']}"
        result = written(real["result"], result or {}, what)
        config = {name: written(section, (config or {}).get(name, {}), what) for name, section in real["config"].items()}
        write_json(path / "stage.json", {
            "kind": kind, "name": name, "function": function, "version": 1, "hash": f"hash-{name}", "inputs": inputs or {}, "parent": None,
            "config": config, "result": result, "seconds": seconds, "finished": "2026-01-01T00:00:00Z", "format": 1,
        })  # fmt: skip
        if parameters:
            write_model(path, parameters)
        return path

    def evaluation(self, name, inputs, *, prompts, gold, proxy=None, text="fine", seconds=1.0):
        """4 tokens a prompt; responses of 2, 3, 4 … tokens; the last one does not end."""
        path = self.stage(name, "evaluation", kind="data", inputs=inputs, seconds=seconds)
        columns = {
            "id": [str(i) for i in range(prompts)],
            "prompt": [f"prompt {i} {EVIL}" for i in range(prompts)],
            "reference": [None if i == 1 else f"reference {i}" for i in range(prompts)],
            "prompt_tokens": [[1, 2, 3, 4]] * prompts,
            "response_1": [f"{text} answer {i} {EVIL}" for i in range(prompts)],
            "response_1_tokens": [[5] * (2 + i) for i in range(prompts)],
            "ended_1": [i < prompts - 1 for i in range(prompts)],
            "kl_sft": [0.1 * i for i in range(prompts)],
        }
        if gold is not None:
            columns |= {"gold_1": [gold + i for i in range(prompts)], "gold_2": [gold - i for i in range(prompts)]}
        if proxy is not None:
            columns["proxy"] = [proxy - i for i in range(prompts)]
        write_parquet(path / "samples.parquet", columns)
        return path


ROUNDS = (
    {"round": 0, "gold": 1.0, "proxy_start": None, "proxy": None, "kl_sft": 0.0,
     "win_rate": 0.1, "win_rate_low": 0.05, "win_rate_high": 0.2},
    {"round": 1, "gold": 2.0, "proxy_start": -1.0, "proxy": 1.0, "kl_sft": 1.0, "reward_accuracy": 0.75, "reward_accuracy_valid": 0.7,
     "win_rate": 0.3, "win_rate_low": 0.2, "win_rate_high": 0.4, "length": 5.0, "eos_rate": 0.9},
    {"round": 2, "gold": 1.5, "proxy_start": 0.0, "proxy": 3.0, "kl_sft": 4.0, "reward_accuracy": 0.6, "reward_accuracy_valid": 0.7,
     "win_rate": 0.2, "win_rate_low": 0.1, "win_rate_high": 0.3, "length": 6.0, "eos_rate": 0.8, "ess_fraction": 0.4, "refit": True},
)  # fmt: skip
BINS = [
    {"low": 0.5, "high": 0.55, "pairs": 3, "confidence": 0.52, "accuracy": 0.5},
    {"low": 0.9, "high": 0.95, "pairs": 5, "confidence": 0.92, "accuracy": 0.7},
    {"low": 0.95, "high": 1.0, "pairs": 0, "confidence": None, "accuracy": None},
]
SIDE = {"mean_kept": 0.6, "mean_dropped": 0.2, "mean_at_random": 0.3, "histogram_kept": [0, 1, 4], "histogram_dropped": [5, 2, 0]}
VALID_BEFORE = np.array([[1.0, 3.0], [-1.0, -3.0]], np.float32)
VALID_AFTER = np.array([[2.0, -2.0], [-2.0, 2.0]], np.float32)


def make_run(folder, *, arm="ocrm", seed=0, rounds=2, refits=True, gold_shift=0.0):
    """A run of `rounds` finished rounds of the two that its config asks for; the second refits by importance weights."""
    folder.mkdir(parents=True)
    config = {"name": f"run/{arm}", "seed": seed, "method": arm, "rounds": 2, "output": str(folder.parent), "reward": {"x": EVIL}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [row | {"gold": row["gold"] + gold_shift * row["round"]} for row in ROUNDS[: rounds + 1]]
    assert all(row.keys() <= real.keys() for row, real in zip(rows, REAL["rounds"], strict=False))
    write_json(folder / "summary.json", {"method": arm, "seed": seed, "name": f"run/{arm}", "rounds": rows, "notes": [f"a note {EVIL}"]})
    made = Made(folder)
    made.stage("tokenizer", "tokenizer", kind="data")
    made.stage(
        "sft", "sft", result={"steps": 4, "rows": 65, "tokens": 650}, config={"sft": {"batch_size": 64}}, seconds=8.0, parameters=100
    )
    pairs = made.stage("pairs", "pairs", kind="data", inputs={"sft": "hash-sft"}, result={"train": 2, "sampled_tokens": 44}, seconds=2.0)
    write_parquet(
        pairs / "train.parquet", {"prompt_tokens": [[1] * 4, [1] * 6], "chosen_tokens": [[1] * 3, [1]], "rejected_tokens": [[1] * 5, [1]]}
    )
    made.evaluation("sft-evaluation", {"policy": "hash-sft", "sft": "hash-sft"}, prompts=5, gold=1.0)
    lines = []
    for number in range(1, rounds + 1):
        refit = number == 2 and refits
        if refit:
            given = {"pairs": "hash-pairs", "sft": "hash-sft", "policy": "hash-r1-policy", "reward": "hash-r1-reward"}
            update = made.stage(
                "r2-update", "update", kind="data", inputs=given, result={"update": "importance-weighted", "pairs": 2, "of": 2}, seconds=3.0
            )
            write_json(update / "report.json", {"ess": 0.8, "ess_fraction": 0.4})
            by_length = [{"from": 1, "to": 2, "ess_fraction": 0.5}, {"from": 3, "to": 5, "ess_fraction": 0.3}]
            write_json(update / "weight_health.json", {"ess_fraction": 0.4, "largest_share": 0.9, "by_length": by_length})
            write_json(
                update / "filter_report.json", {"similarity": {"bin_edges": [0, 0.3, 0.6, 1], "chosen": SIDE, "rejected": SIDE}, "kept": 5}
            )
        if number == 1 or refit:
            inputs, config = {"sft": "hash-sft", "pairs": "hash-pairs"}, {"reward": {"batch_size": 2}}
            result = {"steps": 3, "pairs": 2}
            reward = made.stage(f"r{number}-reward", "reward", inputs=inputs, seconds=4.0, parameters=50, result=result, config=config)
            np.save(reward / "valid_scores.npy", VALID_BEFORE if number == 1 else VALID_AFTER)
            write_json(reward / "lineage.json", {"kind": "reward", "data": {"pairs": 2, "update": None, "weights": {"ess": 2.0}}})
        start = "hash-sft" if number == 1 else "hash-r1-policy"
        judge = "hash-r2-reward" if refit else "hash-r1-reward"
        inputs = {"start": start, "reference": start, "reward": judge, "sft": "hash-sft"}
        result = {"updates": 2, "episodes": 20, "prompt_length": 4.0}
        made.stage(
            f"r{number}-policy", "ppo", inputs=inputs, result=result, config={"ppo": {"num_ppo_epochs": 2}}, seconds=5.0, parameters=100
        )
        shown = {"policy": f"hash-r{number}-policy", "sft": "hash-sft", "reward": judge}
        evaluation = made.evaluation(f"r{number}-evaluation", shown, prompts=5, gold=2.0, proxy=number, text=f"{arm} round {number}")
        write_json(evaluation / "reliability.json", {"pairs": 8, "ece": 0.2, "accuracy": 0.6, "confidence": 0.8, "bins": BINS})
        lines += [{"stage": "policy", "round": number, "step": step, "rollout/kl": 0.5 * number, "kl/penalty": 9.0, "kl/sft": number * step,
                   "rollout/length": 5.0 + step, "rollout/score": 0.1 * step} for step in (1, 2)]  # fmt: skip
    assert {name for line in lines for name in line} <= set(REAL["metrics"]["policy"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(name="make_run", scope="session")
def _make_run():
    return make_run


@pytest.fixture(scope="module")
def two_arms(tmp_path_factory):
    """A run folder of two arms, as `jaxrlhf run` on a recipe with arms leaves it. Read-only: a module's tests share it."""
    home = tmp_path_factory.mktemp("arms") / "demo"
    make_run(home / "ppo", arm="ppo", refits=False)
    make_run(home / "ocrm", arm="ocrm", gold_shift=0.5)
    (home / "config.yaml").write_text(yaml.safe_dump({"name": "demo", "arms": {"ppo": {}, "ocrm": {}}}, sort_keys=False))
    return home
