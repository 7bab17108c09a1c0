"""Whole runs on the toy task: what lies in the folder, what arms share, what a second run builds, and every column of the table."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from make_stage_hashes import hashes_of
from make_stage_results import results_of

import jaxrlhf
from jaxrlhf.algorithms import rounds
from jaxrlhf.algorithms.rounds import Method
from jaxrlhf.data.tables import read_pair_table, read_table
from jaxrlhf.monitoring.metrics_file import read
from jaxrlhf.pipeline.loop import not_the_sampler
from jaxrlhf.pipeline.run import run
from jaxrlhf.pipeline.stages import pairs
from jaxrlhf.pipeline.table import findings, read_summaries
from jaxrlhf.recipe import load_config
from jaxrlhf.report import page
from jaxrlhf.report.arms import Arm, collect
from jaxrlhf.report.costs import share_of_corrections
from jaxrlhf.report.samples import samples_of
from jaxrlhf.scorers.toy import toy_gold
from jaxrlhf.storage.record import read_record

pytestmark = pytest.mark.usefixtures("one_device")

GOLDEN = Path(__file__).parents[1] / "golden"
ARMS = {
    "ppo": {"method": "ppo"},
    "retrain": {"method": "retrain"},
    "ocrm": {"method": "ocrm"},
    "ocrm-flat": {"method": "ocrm", "weights.eta": 0.0},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """One store for all runs of this module, so that they share what is equal."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def sampled_tokens() -> list[int]:
    """Of every response that was sampled, those for pairs first; its prompt counted with it."""
    return []


@pytest.fixture(scope="module")
def finished(store, tiny_config, sampled_tokens) -> Path:
    draw = pairs.sample_texts

    def counted(*given, **how):
        table, texts = draw(*given, **how)
        sampled_tokens.extend((table.prompt_mask_BL.sum(axis=1) + table.response_mask_BT.sum(axis=1)).tolist())
        return table, texts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "sample_texts", counted)
        return run(tiny_config(store, arms=ARMS))


def stages(folder: Path) -> dict[str, Path]:
    """name → folder in the store."""
    return {link.name[3:]: link.resolve() for link in sorted((folder / "stages").iterdir())}


def params_of(folder: Path, head="lm"):
    return jax.tree.leaves(jaxrlhf.load(folder, head=head).params)


def same(a, b) -> bool:
    return all((x == y).all() for x, y in zip(a, b, strict=True))


def last(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())["rounds"][-1]


def test_summary(finished):
    summaries = read_summaries(finished)
    assert list(summaries) == list(ARMS)
    for arm, summary in summaries.items():
        assert summary["method"] == ARMS[arm]["method"] and summary["seed"] == 0
        assert [row["round"] for row in summary["rounds"]] == [0, 1, 2]
        sft, first, second = summary["rounds"]
        for row in (first, second):
            kept = {name for name, value in row.items() if value is None}
            weighted = row["round"] == 2 and summary["method"] == "ocrm"
            assert kept == {"refit_value"} | (set() if weighted else {"ess", "ess_fraction", "eta"}) | (
                set() if row["refit"] else {"update"}
            )
            assert 0 <= row["win_rate_low"] <= row["win_rate"] <= row["win_rate_high"] <= 1 and row["seconds"] > 0
        assert sft["kl_sft"] == 0 and sft["proxy"] is None and sft["reward_accuracy_valid"] is None and sft["gold"] < 0
        assert abs(first["kl_sft"]) > 1e-4
        held_out = len(read_pair_table(stages(finished / arm)["pairs"] / "valid.parquet")[0])
        assert {name: one["pairs"] for name, one in summary.get("baselines", {}).items()} == {"longer": held_out, "bag_of_words": held_out}
    assert summaries["ocrm"]["rounds"][2]["ess_fraction"] >= 0.5
    assert summaries["ocrm-flat"]["rounds"][2]["ess"] == pytest.approx(40, abs=2)


