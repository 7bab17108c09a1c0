"""What a model's folder says of its origin, and the tree that follows from it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxrlhf.algorithms.reward_update import Pairs
from jaxrlhf.algorithms.rounds import METHODS, Round, round_of
from jaxrlhf.data.pairs import Pair, dataset_hash
from jaxrlhf.data.tables import read_pair_table
from jaxrlhf.monitoring.metrics_file import read
from jaxrlhf.pipeline.run import run
from jaxrlhf.pipeline.stages.context import RoundInputs
from jaxrlhf.pipeline.stages.lineage import lineage, policy_lineage, read_lineage, reference_to, reward_lineage, write_lineage
from jaxrlhf.storage.record import read_record
from jaxrlhf.storage.stage import Done, Stage
from jaxrlhf.storage.store import Store


def rounds(name: str) -> tuple[Round, Round]:
    first = round_of(METHODS[name], 1)
    return first, round_of(METHODS[name], 2, first)


def pairs_of(n: int) -> Pairs:
    return Pairs([Pair(str(i), "x", f"a{i}", "b", "test") for i in range(n)], None)  # type: ignore[arg-type]


@pytest.fixture
def made(tmp_path) -> dict[str, Done]:
    """The stages of two rounds of OCRM, as empty folders in a store, with their lineage."""
    store, done = Store(tmp_path / "store"), {}
    first, second = rounds("ocrm")

    def build(name: str, inputs: dict[str, str], facts=None, result=None) -> None:
        stage = Stage(name, "model", name, {}, {key: done[value] for key, value in inputs.items()})

        def fill(folder: Path):
            if facts is not None:
                write_lineage(folder, facts())
            return result

        done[name] = store.build(stage, fill)

    def reward(round, update, n, weights):
        return reward_lineage(
            round, start=done["sft"], sft=done["sft"], pairs=done["pairs"], update=update and done[update], fitted=pairs_of(n),
            weights_N=np.array(weights, np.float32),
        )  # fmt: skip

    def policy(round, start, reference, reward):
        given = RoundInputs(done["sft"], done[start], done[reference], done[start], done["pairs"], (done[reward],))
        return policy_lineage(round, given)

    build("sft", {})
    build("pairs", {"sft": "sft"})
    build("r1-reward", {"sft": "sft", "pairs": "pairs"}, lambda: reward(first, None, 4, [1, 1, 1, 1]))
    build("r1-policy", {"start": "sft", "reward": "r1-reward"}, lambda: policy(first, "sft", "sft", "r1-reward"))
    build("r2-update", {"policy": "r1-policy"}, result={"update": "importance-weighted"})
    build("r2-reward", {"sft": "sft", "update": "r2-update"}, lambda: reward(second, "r2-update", 4, [1, 1, 2, 4]))
    build("r2-policy", {"start": "r1-policy", "reward": "r2-reward"}, lambda: policy(second, "r1-policy", "r1-policy", "r2-reward"))
    return done


def test_a_reward_model_records_parent_data_weights_and_policy(made):
    first, second = (read_lineage(made[name].folder) for name in ("r1-reward", "r2-reward"))
    assert first is not None and second is not None
    assert second["kind"] == "reward" and second["round"] == 2 and second["parent"] == reference_to(made["sft"])
    data = second["data"]
    assert data["hash"] == dataset_hash(pairs_of(4).rows) != dataset_hash(pairs_of(3).rows) and data["pairs"] == 4
    assert data["source"] == {"stage": "pairs", "hash": made["pairs"].hash} and data["update"] == "importance-weighted"
    assert data["weights"] == pytest.approx({"ess": 64 / 22, "ess_fraction": 16 / 22, "mean": 2, "min": 1, "max": 4, "largest_share": 0.5})
    assert second["corrects_for"] == {"stage": "r1-policy", "hash": made["r1-policy"].hash}
    assert first["corrects_for"] == reference_to(made["sft"]) and first["data"]["update"] is None and first["data"]["weights"]["ess"] == 4


def test_a_policy_records_parent_rewards_reference_and_sft(made):
    facts = read_lineage(made["r2-policy"].folder)
    names = {"parent": "r1-policy", "reference": "r1-policy", "sft": "sft"}
    assert facts == {
        "kind": "policy", "round": 2, "update": "ppo", "reward": [reference_to(made["r2-reward"])],
        **{name: reference_to(made[stage]) for name, stage in names.items()},
    }  # fmt: skip
    assert read_lineage(made["sft"].folder) is None


def tree(made) -> str:
    h = {name: f"{name} {done.hash[:8]}" for name, done in made.items()}
    return f"""{h["r2-policy"]}: ppo of round 2
