"""What an evaluation says where gold, or every reference, is missing, and of an ensemble."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxrlhf.config import Config
from jaxrlhf.data.pairs import Prompt
from jaxrlhf.data.read_report import ReadReport
from jaxrlhf.evaluation.diagnostics import reliability, write_reliability
from jaxrlhf.evaluation.guards import Guards
from jaxrlhf.evaluation.intervals import Interval, as_fields
from jaxrlhf.evaluation.samples import Samples
from jaxrlhf.pipeline.stages import ensemble
from jaxrlhf.pipeline.stages.ensemble import reward_inputs, spread_of
from jaxrlhf.pipeline.stages.evaluation import gold_change, gold_figures, proxy_figures
from jaxrlhf.pipeline.summary import Summary
from jaxrlhf.storage.blocks import NOWHERE
from jaxrlhf.storage.stage import Done


def samples(*references, gold):
    rows = [Prompt(str(i), f"p{i}", "", reference) for i, reference in enumerate(references)]
    texts = [f"response {i}" for i in range(len(rows))]
    return Samples(rows, (), (texts, texts), None if gold is None else (np.array(gold, np.float32),) * 2)  # type: ignore[arg-type]


def length(prompts, responses, blocks):
    return np.array([len(response) for response in responses], np.float32)


def test_only_prompts_with_a_reference_count_for_the_win_rate():
    figures = gold_figures(samples("ab", None, "abc", gold=[3, 9, 3]), length)
    assert figures["gold"] == 5 and figures["win_rate"] == 0.5 and figures["tie_rate"] == 0.5
    assert 0 < (figures["win_rate_low"] or 0) < 0.5 < (figures["win_rate_high"] or 0) < 1


def test_a_response_that_is_its_reference_ties_however_gold_rounds():
    drawn = samples("response 0", "response 0", gold=[3, 3])

    def noisy(prompts, responses, blocks):  # a model in batches: the same text, another rounding
        return np.array([2.9999998, 2.5], np.float32)

    figures = gold_figures(drawn, noisy)
    assert figures["tie_rate"] == 0.5 and figures["win_rate"] == 0.5  # the second is another text, and wins


@pytest.mark.parametrize("gold", [None, [1, 2]])
def test_without_references_there_is_no_win_rate(gold):
    figures = gold_figures(samples(None, None, gold=gold), None if gold is None else length)
    assert figures["gold"] == (gold and 1.5) and figures["win_rate"] is figures["win_rate_low"] is figures["tie_rate"] is None
    assert figures["gold_n"] == (gold and 2)


def test_what_a_round_changed_is_paired_over_prompts():
    """Hard and easy prompts differ by far more than the policies do: unpaired the change would drown."""
    before, after = samples(*"abcd", gold=[0, 10, 20, 30]), samples(*"abcd", gold=[1, 11.5, 21, 30.5])
    change = gold_change(after, before)
    assert change["gold_change"] == 1.0 and change["gold_change_low"] > 0.3 and change["gold_change_n"] == 4
    assert gold_figures(after, length)["gold_low"] < 0
    assert gold_change(after, after)["gold_change"] is None  # π_SFT, which no round made


MEMBERS = [Done(name, Path(name), name, {}) for name in ("a", "b")]
SAYS = {
    "a": {"late": [1.0, 3.0], "first": [0.0, 2.0], "second": [1.0, 1.0]},
    "b": {"late": [2.0, 0.0], "first": [4.0, 0.0], "second": [1.0, 1.5]},
}
BIAS = {"a": 0.0, "b": 0.5}


@pytest.fixture
def setting(monkeypatch):
    """Reward models whose scores are written down in SAYS, less their bias."""
    monkeypatch.setattr(ensemble, "reward_bias", lambda loaded: BIAS[loaded.model])
    monkeypatch.setattr(
        ensemble, "score_responses", lambda model, params, table, *, bias, **_: np.array(SAYS[model][table], np.float32) - np.float32(bias)
    )
    return SimpleNamespace(
        load=lambda done, head: SimpleNamespace(model=done.hash, params=None), config=Config(), mesh=None, blocks=NOWHERE
    )


def proxies(setting, members, spread_coef):
    late = Samples([], ("late", None), ([], []), None)  # type: ignore[arg-type]
    gold = (np.array([1.0, 0.0]), np.array([0.0, 1.0]))  # of the first prompt the first response is better, of the second the second
    early = Samples([], ("first", "second"), ([], []), gold)  # type: ignore[arg-type]
    return proxy_figures(setting, members, spread_coef, late, early)


def test_one_reward_model_speaks_for_itself(setting):
    figures, proxy, start = proxies(setting, MEMBERS[:1], None)
    assert (figures["proxy"], figures["proxy_start"], figures["reward_accuracy"]) == (2.0, 1.0, 0.0) and proxy.tolist() == [1.0, 3.0]
    assert (figures["proxy_change"], figures["proxy_change_low"]) == (1.0, None)  # +1 twice: nothing varies
    assert figures["reward_accuracy_n"] == 2 and figures["reward_accuracy_low"] == 0 and figures["reward_accuracy_high"] > 0.6
    assert [scores.tolist() for scores in start] == [[0.0, 2.0], [1.0, 1.0]]


def test_an_ensemble_speaks_with_one_voice(setting):
    """Less its bias b says 1.5, −.5 late, 3.5, −.5 and .5, 1 before: accuracies and proxies are those of the joined scores."""
    figures, proxy, _ = proxies(setting, MEMBERS, 0.0)
    assert proxy.tolist() == [1.25, 1.25] and figures["proxy"] == 1.25
    # Before: means 1.75, .75 and .75, 1.25, so the ensemble is right twice, where a is never.
    assert figures["proxy_start"] == 1.25 and figures["reward_accuracy"] == 1.0
    assert figures["proxy_spread"] == pytest.approx((0.25 + 1.75) / 2) and figures["proxy_start_spread"] == pytest.approx((1.75 + 1.25) / 2)
    pessimistic, proxy, _ = proxies(setting, MEMBERS, 1.0)
    np.testing.assert_allclose(proxy, [1.0, -0.5])
    # 0, −.5 and .5, 1: of the first prompt it now prefers the second response.
    assert pessimistic["proxy_start"] == pytest.approx(-0.25) and pessimistic["reward_accuracy"] == 0.5


def test_members_are_inputs_by_number_and_the_mean_has_no_coefficient():
    assert list(reward_inputs(MEMBERS[:1])) == ["reward"] and list(reward_inputs(MEMBERS)) == ["reward", "reward-1"]
    assert [spread_of(kind, Config()) for kind in (None, "mean", "mean-minus-spread")] == [None, 0.0, Config().reward.spread_coef]


class Stop(Exception):
    pass


def evaluated(monkeypatch, config, folder, *, held_out, kept, policy="a", figures=None):
    """The stage of a policy whose texts are given; without `figures` it stops once the responses are there. (Its result, what it noted.)"""
    from jaxrlhf.pipeline.stages import evaluation

    said: list[str] = []
    prompts = [Prompt(str(i), f"p{i}", "", None) for i in range(held_out)]
    cut = ReadReport(kept=kept, rows=list(range(kept)), dropped=[("there", "prompt is 9 tokens of 8")] * (held_out - kept))
    monkeypatch.setattr(evaluation.inputs, "evaluation_prompts_of", lambda config, tokenizer: prompts)
    monkeypatch.setattr(evaluation, "tokenize_prompts", lambda rows, tokenizer, limits: (None, cut))
    monkeypatch.setattr(evaluation, "two_responses", lambda *given, **how: ((None, None), (["x"] * kept, ["y"] * kept)))
    monkeypatch.setattr(evaluation.inputs, "gold_of", lambda config, mesh: None)
    monkeypatch.setattr(evaluation, "write_samples", lambda *given, **more: None)
    monkeypatch.setattr(evaluation, "eos_ids", lambda loaded: (0,))

    def length_figures(*given):
        if figures is None:
            raise Stop
        return {}

    monkeypatch.setattr(evaluation, "length_figures", length_figures)
    monkeypatch.setattr(evaluation, "kl_to", lambda *given: np.array(figures, np.float32))
    run = SimpleNamespace(
        config=config,
        log=SimpleNamespace(note=said.append),
        report_rows=lambda *given: None,
        build=lambda stage, fn, round: fn(folder),
        load=lambda done, head: SimpleNamespace(tokenizer=None),
        mesh=None,
        blocks=NOWHERE,
    )
    given = {"sft": Done("a", folder, "a", {}), "rewards": (), "ensemble": None, "before": None}
    try:
        return evaluation.evaluation_stage(run, 0, policy=Done(policy, folder, policy, {}), **given), said  # type: ignore[arg-type]
    except Stop:
        return None, said


@pytest.mark.parametrize(
    ("held_out", "kept", "why"),
    [
        (15, 15, "15 are held out"),
        (17, 15, "17 are held out, 2 of them too long"),
        (150, 140, "10 of those held out are too long"),
    ],
)
def test_the_note_says_how_many_prompts_there_are(held_out, kept, why, tmp_path, tiny_config, monkeypatch):
    """Of data that was asked for 150: the note says the real number, that they are few, and why."""
    _, said = evaluated(monkeypatch, tiny_config(tmp_path, evaluation__num_prompts=150), tmp_path, held_out=held_out, kept=kept)
    expected = f"SFT evaluation on {kept} prompts (warning: evaluation.num_prompts asks for 150, {why}; intervals are wider for it)"
    assert said[0] == expected, said


def test_a_policy_that_diverged_has_no_kl_and_the_run_goes_on(tmp_path, tiny_config, monkeypatch):
    config = tiny_config(tmp_path, evaluation__num_prompts=3)
    result, _ = evaluated(monkeypatch, config, tmp_path, held_out=3, kept=3, policy="b", figures=[1.0, np.nan, 2.0])
    assert {name: result[name] for name in result if "kl" in name} == {
        "kl_sft": None, "kl_sft_low": None, "kl_sft_high": None, "kl_sft_n": 3,
    }  # fmt: skip


def test_a_reward_model_that_diverged_has_no_figures(setting, monkeypatch, tmp_path):
    monkeypatch.setitem(SAYS, "a", {"late": [np.nan, 3.0], "first": [0.0, np.nan], "second": [1.0, 1.0]})
    figures, proxy, start = proxies(setting, MEMBERS[:1], None)
    assert [figures[name] for name in ("proxy", "proxy_start", "proxy_change", "reward_accuracy")] == [None] * 4
    assert (figures["proxy_n"], figures["proxy_change_n"]) == (2, 2) and np.isnan(proxy[0])
    diagram = reliability(start, (np.array([1.0, 0.0]), np.array([0.0, 1.0])))
    write_reliability(tmp_path, diagram)
    assert (diagram["pairs"], diagram["ece"]) == (0, None)


def test_the_summary_names_the_figures_that_are_not_finite(tmp_path):
    silent = {"log": SimpleNamespace(note=lambda text: None), "guards": Guards(Config().guards, lambda text: None)}
    run = SimpleNamespace(stages=[], config=Config(), folder=tmp_path, **silent)
    summary = Summary(run, 1)  # type: ignore[arg-type]
    figures = as_fields("gold", Interval(1.0, 0.5, 1.5, 20)) | as_fields("kl_sft", Interval(np.nan, np.nan, np.nan, 20))
    summary.add(None, Done("e", tmp_path, "e", {"result": figures}))
    said = "not finite on every prompt, and so without a value: kl_sft; the policy or its reward model has diverged."
    assert summary.notes == [f"round 0: {said}"]
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] is False