def test_the_report_finds_all_that_a_run_keeps(finished, tmp_path):
    """What the stages write is what the report reads: nothing is missing, and every count of cost is there."""
    arms = {arm.name: arm.first for arm in collect([finished]).arms}
    assert list(arms) == list(ARMS)
    for view in arms.values():
        assert view.run.finished and view.run.missing == [] and view.flops[1] == [] and view.curve.gap is not None
        assert set(view.reliabilities) == {1, 2} and view.reliabilities[2]["accuracy"] == pytest.approx(
            view.run.rounds[2]["reward_accuracy"]
        )
        assert [row["penalty"] is not None for row in view.budgets] == [True, True]
    assert set(arms["ocrm"].drifts) == {2} and arms["ppo"].drifts == {}
    assert share_of_corrections(arms["ppo"].flops[0]) == 0 and 0 < (share_of_corrections(arms["ocrm"].flops[0]) or 0) < 1
    told = [line for line in page.findings(collect([finished]).arms) if "the longer response" in line]
    assert told == [line for line in findings(read_summaries(finished)) if "the longer response" in line] != []
    rows = samples_of([Arm("ocrm", [arms["ocrm"]])])[0]["rows"]
    assert len(rows) == 3 * 20 and all(isinstance(row[-1], bool) for row in rows)


def test_pairs_cost_what_was_sampled_for_them(finished, sampled_tokens):
    """Also of the responses that gold tied: they are in no table of pairs."""
    for_pairs = sampled_tokens[: 2 * (40 + 20)]
    size = sum(x.size for x in params_of(stages(finished / "ppo")["sft"]))
    assert collect([finished]).arms[0].first.flops[0]["pairs"] == 2 * size * sum(for_pairs)


def test_fixtures_of_run_folders_have_the_fields_of_real_ones(finished):
    """Where this fails, `python tests/golden/make_stage_results.py` makes them of today's."""
    golden, found = json.loads((GOLDEN / "stage_results.json").read_text()), results_of(finished / "ocrm")
    for function, record in golden["stages"].items():
        for part, fields in record.items():
            assert set(fields) <= set(found["stages"][function][part]), (function, part)
        assert all(set(fields) <= set(found["stages"][function]["config"][name]) for name, fields in record["config"].items())
    assert all(set(names) <= set(found["metrics"][stage]) for stage, names in golden["metrics"].items())
    assert all(set(row) <= set(real) for row, real in zip(golden["rounds"], found["rounds"], strict=True))


def test_config_in_the_folder_loads_again_as_it_is(finished, store, tiny_config):
    assert load_config(finished / "config.yaml") == tiny_config(store, arms=ARMS)
    arm = load_config(finished / "ocrm" / "config.yaml")
    assert arm.method == "ocrm" and arm.name == "tiny/ocrm" and not arm.arms


def test_arms_share_everything_up_to_the_end_of_round_1(finished):
    by_arm = {arm: stages(finished / arm) for arm in ARMS}
    shared = ["tokenizer", "sft", "pairs", "sft-evaluation", "r1-reward", "r1-policy", "r1-evaluation"]
    for name in shared:
        assert len({of[name] for of in by_arm.values()}) == 1, name
    assert list(by_arm["ppo"]) == [*shared, "r2-policy", "r2-evaluation"]
    assert list(by_arm["ocrm"]) == [*shared, "r2-update", "r2-reward", "r2-policy", "r2-evaluation"]
    assert len({of["r2-policy"] for of in by_arm.values()}) == 4
    record = read_record(by_arm["ocrm"]["r2-policy"])
    assert record["kind"] == "model" and record["parent"] == by_arm["ocrm"]["r1-policy"].name
    assert record["inputs"]["reference"] == record["inputs"]["start"] == by_arm["ocrm"]["r1-policy"].name
    assert read_record(by_arm["ppo"]["r2-policy"])["inputs"]["reference"] == by_arm["ppo"]["sft"].name


def test_ocrm_at_eta_0_is_retrain_to_the_bit(finished):
    """The control and the correction differ in nothing but the weights."""
    rewards = {arm: params_of(stages(finished / arm)["r2-reward"], "scalar") for arm in ("retrain", "ocrm-flat", "ocrm")}
    assert same(rewards["retrain"], rewards["ocrm-flat"]) and not same(rewards["retrain"], rewards["ocrm"])
    policies = {arm: params_of(stages(finished / arm)["r2-policy"]) for arm in ("retrain", "ocrm-flat", "ocrm")}
    assert same(policies["retrain"], policies["ocrm-flat"]) and not same(policies["retrain"], policies["ocrm"])
    weights = np.load(stages(finished / "ocrm-flat")["r2-update"] / "weights.npy", allow_pickle=False)
    assert (weights == 1).all()


