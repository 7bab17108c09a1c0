"""Triggers: what they measure against figures taken another way, both sides of every threshold, and rounds that go on without a refit."""

import json
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest
from plain import token_logp

import jaxrlhf
from jaxrlhf import rng
from jaxrlhf.data.tables import read_pair_table, read_table
from jaxrlhf.losses import sequence_logp
from jaxrlhf.monitoring.metrics_file import read
from jaxrlhf.pipeline import loop
from jaxrlhf.pipeline.run import run
from jaxrlhf.pipeline.stages import policy, refit
from jaxrlhf.pipeline.stages.refit import MEASURES, THRESHOLDS, decision_text, ess_share
from jaxrlhf.recipe import ConfigError, from_mapping
from jaxrlhf.report.arms import collect
from jaxrlhf.storage.record import read_record

pytestmark = pytest.mark.usefixtures("one_device")

# A policy that moves by about a nat a round; a temperature of evaluation that is not that of the pairs.
FAST = {"ppo__learning_rate": 3e-2, "ppo__lr_scheduler_type": "constant", "evaluation__temperature": 0.8}
NEVER = {"kl": {"refit__kl_budget": 1e6}, "ess": {"refit__ess_floor": 1e-6}, "accuracy": {"refit__accuracy_drop": 1.0}}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """One store for all runs of this module."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run_with(store, tiny_config):
    """run_with(name, when, key=value, …): a run of `retrain` that refits when `when` says so."""
    return lambda name, when, **changes: run(
        tiny_config(store, **{"name": name, "method": "retrain", "refit__when": when, **FAST, **changes})
    )


@pytest.fixture(scope="module")
def never(run_with) -> dict[str, Path]:
    """One run a trigger, each with a threshold that is never reached."""
    return {when: run_with(f"never-{when}", when, **NEVER[when]) for when in MEASURES}


def stages(folder: Path) -> dict[str, Path]:
    return {link.name[3:]: link.resolve() for link in sorted((folder / "stages").iterdir())}


def decision(folder: Path, number: int = 2) -> dict:
    return read_record(stages(folder)[f"r{number}-refit"])["result"]


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "summary.json").read_text())["rounds"]


def params_of(folder: Path, head="lm"):
    return jax.tree.leaves(jaxrlhf.load(folder, head=head).params)


def same(a, b) -> bool:
    return all((x == y).all() for x, y in zip(a, b, strict=True))


def padded(prompts, responses):
    """(tokens, mask, start) of texts whose prompts are equally long, padded on the right."""
    tokens = np.array([prompt + response + [0] * (8 - len(response)) for prompt, response in zip(prompts, responses, strict=True)])
    lengths = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
    return tokens, np.arange(tokens.shape[1]) < lengths[:, None], len(prompts[0])


def logps(folder: Path, prompts, responses, temperature: float) -> np.ndarray:
    """Log-probs of unpadded responses, from the logits."""
    tokens, mask, start = padded(prompts, responses)
    loaded = jaxrlhf.load(folder)
    logits = jax.jit(loaded.model.apply)(loaded.params, tokens, mask).logits[:, start - 1 : -1]
    return np.asarray(sequence_logp(token_logp(logits, tokens[:, start:], temperature=temperature), mask[:, start:]))


def test_kl_is_the_policys_own_text_under_both_policies(never):
    found = stages(never["kl"])
    samples, _ = read_table(found["r1-evaluation"] / "samples.parquet")
    kl = [
        logps(found["r1-policy"], samples["prompt_tokens"], samples[f"response_{side}_tokens"], 0.8)
        - logps(found["sft"], samples["prompt_tokens"], samples[f"response_{side}_tokens"], 0.8)
        for side in (1, 2)
    ]
    result = decision(never["kl"])
    assert result["value"] == pytest.approx(np.mean(kl), rel=1e-4, abs=1e-5) and result["value"] > 0.3
    assert result["stderr"] == pytest.approx(np.mean(kl, axis=0).std(ddof=1) / np.sqrt(20), rel=1e-3) and result["samples"] == 40
    assert np.mean(kl[0]) == pytest.approx(rows(never["kl"])[1]["kl_sft"], rel=1e-4)  # what the evaluation took of the first ones


def test_ess_is_that_of_the_ratio_on_the_training_pairs(never):
    found = stages(never["ess"])
    pairs, _ = read_pair_table(found["pairs"] / "train.parquet")
    table, _ = read_table(found["pairs"] / "train.parquet")
    ratio = sum(
        logps(found["r1-policy"], table["prompt_tokens"], table[side], 1.0) - logps(found["sft"], table["prompt_tokens"], table[side], 1.0)
        for side in ("chosen_tokens", "rejected_tokens")
    )
    weights = np.exp(ratio)  # weights.alpha is 0 here
    result = decision(never["ess"])
    assert result["value"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / len(pairs), rel=1e-3) and result["value"] < 0.9
    assert result["pairs"] == len(pairs) and result["ess"] == pytest.approx(result["value"] * len(pairs))


def accuracy_by_hand(reward: Path, evaluation: Path) -> float:
    samples, _ = read_table(evaluation / "samples.parquet")
    loaded, scores = jaxrlhf.load(reward, head="scalar"), []
    for side in (1, 2):
        tokens, mask, _ = padded(samples["prompt_tokens"], samples[f"response_{side}_tokens"])
        scalars = np.asarray(jax.jit(loaded.model.apply)(loaded.params, tokens, mask).scalars)
        scores.append(scalars[np.arange(len(tokens)), mask.sum(axis=1) - 1])
    right = [(a > b) == (c > d) for a, b, c, d in zip(*scores, samples["gold_1"], samples["gold_2"], strict=True) if c != d]
    return float(np.mean(right))


def test_accuracy_falls_from_the_policy_fitted_for_to_the_policy_now(never):
    found, result = stages(never["accuracy"]), decision(never["accuracy"])
    assert result["accuracy_then"] == pytest.approx(accuracy_by_hand(found["r1-reward"], found["sft-evaluation"]))
    assert result["accuracy"] == pytest.approx(accuracy_by_hand(found["r1-reward"], found["r1-evaluation"]))
    assert result["value"] == result["accuracy_then"] - result["accuracy"] != 0


@pytest.mark.parametrize(("when", "least"), [("kl", 1e-9), ("ess", 1e-9), ("accuracy", 0.0)])
def test_due_on_the_far_side_of_the_threshold_alone(when, least):
    due = MEASURES[when].due
    for threshold in (0.25, max(least, 0.01)):
        beyond = np.nextafter(threshold, -np.inf if when == "ess" else np.inf)
        assert due(beyond, threshold) and not due(threshold, threshold)
        assert not due(2 * threshold if when == "ess" else threshold / 2, threshold)


def test_every_trigger_refits_where_it_is_due(never, run_with, monkeypatch):
    """The same figure, a threshold on its other side; the three decisions lead to one and the same refit."""
    due = {"kl": {"refit__kl_budget": decision(never["kl"])["value"] * 0.99}}
    due["ess"] = {"refit__ess_floor": decision(never["ess"])["value"] * 1.01}
    due["accuracy"] = {"refit__accuracy_drop": 0.1}
    accuracies = iter([0.8, 0.5])  # at the refit, and now
    monkeypatch.setattr(refit, "agreement_with_gold", lambda *_: next(accuracies))
    found = {}
    for when, changes in due.items():
        folder = run_with(f"due-{when}", when, **changes)
        result, before = decision(folder), decision(never[when])
        assert result["due"] is True and not result["forced"] and not before["due"]
        assert result["value"] == (before["value"] if when != "accuracy" else pytest.approx(0.3))
        assert [row["refit"] for row in rows(folder)] == [False, False, True]
        assert [row["refit_value"] for row in rows(folder)] == [None, None, result["value"]]
        found[when] = stages(folder)
        names = list(found[when])
        assert names.index("r2-refit") == names.index("r1-evaluation") + 1 == names.index("r2-update") - 1
        for name, path in stages(never[when]).items():
            assert name.startswith("r2") or found[when][name] == path
        record = read_record(found[when]["r2-policy"])
        assert record["inputs"]["reference"] == found[when]["r1-policy"].name and "previous" not in record["inputs"]
    assert len({(of["r2-reward"], of["r2-policy"]) for of in found.values()}) == 1


def test_the_decision_is_logged(never):
    for when, folder in never.items():
        result = decision(folder)
        (line,) = [line for line in read(folder / "metrics.jsonl") if line["stage"] == "refit"]
        assert (line["round"], line["step"]) == (2, 1)
        assert line["refit/value"] == pytest.approx(result["value"]) and line["refit/due"] == 0
        assert (
            line["refit/threshold"] == pytest.approx(result["threshold"])
            and result["threshold"] == NEVER[when][f"refit__{THRESHOLDS[when]}"]
        )
        assert [row["refit_value"] for row in rows(folder)] == [None, None, result["value"]]
        assert [row["refit"] for row in rows(folder)] == [False] * 3


def test_never_due_is_the_row_that_restarts_nothing(never, store, tiny_config):
    """Reward model, reference, optimizer and critic go on: every trigger, and PPO that carries both, share their models to the bit."""
    row = {"restart_optimizer": False, "restart_critic": False}
    plain = stages(run(tiny_config(store, name="carries", method="ppo", row=row, **FAST)))
    for folder in never.values():
        found = stages(folder)
        assert {name: path for name, path in found.items() if name != "r2-refit"} == plain
    record = read_record(plain["r2-policy"])
    assert record["inputs"]["previous"] == plain["r1-policy"].name and record["inputs"]["reference"] == plain["sft"].name
    assert record["inputs"]["reward"] == plain["r1-reward"].name
    restarted = stages(run(tiny_config(store, name="restarts", method="ppo", **FAST)))
    assert same(params_of(restarted["r1-policy"]), params_of(plain["r1-policy"]))
    assert not same(params_of(restarted["r2-policy"]), params_of(plain["r2-policy"]))


def test_never_due_is_uninterrupted_ppo(tmp_path, tiny_config, monkeypatch):
    """Two rounds with the random numbers of one of twice as many updates end in the same bits: nothing else starts anew between them."""
    first, second = (jax.random.key_data(rng.stream(rng.root_key(0), "policy", number)).tolist() for number in (1, 2))
    train_ppo = policy.train_ppo

    def as_one_round(*given, key, start, **options):
        later = jax.random.key_data(key).tolist() == second
        key = rng.stream(rng.root_key(0), "policy", 1)
        assert jax.random.key_data(key).tolist() == first
        return train_ppo(*given, key=key, start=start + 3 * later, **options)

    monkeypatch.setattr(policy, "train_ppo", as_one_round)
    config = tiny_config(tmp_path, method="retrain", refit__when="kl", refit__kl_budget=1e6, **FAST)
    halves = stages(run(config))
    monkeypatch.undo()
    whole = stages(run(tiny_config(tmp_path, name="whole", rounds=1, **(FAST | {"ppo__total_episodes": 96}))))
    assert same(params_of(halves["r2-policy"]), params_of(whole["r1-policy"]))
    assert not same(params_of(halves["r1-policy"]), params_of(whole["r1-policy"]))


def test_max_rounds_forces_and_the_measure_starts_over(run_with):
    """Refits before rounds 3 and 5 are forced; what each decision compares is the policy now with that of the refit before."""
    folder = run_with("forced", "ess", rounds=4, refit__max_rounds=2, **NEVER["ess"])
    found = stages(folder)
    results = [decision(folder, number) for number in (2, 3, 4)]
    assert [(r["rounds"], r["forced"], r["due"]) for r in results] == [(1, False, False), (2, True, True), (1, False, False)]
    assert [row["refit"] for row in rows(folder)] == [False, False, False, True, False]
    records = [read_record(found[f"r{number}-refit"])["inputs"] for number in (2, 3, 4)]
    policies = [found[name].name for name in ("sft", "r1-policy", "r2-policy", "r3-policy")]
    assert [(r["policy"], r["fitted_for"]) for r in records] == [(policies[now], policies[then]) for now, then in ((1, 0), (2, 0), (3, 2))]
    assert read_record(found["r4-policy"])["inputs"]["reference"] == policies[2]  # the reference of the refit goes on too
    assert read_record(found["r4-policy"])["inputs"]["reward"] == found["r3-reward"].name
    budget = collect([folder]).arms[0].first.budgets
    kl = [row["penalty"] for row in budget]
    assert [row["spent"] for row in budget] == pytest.approx([kl[0], kl[1], kl[1] + kl[2], kl[1] + kl[3]])  # round 3 is in round 4's KL


@pytest.mark.parametrize(("module", "function", "share"), [(refit, "read_samples", 0.8), (loop, "update_stage", 0.9)])
def test_stopped_in_or_after_the_decision(never, run_with, monkeypatch, module, function, share):
    """The run goes on with the decision as it was taken, or takes it then; and says it once."""

    def stop(*_, **__):
        raise InterruptedError("stopped")

    value = decision(never["kl"])["value"]
    with monkeypatch.context() as patch:
        patch.setattr(module, function, stop)
        with pytest.raises(InterruptedError):
            run_with(f"stopped-{function}", "kl", refit__kl_budget=value * share)
    folder = run_with(f"stopped-{function}", "kl", refit__kl_budget=value * share)
    record = read_record(stages(folder)["r2-refit"])
    assert record["result"]["due"] and record["result"]["value"] == value and record["resumed"] == (module is refit)
    assert rows(folder)[2]["refit"] and len([line for line in read(folder / "metrics.jsonl") if line["stage"] == "refit"]) == 1


def test_what_cannot_be_measured_makes_no_refit_due(run_with, monkeypatch):
    monkeypatch.setattr(refit, "agreement_with_gold", lambda *_: None)
    folder = run_with("tied", "accuracy", refit__accuracy_drop=0.5)
    assert decision(folder)["value"] is None and decision(folder)["due"] is False and rows(folder)[2]["refit_value"] is None
    (line,) = [line for line in read(folder / "metrics.jsonl") if line["stage"] == "refit"]
    assert "refit/value" not in line and line["refit/due"] == 0
    assert "cannot be measured: no refit" in decision_text(2, decision(folder))


def test_a_policy_without_finite_log_probs_is_said(run_with, monkeypatch):
    monkeypatch.setattr(refit, "kl_to", lambda run, policy, then, texts, *_: np.full(len(texts.index_B), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"refit.when kl: the measure before round 2 is nan; the policy has diverged"):
        run_with("diverged", "kl", refit__kl_budget=77.0)


def columns(chosen, rejected):
    return {"chosen_logp": np.asarray(chosen, np.float32), "rejected_logp": np.asarray(rejected, np.float32)}


def test_ess_share_by_hand():
    """Ratios 1, 2 and 4: (1 + 2 + 4)² / (1 + 4 + 16) of 3; which side they come from is one. At α = ½ they are 1, 4/3 and 8/5."""
    then, log2 = columns([-20, -30, -40], [-5, -6, -7]), np.log(2)
    for now in (columns([-20, -30 + log2, -40], [-5, -6, -7 + 2 * log2]), columns([-20, -30, -40 + log2], [-5, -6 + log2, -7 + log2])):
        assert ess_share(now, then, alpha=0.0) == pytest.approx(49 / 21 / 3, rel=1e-5)
    weights = np.array([1, 4 / 3, 8 / 5])
    now = columns([-20, -30 + log2, -40 + 2 * log2], [-5, -6, -7])
    assert ess_share(now, then, alpha=0.5) == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / 3, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7])
def test_right_after_a_refit_every_pair_counts(alpha):
    random = np.random.default_rng(0)
    same_logps = columns(-50 + 20 * random.normal(size=333), -50 + 20 * random.normal(size=333))
    assert ess_share(same_logps, same_logps, alpha=alpha) == 1.0


def test_ratios_beyond_float32_leave_one_pair():
    assert ess_share(columns([400, 0, 0], [300, 0, 0]), columns([0, 0, 0], [0, 0, 0]), alpha=0.0) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refit": {"kl_budget": 0}}, r"refit.kl_budget is 0.0; it is in nats a response and must be above 0"),
        ({"refit": {"ess_floor": 0}}, r"refit.ess_floor is 0.0; it is a share of the pairs, 0 < ess_floor ≤ 1"),
        ({"refit": {"ess_floor": 1.5}}, r"refit.ess_floor is 1.5"),
        ({"refit": {"accuracy_drop": -0.1}}, r"refit.accuracy_drop is -0.1; it is how far the accuracy falls and must be at least 0"),
        ({"refit": {"max_rounds": 0}}, r"refit.max_rounds is 0; it must be at least 1"),
        ({"refit": {"when": "often"}}, r"refit.when is 'often'"),
        (
            {"refit": {"when": "accuracy"}, "gold": {"kind": "none"}, "pairs": {"source": "data"}, "data": {"train": "x.jsonl"}},
            r"refit.when is 'accuracy', which gold measures, but gold.kind is 'none'; name a gold scorer, or refit by kl or ess",
        ),
        (
            {"refit": {"when": "kl"}, "evaluation": {"temperature": 0}},
            r"refit.when is 'kl', which .* but evaluation.temperature 0 is greedy",
        ),
        (
            {"refit": {"when": "accuracy"}, "evaluation": {"temperature": 0}},
            r"refit.when is 'accuracy', which .* evaluation.temperature 0 is greedy",
        ),
    ],
)
def test_thresholds_that_mean_nothing(changes, message):
    base = {"pairs": {"source": "sample"}, "gold": {"kind": "toy"}}
    with pytest.raises(ConfigError, match=message):
        from_mapping(base | changes)
    for when in MEASURES:
        config = from_mapping(base | {"refit": {"when": when, "ess_floor": 1.0, "accuracy_drop": 0, "max_rounds": 1}})
        assert asdict(config.refit)[THRESHOLDS[when]] is not None
    from_mapping(base | {"refit": {"when": "ess"}, "evaluation": {"temperature": 0}})
