"""The figures of a comparison, by hand; what is written, and that equal texts tie."""

import json

import numpy as np
import pytest

from jaxrlhf.comparison.figures import Texts, compare, gold_scores, score_once
from jaxrlhf.comparison.judge import Judged, Verdict
from jaxrlhf.comparison.judge_replies import FIRST, SECOND, TIE
from jaxrlhf.comparison.tables import as_markdown, main_table, reference_table, write_comparison
from jaxrlhf.evaluation.winrate import length_controlled, paired_difference

A = ["aaaa", "b", "cc", "same", "e e", ""]
B = ["aa", "bb", "cc c", "same", "e", "f"]
R = ["rrr", "", None, "same", "e e e", "g"]
TEXTS = Texts([f"id {i}" for i in range(6)], [f"p{i}" for i in range(6)], A, B, R)
USAGE = {
    "pairs": 6, "judged": 5, "no_verdict": 1, "identical": 1, "first_rate": 0.5, "consistency": 0.75, "answers": 9, "nonsense": 1,
    "refused": 0, "unanswered": 0, "failures": [], "prompt_tokens": 900,
    "completion_tokens": 27, "requests": 11, "answers_without_token_count": 0,
    "cost": None, "asked_now": 9,
}  # fmt: skip
VERDICTS = [
    Verdict(1.0, (FIRST, SECOND), ("k0", "k1")), Verdict(0.0, (SECOND, FIRST), ("k2", "k3")), Verdict(0.5, (FIRST, FIRST), ("k4", "k5")),
    Verdict(0.5, (TIE, TIE), None), Verdict(None, (None, TIE), ("k6", "k7")), Verdict(0.0, (SECOND, FIRST), ("k8", "k9")),
]  # fmt: skip


def gold(prompts, responses):
    """Letters, without spaces."""
    return np.array([len(r.replace(" ", "")) for r in responses], np.float32)


def test_figures_by_hand():
    figures, rows = compare(TEXTS, ("mine", "yours"), gold=gold_scores(TEXTS, gold), judged=Judged(VERDICTS, USAGE))
    # gold: 4>2 won, 1<2 lost, 2<3 lost, tie, 2>1 won, 0<1 lost
    assert [row["gold_outcome"] for row in rows] == [1.0, 0.0, 0.0, 0.5, 1.0, 0.0]
    one = figures["gold"]
    assert (one["n"], one["win_rate"], one["tie_rate"], one["score"]) == (
        6,
        pytest.approx(2 / 6),
        pytest.approx(1 / 6),
        pytest.approx(2.5 / 6),
    )
    assert one["win_rate_low"] < 2 / 6 < one["win_rate_high"] and one["score_low"] < 2.5 / 6 < one["score_high"]
    assert one["difference"]["difference"] == pytest.approx((2 - 1 - 1 + 0 + 1 - 1) / 6)
    assert figures["a"]["gold"]["value"] == pytest.approx(13 / 6) and figures["b"]["gold"]["value"] == pytest.approx(13 / 6)
    assert (figures["a"]["length"], figures["b"]["length"], figures["length_unit"]) == (14 / 6, 14 / 6, "characters")
    won, d = np.array([1, 0, 0, 0.5, 1, 0]), np.array([2, -1, -2, 0, 2, -1.0])
    assert one["length_controlled"] == length_controlled(won, d)._asdict()  # type: ignore[union-attr]
    assert sum(b["n"] for b in one["by_length"]) == 6 and one["by_length"][-1]["score"] == 1.0
    # the judge: the pair without a verdict is out of n
    two = figures["judge"]
    assert (two["n"], two["win_rate"], two["tie_rate"], two["score"]) == (5, 0.2, 0.4, 0.4) and two["usage"] == USAGE
    assert two["length_controlled"] == length_controlled(np.array([1, 0, 0.5, 0.5, 0]), np.array([2, -1, -2, 0, -1.0]))._asdict()  # type: ignore[union-attr]
    assert [b["n"] for b in two["by_length"]] == [1, 2, 1, 1]
    assert rows[4]["judge_outcome"] is None and rows[0]["judge_answers"] == ("k0", "k1")
    assert figures["agreement"] == {"n": 3, "rate": 1.0}
    # against the references of the five prompts that have one: a: 4>3, 1>0, tie, 2<3, 0<1; b: 2<3, 2>0, tie, 1<3, tie
    against = figures["against_references"]
    assert (against["a"]["n"], against["a"]["win_rate"], against["a"]["tie_rate"]) == (5, 0.4, 0.2)
    assert (against["b"]["win_rate"], against["b"]["tie_rate"]) == (0.2, 0.4)
    assert against["difference"] == paired_difference(np.array([1, 1, 0.5, 0, 0]), np.array([0, 1, 0.5, 0, 0.5]))._asdict()
    assert "gold_reference" not in rows[2] and rows[0]["gold_reference"] == 3.0