def test_metrics_file(finished):
    lines = read(finished / "ocrm" / "metrics.jsonl")
    names = {}
    for line in lines:
        names.setdefault((line["stage"], line["round"]), []).append(line)
    assert [line["step"] for line in names["sft", None]] == [1, 2, 3]
    for number in (1, 2):
        assert [line["step"] for line in names["policy", number]] == [1, 2, 3]
        line = names["policy", number][0]
        for name in (
            "loss/policy", "loss/value", "ppo/approxkl", "ppo/clipfrac", "ppo/ratio", "ppo/entropy", "rollout/score", "rollout/kl",
            "rollout/length", "rollout/eos_rate", "rollout/decode_mismatch", "kl/penalty", "kl/sft", "time/generate", "time/update",
        ):  # fmt: skip
            assert isinstance(line[name], float | int), name
        assert min(line.get(name, 0) for name in ("learning_rate", "critic_learning_rate", "grad_norm", "critic_grad_norm")) > 0
        assert line["ppo/ratio_first"] == pytest.approx(1, abs=1e-5) and line["ppo/approxkl_first"] < 1e-6
        assert line["rollout/decode_mismatch"] < 1e-4
        assert {"loss/pair", "pair/accuracy", "grad_norm"} <= names["reward", number][0].keys()
    # Round 2's reference is round 1's policy: the penalty starts at 0, the distance to SFT does not.
    assert names["policy", 2][0]["kl/penalty"] == 0 != names["policy", 2][0]["kl/sft"]
    (line,) = names["update", 2]
    row = json.loads((finished / "ocrm" / "summary.json").read_text())["rounds"][2]
    assert {f"weights/{name}" for name in ("mean", "max", "largest_share", "q05", "q50", "q95")} < line.keys() and line["step"] == 1
    assert [line[f"weights/{name}"] for name in ("ess", "ess_fraction", "eta")] == [row[name] for name in ("ess", "ess_fraction", "eta")]
    assert set(names) == {("sft", None), ("update", 2), *((stage, n) for stage in ("reward", "policy") for n in (1, 2))}


def test_running_again_builds_nothing_and_writes_what_is_broken_again(finished, store, tiny_config):
    """config.yaml, summary.json and metrics.jsonl, whatever has become of them: the stages say it all."""
    before = sorted(p.name for p in (store / ".stages").iterdir())
    names = ("metrics.jsonl", "summary.json", "config.yaml")
    texts = {(arm, name): (finished / arm / name).read_text() for arm in ARMS for name in names}
    for arm, broken in zip(ARMS, (b"\xff\xfe\0\n", b"[]\n{}\n" + b"[" * 9999, None, b""), strict=True):
        for name in names:
            (finished / arm / name).unlink()
            if broken is not None:
                (finished / arm / name).write_bytes(broken)
    run(tiny_config(store, arms=ARMS))
    assert sorted(p.name for p in (store / ".stages").iterdir()) == before
    assert {(arm, name): (finished / arm / name).read_text() for arm in ARMS for name in names} == texts


def test_stage_folders_open_as_models(finished):
    found = stages(finished / "ocrm")
    policy, reward = jaxrlhf.load(found["r2-policy"]), jaxrlhf.load(found["r2-reward"], head="scalar")
    assert policy.tokenizer.eos_token_id is not None and reward.config.hf["reward_bias"] != 0
    samples, _ = read_table(found["r2-evaluation"] / "samples.parquet")
    assert len(samples["prompt"]) == 20 and {"gold_1", "proxy", "kl_sft", "response_2"} <= samples.keys()
    row = jaxrlhf.generate(
        policy.model, policy.params, np.array([samples["prompt_tokens"][0]]), np.ones((1, 17), bool), jax.random.key(0),
        max_new_tokens=4, eos_ids=(policy.tokenizer.eos_token_id,),
    )  # fmt: skip
    assert row.tokens_BT.shape == (1, 4)


@pytest.mark.parity
def test_stage_folders_open_in_transformers(finished):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    found = stages(finished / "ocrm")
    samples, _ = read_table(found["r2-evaluation"] / "samples.parquet")
    text = samples["prompt_tokens"][0] + samples["response_1_tokens"][0]
    reward = transformers.AutoModelForSequenceClassification.from_pretrained(found["r2-reward"])
    with torch.no_grad():
        score = float(reward(torch.tensor([text])).logits[0, 0]) - reward.config.reward_bias
    np.testing.assert_allclose(score, samples["proxy"][0], rtol=1e-4, atol=1e-4)
    policy = transformers.AutoModelForCausalLM.from_pretrained(found["r2-policy"])
    with torch.no_grad():
        logits = policy(torch.tensor([text])).logits.numpy()
    loaded = jaxrlhf.load(found["r2-policy"])
    ours = loaded.model.apply(loaded.params, np.array([text]), np.ones((1, len(text)), bool)).logits
    np.testing.assert_allclose(ours, logits, rtol=1e-3, atol=1e-4)


