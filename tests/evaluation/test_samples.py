"""samples.parquet: each side keeps its own text, tokens, end and gold."""

import numpy as np

from jaxrlhf.data.pairs import Prompt
from jaxrlhf.data.tables import read_table
from jaxrlhf.evaluation.samples import SAMPLES, Samples, read_samples, write_samples
from jaxrlhf.types import TextBatch

EOS = 9


def side(*responses: list[int]) -> TextBatch:
    """Prompts [0, 1] and [2, 3, 4] of width 4, responses of width 3."""
    prompts = np.array([[0, 0, 0, 1], [0, 2, 3, 4]], np.int32)
    prompt_mask = np.array([[False, False, True, True], [False, True, True, True]])
    tokens, mask = np.zeros((2, 3), np.int32), np.zeros((2, 3), bool)
    for row, response in enumerate(responses):
        tokens[row, : len(response)], mask[row, : len(response)] = response, True
    return TextBatch(prompts, prompt_mask, tokens, mask, np.ones(2, bool), np.arange(2))  # type: ignore[arg-type]


def test_what_is_written_is_read_again(tmp_path):
    rows = [Prompt("a", "p", "", "r"), Prompt("b", "q", "", "s")]
    tables, texts = (side([5, EOS], [6]), side([7], [8, 5, EOS])), (["five", "six"], ["seven", "eight five"])
    gold = (np.array([1.0, 2.0], np.float32), np.array([3.0, 4.0], np.float32))
    starts = (np.array([0.5, 1.5]), np.array([2.5, 3.5]))
    samples = Samples(rows, tables, texts, gold)
    write_samples(tmp_path, samples, np.array([0.25, 0.75]), (EOS,), proxy=np.array([10.0, 20.0]), proxy_start=starts)

    columns, _ = read_table(tmp_path / SAMPLES)
    assert columns["response_1_tokens"] == [[5, EOS], [6]] and columns["response_2_tokens"] == [[7], [8, 5, EOS]]
    assert (columns["ended_1"], columns["ended_2"]) == ([True, False], [False, True])
    assert (columns["proxy"], columns["kl_sft"]) == ([10.0, 20.0], [0.25, 0.75])
    assert (columns["proxy_start_1"], columns["proxy_start_2"]) == ([0.5, 1.5], [2.5, 3.5])
    again = read_samples(tmp_path, pad_id=0)
    assert again.texts == texts and [row.reference for row in again.rows] == ["r", "s"]
    for one, two in zip(again.tables, tables, strict=True):
        for name in ("prompt_BL", "prompt_mask_BL", "response_BT", "response_mask_BT"):
            assert np.array_equal(getattr(one, name), getattr(two, name)), name
    assert again.gold is not None and np.array_equal(again.gold, gold)


def test_what_is_not_known_has_no_column(tmp_path):
    samples = Samples([Prompt("a", "p", "", "r"), Prompt("b", "q", "", "s")], (side([5], [6]),) * 2, (["a", "b"],) * 2, None)
    write_samples(tmp_path, samples, np.zeros(2), (EOS,))
    assert not [name for name in read_table(tmp_path / SAMPLES)[0] if name.startswith(("proxy", "gold"))]
    assert read_samples(tmp_path, pad_id=0).gold is None