def test_words_and_what_is_not_there():
    figures, rows = compare(TEXTS, ("a", "b"), gold=gold_scores(TEXTS, gold), measure="words")
    assert [row["length_b"] for row in rows] == [1, 1, 2, 1, 1, 1] and figures["judge"] is None and figures["agreement"] is None
    # b is the references themselves: measuring against them says the same again
    of_reference = TEXTS._replace(b=["r"] * 6, references=["r"] * 6)
    assert compare(of_reference, ("a", "reference"), gold=gold_scores(of_reference, gold)).figures["against_references"] is None
    without = TEXTS._replace(references=[None] * 6)
    assert compare(without, ("a", "b"), gold=gold_scores(without, gold)).figures["against_references"] is None
    only_judge = compare(TEXTS, ("a", "b"), judged=Judged(VERDICTS, USAGE))
    assert only_judge.figures["gold"] is None and "gold_a" not in only_judge.rows[0]
    with pytest.raises(ValueError, match="length 'tokens' is none of characters, words"):
        compare(TEXTS, ("a", "b"), gold=gold_scores(TEXTS, gold), measure="tokens")


def test_nothing_judged_is_null_and_not_nan(tmp_path):
    none = [Verdict(None, (None, None), ("x", "y"))] * 6
    done = compare(TEXTS, ("a", "b"), judged=Judged(none, USAGE | {"judged": 0, "no_verdict": 6, "consistency": None, "first_rate": None}))
    judge = done.figures["judge"]
    assert judge["n"] == 0 and judge["win_rate"] is judge["score"] is judge["length_controlled"] is None and judge["by_length"] == []
    write_comparison(done, tmp_path)
    assert "| A wins (strictly) | – |" in (tmp_path / "comparison.md").read_text()
    json.loads((tmp_path / "comparison.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_equal_texts_are_scored_once():
    seen = []

    def noisy(prompts, responses):  # as a model in batches: the same text, another rounding
        seen.extend(zip(prompts, responses, strict=True))
        return np.arange(len(responses), dtype=np.float32)

    a, b, r = score_once(noisy, (["p", "q"], ["x", "x"]), (["p", "q"], ["x", "y"]), (["q"], ["x"]))
    assert len(seen) == len(set(seen)) == 3
    assert a[0] == b[0] and a[1] != b[1] and r[0] == a[1] != a[0]
    assert [len(s) for s in score_once(noisy, ([], []), ([], []))] == [0, 0]


def test_a_score_that_is_no_number_stops_it():
    with pytest.raises(ValueError, match="not finite"):
        compare(TEXTS, ("a", "b"), gold=gold_scores(TEXTS, lambda prompts, responses: np.full(len(responses), np.nan, np.float32)))


def test_what_is_written(tmp_path):
    done = compare(TEXTS, ("mine | x", "yours"), gold=gold_scores(TEXTS, gold), judged=Judged(VERDICTS, USAGE))
    done.figures["notes"] = ["something to know"]
    write_comparison(done, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["comparison.json", "comparison.jsonl", "comparison.md"]
    assert json.loads((tmp_path / "comparison.json").read_text()) == json.loads(json.dumps(done.figures))
    rows = [json.loads(line) for line in (tmp_path / "comparison.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == TEXTS.ids and rows[3]["a"] == rows[3]["b"] == "same"
    text = (tmp_path / "comparison.md").read_text()
    assert text == as_markdown(done.figures)
    for part in (
        "| A wins (strictly) | 33.3 % [",
        "| ties | 16.7 % | 40.0 % |",
        "- something to know",
        "mine | x",
        "gold: A longer by (characters)",
    ):
        assert part in text, part
    assert "5 of 6 verdicts in 11 requests, 900 tokens in and 27 out, cost unknown." in text and "1 questions with nonsense" in text
    head, table = main_table(done.figures)
    assert head == ("A against B", "gold", "judge") and {len(row) for row in table} == {3}
    assert reference_table(done.figures)[2][3].startswith("10.0 % [")