def test_seeds(store, tiny_config, tmp_path, finished):
    """The same seed in another place gives the same bits; another seed gives others."""
    again = run(tiny_config(tmp_path, rounds=1))
    assert same(params_of(stages(finished / "ppo")["r1-policy"]), params_of(stages(again)["r1-policy"]))
    assert stages(again)["r1-policy"].name == stages(finished / "ppo")["r1-policy"].name
    other = run(tiny_config(store, name="other", rounds=1, seed=1))
    assert not same(params_of(stages(other)["r1-policy"]), params_of(stages(again)["r1-policy"]))


@pytest.mark.parametrize(
    "row",
    [
        Method(reward_update="unweighted", reward_start="previous"),
        Method(restart_optimizer=False, restart_critic=False, policy_start="sft"),
    ],
    ids=["reward-from-previous", "carries-all-from-sft"],
)
def test_rows_that_users_add(finished, store, tiny_config, monkeypatch, row):
    """Any combination of the table's columns runs, and its models come from where the row says."""
    monkeypatch.setitem(rounds.METHODS, "mine", row)
    folder = run(tiny_config(store, name="mine", method="mine"))
    found, plain = stages(folder), stages(finished / "ppo")
    record = read_record(found["r2-policy"])
    carries = not (row.restart_optimizer and row.restart_critic)
    assert (found["r1-policy"] != plain["r1-policy"]) == carries  # one that is carried on keeps its training state
    assert same(params_of(found["r1-policy"]), params_of(plain["r1-policy"]))
    assert (found["r1-policy"] / "checkpoint").exists() == carries and not (found["r2-policy"] / "checkpoint").exists()
    assert record["inputs"]["start"] == found["sft" if row.policy_start == "sft" else "r1-policy"].name
    assert record["inputs"]["reference"] == found["sft" if row.reference == "sft" else "r1-policy"].name
    assert record["inputs"].get("previous") == (found["r1-policy"].name if carries else None)
    if row.reward_update:
        assert read_record(found["r2-reward"])["parent"] == found["r1-reward"].name
    assert not same(params_of(found["r2-policy"]), params_of(plain["r2-policy"]))
    assert last(folder)["round"] == 2


def test_code_of_the_user(finished, store, tiny_config, tmp_path, monkeypatch):
    """A reward update and a pair loss as module:attribute; changing the code makes the stages that used it new ones."""
    code = """
import numpy as np
from jaxrlhf.losses import PAIR_LOSSES, bind
loss = bind(PAIR_LOSSES["bradley_terry"], center=0.01)
policy_loss = 3
def half(context, pairs):
    assert context.round == 2 and context.policy.tokenizer is not None
    kept = pairs.select(np.arange(0, len(pairs.rows), 2))
    return kept, np.full(len(kept.rows), 0.5, np.float32)
"""
    (tmp_path / "users_code.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(rounds.METHODS, "mine", Method(reward_update="users_code:half"))
    config = tiny_config(store, name="code", method="mine", reward__loss="users_code:loss")
    found = stages(run(config))
    record = read_record(found["r2-update"])
    assert record["result"]["pairs"] == (record["result"]["of"] + 1) // 2
    assert read_record(found["r2-reward"])["result"]["pairs"] == record["result"]["pairs"]
    assert found["r1-reward"] != stages(finished / "ppo")["r1-reward"] and found["sft"] == stages(finished / "ppo")["sft"]
    with pytest.raises(ValueError, match=r"ppo.loss 'users_code:policy_loss' is a int; name a jaxrlhf.types.PolicyLoss"):
        run(tiny_config(store, name="code", ppo__loss="users_code:policy_loss"))
    (tmp_path / "users_code.py").write_text(code + "\n# changed\n")
    del sys.modules["users_code"]
    from jaxrlhf.plugins import source_of

    assert "# changed" in (source_of("users_code:half") or "")


def test_without_gold(finished, store, tiny_config, tmp_path):
    """Pairs from a file, no gold: every figure that needs gold is null, and the note says what the weights are then."""
    pairs, _ = read_table(stages(finished / "ppo")["pairs"] / "train.parquet")
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({k: pairs[k][i] for k in ("prompt", "chosen", "rejected")}) + "\n" for i in range(len(pairs["prompt"])))
    )
    folder = run(
        tiny_config(
            store, name="data", method="ocrm", gold__kind="none", pairs__source="data", data__train=str(path), data__valid_fraction=0.2,
            tokenizer__source=str(stages(finished / "ppo")["tokenizer"]),
        )
    )  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary["rounds"]:
        assert [row[name] for name in ("gold", "win_rate", "win_rate_low", "tie_rate", "reward_accuracy")] == [None] * 5
    assert summary["rounds"][2]["ess"] > 0 and 0 <= summary["rounds"][2]["reward_accuracy_valid"] <= 1
    assert len(summary["notes"]) == 1 and "a heuristic here" in summary["notes"][0] and "were not sampled" in summary["notes"][0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"weights__max_tokens": 8}, None),
        ({"weights__max_tokens": 7}, r"weights.max_tokens 7 leaves out what follows in responses of up to 8"),
        ({"pairs__temperature": 0.5}, r"sampled at temperature 0.5 and are weighed at weights.temperature 1.0"),
    ],
)
def test_reasons_why_the_weights_would_be_no_density_ratio(tmp_path, tiny_config, changes, reason):
    reasons = not_the_sampler(tiny_config(tmp_path, **changes))
    assert len(reasons) == (reason is not None) and all(reason in one for one in reasons)


