"""Every row of the table runs on the toy task by name from one recipe, and does to the four models what the table says."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_encoder import write_tiny_bert

import jaxrlhf
from jaxrlhf.algorithms.rounds import METHODS
from jaxrlhf.data.columns import read_header
from jaxrlhf.data.tables import read_pair_table
from jaxrlhf.data.toy import toy_tokenizer
from jaxrlhf.pipeline.run import run
from jaxrlhf.report.arms import collect
from jaxrlhf.storage.record import read_record

pytestmark = pytest.mark.usefixtures("one_device")

# Two rounds of each row: (policy function, what round 2's reward model is fitted by, KL reference, policy start); the last two by round.
KEPT, SFT, LAST = None, "sft", "r1-policy"
BY_HAND = {
    "ppo": ("ppo", KEPT, SFT, LAST),
    "ppo-moving-reference": ("ppo", KEPT, LAST, LAST),
    "ppo-ensemble": ("ppo", KEPT, SFT, LAST),
    "ppo-pessimistic": ("ppo", KEPT, SFT, LAST),
    "rloo": ("rloo", KEPT, SFT, LAST),
    "retrain": ("ppo", "unweighted", LAST, LAST),
    "retrain-fixed-reference": ("ppo", "unweighted", SFT, LAST),
    "frft": ("ppo", "nearest", SFT, LAST),
    "frft-alpha": ("ppo", "nearest", SFT, LAST),
    "random-subset": ("ppo", "random-subset", SFT, LAST),
    "random-subset-once": ("ppo", "random-subset", SFT, LAST),
    "ocrm": ("ppo", "importance-weighted", LAST, LAST),
    "ocrm-fixed-reference": ("ppo", "importance-weighted", SFT, LAST),
    "frft+ocrm": ("ppo", "nearest-importance-weighted", LAST, LAST),
    "rlp-spg": ("ppo", "synthetic", SFT, SFT),
    "dpo": ("dpo", KEPT, SFT, SFT),
    "wpo": ("wpo", KEPT, SFT, SFT),
}
ONE_ROUND = ("dpo", "wpo")

# Combinations that no row has.
FREE = {
    "iterated-dpo-weighted": {
        "method": "dpo",
        "row": {"reward_update": "importance-weighted", "reference": "previous", "policy_start": "previous"},
    },
    "wpo-on-nearest": {"method": "wpo", "row": {"reward_update": "nearest"}},
    "rloo-ocrm-ensemble": {"method": "ocrm", "row": {"policy_update": "rloo", "ensemble": "mean-minus-spread"}},
    "rlp-carried-on": {
        "method": "rlp-spg",
        "row": {
            "policy_start": "previous",
            "reward_start": "previous",
            "reference": "previous",
            "restart_optimizer": False,
            "restart_critic": False,
        },
    },
    "frft-from-sft": {"method": "frft-alpha", "row": {"policy_start": "sft", "reward_start": "previous"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config) -> Path:
    """All rows as arms of one recipe: they share what they have in common."""
    output = tmp_path_factory.mktemp("runs")
    words = sorted(word for word in toy_tokenizer().get_vocab() if word.isalpha())
    encoder = write_tiny_bert(output / "encoder", words)
    arms = {name: {"method": name} for name in METHODS} | {"ocrm-flat": {"method": "ocrm", "weights.eta": 0.0}, **FREE}
    arms |= {"ppo-other-k": {"method": "ppo", "ppo.rloo_k": 4}, "ppo-same-prompts": {"method": "ppo", "ppo.round_prompts": "same"}}
    config = tiny_config(
        output,
        arms=arms,
        encoder={"source": str(encoder), "backend": "flax"},
        filter={"n": 12, "batch_size": 32},
        synthesize={"num_samples": 4, "num_prompts": 12, "confidence": 0.25, "similarity": 0.9, "batch_size": 32},
        dpo={"batch_size": 16, "learning_rate": 1e-3, "eval_batch_size": 32},
        reward__ensemble_size=2,
        ppo__rloo_k=2,
    )
    return run(config)


def stages(folder: Path) -> dict[str, Path]:
    return {link.name[3:]: link.resolve() for link in sorted((folder / "stages").iterdir())}


def named(found: dict[str, Path], hash: str) -> str:
    """The first stage of a run whose hash this is."""
    return next(name for name, path in found.items() if path.name == hash)


def params_of(folder: Path, head="lm"):
    return jax.tree.leaves(jaxrlhf.load(folder, head=head).params)


def same(a, b) -> bool:
    return all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(a, b, strict=True))


def test_every_row_stands_here():
    assert set(BY_HAND) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_row(folder, name):
    """What each round was built from is in the records of its stages."""
    function, update, reference, start = BY_HAND[name]
    summary = json.loads((folder / name / "summary.json").read_text())
    rounds = [0, 1] if name in ONE_ROUND else [0, 1, 2]
    assert [row["round"] for row in summary["rounds"]] == rounds and all(np.isfinite(row["gold"]) for row in summary["rounds"])
    found = stages(folder / name)
    record = read_record(found[f"r{rounds[-1]}-policy"])
    assert record["function"] == function
    for row in summary["rounds"][1:]:  # what sentences are made of is the change since the policy that the round started from
        began = 0 if start == SFT else row["round"] - 1
        assert row["gold_change"] == pytest.approx(row["gold"] - summary["rounds"][began]["gold"], abs=1e-5)
    assert named(found, record["inputs"]["reference"]) == reference and named(found, record["inputs"]["start"]) == start
    assert not same(params_of(found["sft"]), params_of(found[f"r{rounds[-1]}-policy"]))
    if name in ONE_ROUND:
        assert not [stage for stage in found if "reward" in stage] and summary["rounds"][1]["proxy"] is None
        return
    used = named(found, record["inputs"]["reward"])
    assert used == ("r1-reward" if update is KEPT else "r2-reward")
    if update is not KEPT:
        fitted = read_record(found["r2-reward"])
        assert read_record(found["r2-update"])["result"]["update"] == update
        assert named(found, fitted["inputs"]["sft"]) == "sft" and named(found, fitted["inputs"]["update"]) == "r2-update"
        assert named(found, read_record(found["r2-update"])["inputs"]["policy"]) == "r1-policy"
    else:
        assert not [stage for stage in found if stage.startswith("r2-") and ("update" in stage or "reward" in stage)]


def test_the_cost_of_every_row_is_counted_or_said_to_be_unknown(folder):
    """Unknown is what an encoder or a classifier reads; nothing is 0 that was done."""
    for arm in collect([folder]).arms:
        flops, reasons = arm.first.flops
        assert all("samples and embeds is not counted" in reason for reason in reasons), (arm.name, reasons)
        assert all(flops[part] for part in ("SFT", "pairs", "policies", "evaluation")), arm.name


def test_rows_share_what_they_have_in_common(folder):
    """Round 1 with one reward model and PPO is one stage for all its rows; ensembles share its first member."""
    first = {name: stages(folder / name) for name in METHODS}
    alike = [name for name in METHODS if name not in ("dpo", "wpo", "rloo", "ppo-ensemble", "ppo-pessimistic")]
    assert len({first[name]["r1-policy"] for name in alike}) == 1
    assert len({first[name]["r1-reward"] for name in METHODS if name not in ONE_ROUND}) == 1
    assert len({first[name]["pairs"] for name in METHODS}) == 1
    assert first["frft"]["r2-update"] == first["frft-alpha"]["r2-update"]
    assert first["frft"]["r2-policy"] == first["frft-alpha"]["r2-policy"]
    assert len({first[name]["r1-reward-2"] for name in ("ppo-ensemble", "ppo-pessimistic")}) == 1
    assert first["ppo-ensemble"]["r1-policy"] != first["ppo-pessimistic"]["r1-policy"]


def test_stages_depend_on_what_they_read_and_no_more(folder):
    """RLOO's k is nothing to PPO, and round 1 has the same prompts whether those of round 2 are fresh or not."""
    plain, other, same_prompts = (stages(folder / name) for name in ("ppo", "ppo-other-k", "ppo-same-prompts"))
    assert other["r2-policy"] == plain["r2-policy"]
    assert same_prompts["r1-policy"] == plain["r1-policy"] and same_prompts["r2-policy"] != plain["r2-policy"]


