"""A user's scorer: how it is found, and what is checked of its answers."""

import sys
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.scorers.function import checked, function_scorer


def lengths(prompts, responses):
    return [len(r) for r in responses]


@pytest.fixture
def module(monkeypatch):
    made: Any = types.ModuleType("a_users_rewards")
    made.lengths = lengths
    made.version = "1"
    made.Nested = types.SimpleNamespace(lengths=lengths)
    monkeypatch.setitem(sys.modules, "a_users_rewards", made)
    return made


@pytest.mark.parametrize("name", ["a_users_rewards:lengths", "a_users_rewards:Nested.lengths"])
def test_a_named_function_scores(module, name):
    scores = function_scorer(name)(("p", "q"), ("abc", ""))
    assert scores.dtype == np.float32 and scores.tolist() == [3.0, 0.0]
    assert function_scorer(name)([], []).shape == (0,)


def test_a_module_file_on_the_path(tmp_path, monkeypatch):
    (tmp_path / "rewards_on_path.py").write_text(
        "def score(prompts, responses):\n    return [float(p == r) for p, r in zip(prompts, responses)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert function_scorer("rewards_on_path:score")(["a", "b"], ["a", "c"]).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("name", ["", "lengths", "a_users_rewards:", ":lengths", "a.b.lengths", ".a:lengths"])
def test_malformed_names(name):
    with pytest.raises(ValueError, match="module:attribute"):
        function_scorer(name)


def test_what_is_not_there(module, tmp_path, monkeypatch):
    with pytest.raises(ImportError, match="PYTHONPATH"):
        function_scorer("no_such_module_here:score")
    with pytest.raises(ImportError, match=r"'length' there; it has .*lengths"):
        function_scorer("a_users_rewards:length")
    with pytest.raises(TypeError, match="is a str"):
        function_scorer("a_users_rewards:version")
    (tmp_path / "needs_more.py").write_text("import no_such_module_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_here") as caught:  # the user's own missing import is shown as it is
        function_scorer("needs_more:score")
    assert "PYTHONPATH" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [[1, 2], (1.0, 2.0), np.array([1, 2], np.float64), np.array([1, 2], np.int8), jnp.array([1.0, 2.0]), jnp.array([1, 2], jnp.bfloat16)],
    ids=lambda a: f"{type(a).__name__}-{getattr(a, 'dtype', '')}",
)
def test_answers_that_are_fine(answer):
    scores = checked(lambda p, r: answer, "f")(["", ""], ["", ""])
    assert scores.dtype == np.float32 and scores.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (1.0, r"shape \(\) for 2 responses"),
        ([1.0], r"shape \(1,\) for 2 responses"),
        ([[1.0], [2.0]], r"shape \(2, 1\) for 2 responses"),
        (None, r"shape \(\)"),
        ([[1.0], [2.0, 3.0]], "list that is no array"),
        (["1", "2"], "not real numbers"),
        ([1.0, None], "not real numbers"),
        ([1.0, 2j], "not real numbers"),
        ([1.0, float("nan")], r"nan for response 1 \('two'\), and 1 of 2"),
        ([float("inf"), float("-inf")], r"inf for response 0 \('one'\), and 2 of 2"),
        ([1e300, 0.0], r"1e\+300 for response 0"),
    ],
)
def test_answers_that_are_wrong_are_named(answer, message):
    with pytest.raises(ValueError, match=message) as caught:
        checked(lambda p, r: answer, "my:scorer")(["", ""], ["one", "two"])
    assert "my:scorer" in str(caught.value)


def test_the_users_own_error_passes_through_and_lengths_must_agree():
    def broken(prompts, responses):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        checked(broken, "f")(["a"], ["b"])
    with pytest.raises(ValueError, match="1 prompts but 2 responses"):
        checked(lengths, "f")(["a"], ["b", "c"])


def test_parameters_are_looked_at_before_anything_is_scored(module):
    module.alone = lambda responses: [0.0]
    module.keyword = lambda prompts, responses, *, judge: [0.0]
    module.more = lambda prompts, responses, judge=None, **options: [0.0] * len(responses)
    for name in ("alone", "keyword"):
        with pytest.raises(
            TypeError, match=rf"'a_users_rewards:{name}' cannot be called as f\(prompts, responses\) \(.*\); give it those two"
        ):
            function_scorer(f"a_users_rewards:{name}")
    assert function_scorer("a_users_rewards:more")(["a"], ["b"]).tolist() == [0.0]
