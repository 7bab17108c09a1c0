"""Each guard by planted figures on both sides of its bound, worked by hand; each speaks once, and can end the run."""

import math
import typing
from dataclasses import replace

import numpy as np
import pytest

from jaxrlhf.config.guards import GuardName, GuardsConfig
from jaxrlhf.evaluation.guards import GUARDS, Guards, GuardStop, line_figures, sample_figures
from jaxrlhf.evaluation.intervals import Interval, correlation_interval, proportion
from jaxrlhf.recipe import ConfigError, from_mapping

DEFAULT = GuardsConfig()


def alone(value, n=0):
    return Interval(value, math.nan, math.nan, n)


def spoken(figures, config=DEFAULT):
    said = []
    guards = Guards(config, said.append)
    guards.see(figures, round=2, where="here")
    return guards.found, said


# Wilson at z² = 3.8415: p = (w + z²/2) / (n + z²) ± z √(w (n − w) / n + z²/4) / (n + z²).
# 55 of 100: 56.92 / 103.84 = .548 ± .096; 60 of 100: .596 ± .094; 40 of 100: .404 ± .094. 95 of 100: .933 ± .045; 97 of 100: .952 ± .037.
# 35 of 35: 35 / 38.84 = .901; 34 of 34: .899.
# r = .9 of 12: tanh(1.472 ± 1.96 / 3) = [.674, .972]; of 103: tanh(1.472 ± .196) = [.855, .932].
CASES = [
    ("reward", proportion(60, 100), proportion(55, 100)),
    ("reward", proportion(60, 100), proportion(40, 100)),
    ("reward_own_text", proportion(60, 100), proportion(50, 100)),
    ("ties", proportion(34, 34), proportion(35, 35)),
    ("cut", proportion(95, 100), proportion(97, 100)),
    ("empty", proportion(95, 100), proportion(97, 100)),
    ("kl", Interval(60.0, 49.0, 71.0, 9), Interval(60.0, 51.0, 69.0, 9)),
    ("kl", alone(50.0, 128), alone(50.1, 128)),
    ("entropy", alone(0.01, 128), alone(0.009, 128)),
    ("ess", alone(0.1, 4000), alone(0.0999, 4000)),
    ("length_correlation", Interval(0.9, 0.674, 0.972, 12), Interval(0.9, 0.855, 0.932, 103)),
    ("length_correlation", Interval(-0.9, -0.972, -0.674, 12), Interval(-0.9, -0.932, -0.855, 103)),
]


@pytest.mark.parametrize(("name", "silent", "speaks"), CASES, ids=[f"{case[0]}-{n}" for n, case in enumerate(CASES)])
def test_each_guard_on_both_sides_of_its_bound(name, silent, speaks):
    assert spoken({name: silent}) == ([], [])
    (one,), (text,) = spoken({name: speaks})
    ends = (None, None) if math.isnan(speaks.low) else (speaks.low, speaks.high)
    assert (one["name"], one["round"], one["figure"], one["low"], one["high"], one["n"]) == (name, 2, speaks.value, *ends, speaks.n)
    assert text == f"guard {name}: {one['text']}" and "\n" not in text
    assert f"{speaks.value:.3g}" in text and f"(n = {speaks.n})" in text and f"{one['bound']:g}. Likely cause: " in text


def test_every_guard_has_its_case_and_its_name_in_the_config():
    assert [guard.name for guard in GUARDS] == list(typing.get_args(GuardName)) and {case[0] for case in CASES} == set(
        typing.get_args(GuardName)
    )
    assert {type(guard.bound(DEFAULT)) for guard in GUARDS} == {float}