├─ reward {h["r2-reward"]}: fitted in round 2 on 4 pairs (importance-weighted), ESS 2.909 (72.7 %), for {h["r1-policy"]}
│  └─ from {h["sft"]}
├─ from {h["r1-policy"]}: ppo of round 1
│  ├─ reward {h["r1-reward"]}: fitted in round 1 on 4 pairs (all), ESS 4 (100 %), for {h["sft"]}
│  │  └─ from {h["sft"]}
│  ├─ from {h["sft"]}
│  └─ reference {h["sft"]}
└─ reference {h["r1-policy"]} (above)
"""


def test_tree_by_hand(made, tmp_path):
    """From the store's folder of a model, from a run's folder of links, and from one of copies."""
    assert lineage(made["r2-policy"].folder) == tree(made)
    for name, standalone in (("links", False), ("copies", True)):
        for number, done in enumerate(made.values()):
            Store(tmp_path / "store").link(done, tmp_path / name, number, standalone=standalone)
        assert lineage(tmp_path / name) == tree(made)
        assert lineage(tmp_path / name / "stages" / "06-r2-policy") == tree(made)


def test_a_folder_that_was_copied_away_names_its_parents(made, tmp_path):
    shutil.copytree(made["r2-policy"].folder, tmp_path / "exports" / "policy")
    lines = lineage(tmp_path / "exports" / "policy").splitlines()
    assert lines == [
        f"r2-policy {made['r2-policy'].hash[:8]}: ppo of round 2",
        f"├─ reward r2-reward {made['r2-reward'].hash[:8]}",
        f"├─ from r1-policy {made['r1-policy'].hash[:8]}",
        f"└─ reference r1-policy {made['r1-policy'].hash[:8]}",
    ]


def test_where_there_is_nothing_to_start_from(made, tmp_path):
    with pytest.raises(ValueError, match=r"is neither a run's folder nor that of a model with a lineage.json\."):
        lineage(made["sft"].folder)
    (tmp_path / "sweep" / "ppo" / "stages").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"It has several arms: name one of ppo in it"):
        lineage(tmp_path / "sweep")
    with pytest.raises(ValueError, match=r"has no model with a lineage.json; it was made by an earlier version"):
        lineage(tmp_path / "sweep" / "ppo")


def test_a_run_writes_what_its_stages_were_made_of(tmp_path, tiny_config, one_device):
    """The file agrees with the stages' own records, its weights with the report of the update, and it changes no hash."""
    folder = run(tiny_config(tmp_path, method="ocrm"))
    found = {link.name[3:]: link.resolve() for link in (folder / "stages").iterdir()}
    reward, policy = (read_lineage(found[name]) for name in ("r2-reward", "r2-policy"))
    assert reward is not None and policy is not None
    inputs = read_record(found["r2-policy"])["inputs"]
    assert policy["parent"]["hash"] == inputs["start"] and policy["reference"]["hash"] == inputs["reference"]
    assert [one["hash"] for one in policy["reward"]] == [inputs["reward"]] and policy["sft"]["hash"] == inputs["sft"]
    assert reward["corrects_for"] == {"stage": "r1-policy", "hash": read_record(found["r2-update"])["inputs"]["policy"]}
    rows, _ = read_pair_table(found["pairs"] / "train.parquet")
    report = json.loads((found["r2-update"] / "report.json").read_text())
    assert reward["data"]["hash"] == dataset_hash(rows) and reward["data"]["pairs"] == len(rows) == report["pairs"]
    assert reward["data"]["weights"] == pytest.approx({name: report[name] for name in reward["data"]["weights"]})
    assert (found["r2-update"] / "weight_health.svg").stat().st_size > 1000
    lines = lineage(folder).splitlines()
    assert lines[0].startswith("r2-policy ") and any("(importance-weighted), ESS" in line for line in lines)
    assert lines[-1].startswith("└─ reference r1-policy") and lines[-1].endswith("(above)")
    (line,) = [line for line in read(folder / "metrics.jsonl") if line["stage"] == "update"]
    assert line["weights/length_correlation"] == pytest.approx(report["length_correlation"])


def test_a_policy_that_learns_from_pairs_names_them(made):
    first = round_of(METHODS["dpo"], 1)
    sft = made["sft"]
    facts = policy_lineage(first, RoundInputs(sft, sft, sft, sft, made["pairs"], (made["r1-reward"],), made["r2-update"]))
    assert facts["update"] == "dpo" and facts["reward"] == []
    assert facts["pairs"] == reference_to(made["pairs"]) and facts["pairs_update"] == reference_to(made["r2-update"])
    write_lineage(made["r1-policy"].place, facts | {"reference": None})
    assert lineage(made["r1-policy"].place).splitlines()[1:] == [f"└─ from sft {made['sft'].hash[:8]}"]