def test_held_out_pairs(finished, store, tiny_config):
    """Strict labels, prompts of their own, and nothing that the evaluation's settings could change."""
    found = stages(finished / "ocrm")
    (valid, _), (train, _) = (read_table(found["pairs"] / f"{name}.parquet") for name in ("valid", "train"))
    gold = toy_gold(tiny_config(store).data.toy)
    assert (gold(valid["prompt"], valid["chosen"]) > gold(valid["prompt"], valid["rejected"])).all() and 5 < len(valid["prompt"]) <= 20
    evaluated, _ = read_table(found["r1-evaluation"] / "samples.parquet")
    assert not set(valid["prompt"]) & (set(train["prompt"]) | set(evaluated["prompt"]))
    other = stages(run(tiny_config(store, name="evaluated", evaluation__num_prompts=7), until="reward"))
    assert other["pairs"] == found["pairs"] and other["r1-reward"] == found["r1-reward"]


def test_pmap_in_one_of_several_processes_is_refused(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"pmap.* one process.* 2"):
        run(tiny_config(tmp_path, mesh={"engine": "pmap"}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("changes", "said"), [
    ({"ppo__total_episodes": 40}, ["ppo.total_episodes 40 is no multiple of ppo.batch_size 16: every round samples 32; give 32 or 48."]),
    ({"ppo__total_episodes": 48}, []),
    ({"ppo__total_episodes": 40, "method": "dpo", "rounds": 1}, []),
])  # fmt: skip
def test_episodes_that_fill_no_batch_are_said(tmp_path, tiny_config, changes, said):
    hashes_of(tiny_config(tmp_path, **changes), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["notes"] == said


def test_until(finished, store, tiny_config):
    for until, names in (("sft", ["tokenizer", "sft"]), ("reward", ["r1-reward"]), ("ppo", ["r1-policy"])):
        folder = run(tiny_config(store, name=f"until-{until}"), until=until)
        assert list(stages(folder))[-len(names) :] == names and not (folder / "stages").joinpath("07-r2-policy").exists()
    with pytest.raises(ValueError, match=r"until 'dpo' is none of sft, reward, ppo"):
        run(tiny_config(store), until="dpo")


def test_standalone_copies_and_a_shorter_config_leaves_no_links(finished, store, tiny_config):
    folder = run(tiny_config(store, name="alone", rounds=1, standalone=True))
    assert all(path.is_dir() and not path.is_symlink() for path in (folder / "stages").iterdir())
    assert (folder / "stages" / "01-sft" / "config.json").exists()
    folder = run(tiny_config(store, name="links", method="ocrm"))
    assert "r2-update" in stages(folder)
    assert ("update", 2) in {(line["stage"], line["round"]) for line in read(folder / "metrics.jsonl")}
    run(tiny_config(store, name="links", rounds=1), replace=True)
    assert list(stages(folder))[-1] == "r1-evaluation" and len(stages(folder)) == 7
    kept = {(line["stage"], line["round"]) for line in read(folder / "metrics.jsonl")}
    assert kept == {("sft", None), ("reward", 1), ("policy", 1)}  # of the longer run nothing is left
    shutil.rmtree(store / "alone")