def test_weights_of_one_are_no_weights(folder):
    """`ocrm` with η = 0 and `retrain` pass the same array of ones and give the same bits."""
    flat, control = stages(folder / "ocrm-flat"), stages(folder / "retrain")
    assert (np.load(flat["r2-update"] / "weights.npy", allow_pickle=False) == 1).all()
    assert same(params_of(flat["r2-reward"], "scalar"), params_of(control["r2-reward"], "scalar"))
    assert same(params_of(flat["r2-policy"]), params_of(control["r2-policy"]))
    assert not same(params_of(stages(folder / "ocrm")["r2-reward"], "scalar"), params_of(control["r2-reward"], "scalar"))


def test_random_subset_differs_in_which_pairs_are_kept_and_nothing_else(folder):
    nearest, control = stages(folder / "frft-alpha"), stages(folder / "random-subset")
    kept = [{row.id for row in read_pair_table(found["r2-update"] / "pairs.parquet")[0]} for found in (nearest, control)]
    assert len(kept[0]) == len(kept[1]) == 12 and kept[0] != kept[1]
    everything = {row.id for row in read_pair_table(nearest["pairs"] / "train.parquet")[0]}
    assert kept[0] < everything and kept[1] < everything
    for found in (nearest, control):
        assert (np.load(found["r2-update"] / "weights.npy", allow_pickle=False) == np.ones(12, np.float32)).all()
    records = [[read_record(found[stage]) for found in (nearest, control)] for stage in ("r2-update", "r2-reward", "r2-policy")]
    for a, b in records:
        differ = {k for k in a["config"] if a["config"][k] != b["config"][k]}
        assert differ == ({"update"} if a["function"] == "update" else set()) and a["function"] == b["function"]
    assert {k for k in records[1][0]["inputs"] if records[1][0]["inputs"][k] != records[1][1]["inputs"][k]} == {"update"}
    assert records[1][0]["result"]["steps"] == records[1][1]["result"]["steps"] and records[1][0]["result"]["pairs"] == 12


