"""What an evaluation says where gold, or every reference, is missing."""

import numpy as np
import pytest

from jaxrlhf.data.pairs import Prompt
from jaxrlhf.run.evaluate import Samples, gold_figures


def samples(*references, gold):
    rows = [Prompt(str(i), f"p{i}", "", reference) for i, reference in enumerate(references)]
    return Samples(rows, (), ([], []), None if gold is None else (np.array(gold, np.float32),) * 2)  # type: ignore[arg-type]


def length(prompts, responses):
    return np.array([len(response) for response in responses], np.float32)


def test_only_prompts_with_a_reference_count_for_the_win_rate():
    figures = gold_figures(samples("ab", None, "abc", gold=[3, 9, 3]), length)
    assert figures["gold"] == 5 and figures["win_rate"] == 0.5 and figures["tie_rate"] == 0.5
    assert 0 < (figures["win_rate_low"] or 0) < 0.5 < (figures["win_rate_high"] or 0) < 1


@pytest.mark.parametrize("gold", [None, [1, 2]])
def test_without_references_there_is_no_win_rate(gold):
    figures = gold_figures(samples(None, None, gold=gold), None if gold is None else length)
    assert figures == {"gold": gold and 1.5, "win_rate": None, "win_rate_low": None, "win_rate_high": None, "tie_rate": None}
