"""Labels of sampled pairs: ties, flips, equal texts, and that a row's label is its own."""

import numpy as np
import pytest

from jaxrlhf.data.pairs import Prompt
from jaxrlhf.offline.label import label_pairs


def prompts(n):
    return [Prompt(f"p{i}", f"prompt {i}", f"f:{i}") for i in range(n)]


def label(first, second, gold_first, gold_second, *, rule="argmax", label_flip=0.0, seed=0, n=None):
    gold = (np.asarray(gold, np.float32) for gold in (gold_first, gold_second))
    return label_pairs(prompts(n or len(first)), first, second, *gold, rule=rule, label_flip=label_flip, seed=seed)


def test_argmax_takes_the_higher_and_the_first_of_a_tie():
    pairs, wins, kept = label(["a", "b", "c"], ["x", "y", "z"], [1.0, 0.25, 2.0], [0.5, 0.75, 2.0])
    assert [(p.chosen, p.rejected) for p in pairs] == [("a", "x"), ("y", "b"), ("c", "z")]
    assert wins.tolist() == [True, False, True] and kept.tolist() == [0, 1, 2]
    assert [p.prompt for p in pairs] == ["prompt 0", "prompt 1", "prompt 2"] and pairs[1].source == "f:1"


def test_strict_leaves_ties_out():
    pairs, wins, kept = label(["a", "b", "c"], ["x", "y", "z"], [1.0, 0.25, 2.0], [0.5, 0.75, 2.0], rule="strict")
    assert [(p.chosen, p.rejected) for p in pairs] == [("a", "x"), ("y", "b")]
    assert wins.tolist() == [True, False] and kept.tolist() == [0, 1]
    assert label(["a"], ["x"], [1.0], [1.0], rule="strict")[0] == []


def test_equal_texts_are_left_out_and_ids_stay_unique():
    texts = (["same", "a", "b"], ["same", "c", "d"])
    pairs, wins, kept = label(*texts, [0, 1, 0], [0, 0, 1])
    assert kept.tolist() == [1, 2] and wins.tolist() == [True, False] and len(pairs) == 2
    one = prompts(1) * 3  # one prompt sampled three times, twice with the same outcome
    pairs, _, _ = label_pairs(
        one, ["a", "c", "a"], ["c", "a", "b"], np.array([1, 0, 1]), np.array([0, 1, 0]), rule="argmax", label_flip=0.0, seed=0
    )
    first, second, third = (p.id for p in pairs)
    assert second == f"{first}-1" and third != first


@pytest.mark.parametrize("rule", ["argmax", "bradley_terry"])
def test_flips_are_a_share_of_the_labels(rule):
    n = 4000
    gap = np.full(n, 1.0)
    texts = [f"a{i}" for i in range(n)], [f"b{i}" for i in range(n)]
    share = label(*texts, gap, 0 * gap, rule=rule, label_flip=0.2)[1].mean()
    sure = 1.0 if rule == "argmax" else 1 / (1 + np.exp(-1.0))
    expected = 0.8 * sure + 0.2 * (1 - sure)
    assert share == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / n))


def test_a_rows_label_does_not_depend_on_the_others():
    n = 50
    texts, gold = ([f"a{i}" for i in range(n)], [f"b{i}" for i in range(n)]), (np.zeros(n), np.zeros(n))
    options = {"rule": "bradley_terry", "label_flip": 0.3, "seed": 5}
    whole = label(*texts, *gold, **options)[1]
    part = label(*(t[:20] for t in texts), *(g[:20] for g in gold), **options)[1]
    assert part.tolist() == whole[:20].tolist()
    other = label(*texts, *gold, **(options | {"seed": 6}))[1]
    assert other.tolist() != whole.tolist() and 5 < whole.sum() < 45


def test_labels_that_say_the_opposite_are_refused():
    with pytest.raises(ValueError, match=r"pairs.label_flip is 0.5; it must lie in \[0, 0.5\)"):
        label(["a"], ["b"], [1], [0], label_flip=0.5)