def test_both_arms_read_one_set_of_similarities(folder):
    """What the policy wrote and how near the pairs are to it is computed once for a policy, by whichever arm comes first."""
    columns = [path for path in (folder.parent / ".stages" / "columns").iterdir() if path.name.startswith("similarities-")]
    policies = [read_header(path)["header"]["model"] for path in columns]
    assert len(policies) == len(set(policies)) >= 1


@pytest.mark.parametrize("name", FREE)
def test_free_combination(folder, name):
    rounds = json.loads((folder / name / "summary.json").read_text())["rounds"]
    assert [row["round"] for row in rounds] == [0, 1, 2] and all(np.isfinite(row["gold"]) for row in rounds)
    found, columns = stages(folder / name), FREE[name]["row"]
    record = read_record(found["r2-policy"])
    assert record["function"] == columns.get("policy_update", METHODS[FREE[name]["method"]].policy_update)
    start = columns.get("policy_start", METHODS[FREE[name]["method"]].policy_start)
    assert named(found, record["inputs"]["start"]) == (LAST if start == "previous" else SFT)
    if "ensemble" in columns:
        assert {"r2-reward", "r2-reward-2"} <= set(found) and "reward-1" in record["inputs"]
    if columns.get("reward_start") == "previous":
        assert read_record(found["r2-reward"])["parent"] == found["r1-reward"].name


def test_synthetic_pairs_are_added_to_the_offline_ones(folder):
    found = stages(folder / "rlp-spg")
    offline = read_pair_table(found["pairs"] / "train.parquet")[0]
    together = read_pair_table(found["r2-update"] / "pairs.parquet")[0]
    assert [row.id for row in together[: len(offline)]] == [row.id for row in offline]
    assert len(together) > len(offline) and all(row.id.startswith("synthetic-r2-") for row in together[len(offline) :])