def test_what_is_said_is_a_sentence_with_its_numbers():
    (one,), _ = spoken({"cut": proportion(97, 100)})
    assert one["text"].startswith(
        "round 2, here: the share of responses cut at ppo.response_length is 0.97 [0.915, 0.99] (n = 100), above 0.9. "
    )
    (one,), _ = spoken({"kl": alone(60.0)})
    assert one["text"].startswith("round 2, here: KL to the reference, nats a response, is 60, above 50. ") and one["n"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_a_guards_business(value):
    assert spoken({name: alone(value, 10) for name in ("kl", "entropy", "ess")}) == ([], [])
    assert spoken({"ties": proportion(0, 0)}) == ([], [])


def test_a_guard_speaks_once_and_in_one_block_with_the_others():
    said, kept = [], []
    guards = Guards(DEFAULT, said.append, lambda: kept.append(len(guards.found)))
    for step in (1, 2):
        guards.see({"kl": alone(60.0 * step, 4), "entropy": alone(0.0, 4)}, round=1, where=f"policy, step {step}")
    guards.see({"ess": alone(0.01, 4), "kl": alone(70.0, 4)}, round=2, where="update, step 1")
    assert [len(text.splitlines()) for text in said] == [2, 1] and kept == [2, 3]
    assert [(one["name"], one["round"], one["figure"]) for one in guards.found] == [("kl", 1, 60.0), ("entropy", 1, 0.0), ("ess", 2, 0.01)]


@pytest.mark.parametrize(("stop", "named"), [(("entropy",), "entropy"), (("ess", "kl"), "kl"), ("all", "kl")])
def test_a_guard_that_is_named_ends_the_run_after_all_is_said(stop, named):
    said = []
    guards = Guards(replace(DEFAULT, stop=stop), said.append)
    with pytest.raises(GuardStop, match=f"^guard {named}: round 1, here: .* It stands in guards.stop; .* goes on.$"):
        guards.see({"kl": alone(60.0, 4), "entropy": alone(0.0, 4)}, round=1, where="here")
    assert len(guards.found) == 2 and len(said) == 1


def test_figures_of_a_line():
    line = {"stage": "policy", "round": 1, "step": 3, "rollout/kl": 2.5, "rollout/entropy": 0.7, "ppo/entropy": 0.6}
    line |= {"rollout/eos_rate": 0.75, "rollout/length": 1.25}
    found = line_figures(line, 8)
    assert (found["kl"].value, found["kl"].n, found["entropy"].value) == (2.5, 8, 0.7)
    # Of 8 responses 2 did not end. 6 + 2·2 tokens: 1.25 tokens each; 4 ended with EOS alone at least.
    assert found["cut"] == proportion(2, 8) and found["empty"] == proportion(4, 8)
    assert line_figures({**line, "rollout/length": 9.0}, 8)["empty"].value == 0
    assert line_figures({"stage": "policy", "ppo/entropy": "NaN"}, 8).keys() == {
        "entropy"
    }  # log-probs of the sampler; stored as JSON has it
    (found,) = line_figures({"stage": "update", "weights/ess_fraction": 0.4, "weights/pairs": 4000}, 8).items()
    assert found[0] == "ess" and (found[1].value, found[1].n) == (0.4, 4000)
    assert line_figures({"stage": "update", "weights/ess_fraction": 0.4}, 8)["ess"].n == 0  # an update of the user's own
    assert line_figures({"stage": "reward", "loss/pair": 0.5}, 8) == {}


@pytest.mark.parametrize(
    ("wrong", "left"),
    [
        ({"rollout/kl": "x"}, {"entropy"}),
        ({"rollout/kl": [2.0]}, {"entropy"}),
        ({"rollout/kl": 10**400, "rollout/entropy": {}}, set()),
        ({"rollout/eos_rate": 0.5}, {"entropy", "cut"}),
        ({"rollout/eos_rate": None, "rollout/length": 2.0}, {"entropy"}),
        ({"rollout/eos_rate": "NaN", "rollout/length": 2.0}, {"entropy"}),
        ({"rollout/eos_rate": 7.0, "rollout/length": 2.0}, {"entropy"}),
        ({"rollout/eos_rate": 0.5, "rollout/length": -2.0}, {"entropy", "cut"}),
        ({"weights/ess_fraction": 0.4, "weights/pairs": None}, {"entropy", "ess"}),
        ({"weights/ess_fraction": 0.4, "weights/pairs": "Infinity"}, {"entropy", "ess"}),
    ],
)
def test_what_is_no_number_in_a_line_is_passed_over(wrong, left):
    found = line_figures({"stage": "policy", "rollout/entropy": 0.7, **wrong}, 8)
    assert found.keys() == left and found.get("ess", alone(0.4)).n == 0
    Guards(DEFAULT, print).see(found, round=1, where="here")


def test_figures_of_samples():
    columns = {
        "response_1": ["a", " ", "b b", "same"],
        "response_2": ["c", "d", "e", "same"],
        "response_1_tokens": [[1], [2], [3, 4], [5, 6, 7]],
        "ended_1": [True, True, False, True],
    }
    assert sample_figures(columns) == {"cut": proportion(1, 4), "empty": proportion(1, 4)}
    columns |= {"gold_1": [1.0, 2.0, 3.0, 4.0], "gold_2": [1.0, 2.0, 0.0, 4.0], "proxy": [1.0, 1.0, 2.0, 3.0]}
    found = sample_figures(columns)
    assert found["ties"] == proportion(2, 3)  # equal texts tie, whatever gold reads
    assert (found["length_correlation"].value, found["length_correlation"].n) == (pytest.approx(1), 4)
    assert "length_correlation" not in sample_figures(columns | {"proxy": [1.0, 1.0, 2.0, math.nan]})
    greedy = sample_figures(columns | {"response_2": columns["response_1"], "proxy": [1.0, 2.0, 1.0, 2.0]})
    assert greedy["ties"].n == 0 and spoken(greedy) == ([], [])  # of no pairs nothing is said


def test_the_interval_of_a_correlation():
    x = np.array([-1.0, -1.0, 1.0, 1.0])
    found = correlation_interval(x, np.array([-1.0, 1.0, -1.0, 3.0]))
    # Sums of squares 4 and 11, of products 2: r = 2 / √44 = .3015; artanh .3112 ± 1.96.
    assert found is not None and found.n == 4
    assert found[:3] == pytest.approx((0.30151, math.tanh(0.31119 - 1.95996), math.tanh(0.31119 + 1.95996)), abs=1e-4)
    perfect = correlation_interval(x, x)
    assert perfect is not None and (perfect.value, perfect.high) == (pytest.approx(1), pytest.approx(1))
    for other in (np.ones(4), np.array([0.0, 1.0, 2.0, math.inf])):
        assert correlation_interval(x, other) is None
    assert correlation_interval(x[:3], x[:3]) is None


def test_bounds_are_checked_and_stop_takes_names():
    base = {"pairs": {"source": "sample"}, "gold": {"kind": "toy"}}
    assert from_mapping(base | {"guards": {"stop": "all"}}).guards.stop == "all"
    assert from_mapping(base | {"guards": {"stop": ["kl", "ess"], "kl": 20}}).guards.stop == ("kl", "ess")
    for changes, named in (({"cut": 1.5}, "guards.cut is 1.5"), ({"kl": 0}, "guards.kl is 0"), ({"entropy": -1}, "guards.entropy is -1")):
        with pytest.raises(ConfigError, match=named):
            from_mapping(base | {"guards": changes})
    for stop in (["klx"], "some"):
        with pytest.raises(ConfigError, match=r"guards\.stop"):
            from_mapping(base | {"guards": {"stop": stop}})
