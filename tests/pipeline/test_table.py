"""The words under the table follow its numbers, whichever way these came out."""

import io
import json
import math

import pytest
import yaml
from rich.console import Console

from jaxrlhf.evaluation.intervals import Interval, as_fields, proportion
from jaxrlhf.pipeline.loop import other_temperature
from jaxrlhf.pipeline.table import findings, read_summaries, show, subset_table


def row(number, gold=None, start=None, end=None, accuracy=None, **more):
    base = {"round": number, "gold": gold, "proxy_start": start, "proxy": end, "kl_sft": 1.0, "ess": None, "reward_accuracy": accuracy}
    return base | {"win_rate": None, "win_rate_low": None, "win_rate_high": None} | more


def moved(number, gold, proxy, n, *, half=0.1, accuracy=None):
    """A round that changed gold and the proxy by so much, each ± `half`, over n prompts; the accuracy is of n pairs."""
    changes = {"gold_change": gold, "proxy_change": proxy}
    fields = {
        key: x for name, value in changes.items() for key, x in as_fields(name, Interval(value, value - half, value + half, n)).items()
    }
    fields |= as_fields("reward_accuracy", None if accuracy is None else proportion(accuracy * n, n))
    return row(number, 1 + gold, 0.0, proxy, accuracy) | fields


def summary(*rounds, seed=0, notes=()):
    return {"method": "ppo", "seed": seed, "rounds": list(rounds), "notes": list(notes)}


def said(**arms) -> str:
    return "\n".join(findings(arms))


def test_a_stale_proxy_is_called_one():
    text = said(a=summary(row(0, 1.0), moved(1, 0.5, 1.0, 500), moved(2, -0.3, 1.5, 500)))
    assert "a: gold rose in round 1 (+0.50 [0.40, 0.60]), fell in round 2 (-0.30 [-0.40, -0.20]);" in text
    assert "in round 2 its reward model liked the new policy better (+1.50 [1.40, 1.60])." in text and "noise" not in text


def test_what_lies_within_its_interval_is_not_spoken():
    """The figures of a stale proxy, an accuracy that fell and an arm that ends higher, of fifteen prompts: noise, and nothing else."""
    rounds = row(0, 1.0), moved(1, 0.5, 1.0, 15, half=0.8, accuracy=0.8), moved(2, -0.3, 0.5, 15, half=0.6, accuracy=0.6)
    golds = [{str(i): (i * 7 % 15) / 5 + shift for i in range(15)} for shift in (0.0, 0.2)]
    golds[1] = {name: value + (-1) ** int(name) for name, value in golds[1].items()}
    text = said(**{arm: summary(*rounds) | {"last_gold": gold} for arm, gold in zip("ab", golds, strict=True)})
    assert not [word for word in ("rose", "fell", "liked", "highest", "above", "below", "did not") if word in text], text
    assert (
        "a: gold's change is within noise in round 1, 2 (n = 15); the change of reward-model accuracy from round 1 to 2 is within noise"
        in text
    )
    assert "Final gold against a, prompt by prompt: within noise (n = 15): b +0.27 [-0.31, 0.84]." in text


def test_the_words_need_the_intervals():
    """A summary from before they were kept is shown, and nothing is concluded from it."""
    assert said(a=summary(row(0, 1.0), row(1, 1.5, 0.0, 1.0, 0.7), row(2, 1.2, 0.5, 2.0, 0.6))).startswith("This is one seed")


def test_a_proxy_that_fell():
    text = said(a=summary(row(0, 1.0), moved(1, 0.0, -0.5, 100)))
    assert (
        "a: gold's change is within noise in round 1 (n = 100); in round 1 the proxy fell (-0.50 [-0.60, -0.40]): the policy did not learn"
        in text
    )


@pytest.mark.parametrize(
    ("first", "second", "n", "words"),
    [
        (0.7, 0.6, 500, "fell from 0.700 (round 1) to 0.600 (round 2; -0.100 [-0.158, -0.041])"),
        (0.6, 0.7, 500, "rose from 0.600 (round 1) to 0.700 (round 2; +0.100 [0.041, 0.158])"),
        (0.7, 0.6, 50, "the change of reward-model accuracy from round 1 to 2 is within noise (n = 50)"),
    ],
)
def test_accuracy(first, second, n, words):
    assert words in said(a=summary(row(0, 1.0), moved(1, 0.5, 1.0, n, accuracy=first), moved(2, 0.5, 1.0, n, accuracy=second)))


def test_accuracy_is_told_of_the_rounds_that_have_one():
    rounds = moved(1, 0.5, 1.0, 900), moved(2, 0.5, 1.0, 900, accuracy=0.5), moved(3, 0.5, 1.0, 900, accuracy=0.6)
    assert "rose from 0.500 (round 2) to 0.600 (round 3;" in said(a=summary(row(0, 1.0), *rounds))


def test_final_gold_is_compared_on_the_same_prompts_by_arms_that_came_equally_far():
    prompt = {str(i): float(i) for i in range(40)}  # easy and hard: unpaired, nothing could be told
    a, b = (
        summary(row(0, 1.0), moved(1, 0.5, 1.0, 40)) | {"last_gold": gold}
        for gold in (prompt, {k: v + 0.5 + 0.1 * (v % 3) for k, v in prompt.items()})
    )
    text = said(a=a, b=b)
    assert "Final gold against a, prompt by prompt: above: b +0.60 [0.57, 0.62]." in text, text
    assert "Chance alone puts 5 % of rows beyond their intervals: about 0.1 of these 1." in text
    longer = b | {"rounds": [*b["rounds"], moved(2, 9.0, 1.0, 40)]}
    text = said(a=a, b=longer)
    assert "Final gold against" not in text and "Final gold of b (2) is not compared with that of a: it is not of round 1." in text
    assert "above: c +0.60" in said(a=a, b=longer, c=b)
    assert "inal gold" not in said(a=a)


def test_without_gold_nothing_is_said_of_it():
    text = said(a=summary(row(0), row(1, None, 0.0, 1.0), notes=["a note"]), b=summary(row(0), row(1, None, 0.0, 1.0), notes=["a note"]))
    assert "gold" not in text and text.count("a note") == 1


def test_a_reward_model_stands_beside_what_it_has_to_beat():
    """Of 20 held-out pairs each, by hand (Wilson); arms of which the same is true share a sentence."""
    longer, bag = ({"accuracy": a, "low": 0.5, "high": 0.9, "pairs": 20} for a in (0.75, 0.55))
    rounds = row(0), row(1, accuracy=0.6, reward_accuracy_valid=0.5), row(2, accuracy=0.6, reward_accuracy_valid=None)
    one = summary(*rounds) | {"baselines": {"longer": longer, "bag_of_words": bag}}
    text = said(a=one, b=one, c=summary(*rounds))
    assert (
        "a, b: of 20 held-out pairs the last reward model orders 0.500 [0.299, 0.701] right, the longer response 0.750 [0.500, 0.900], "
        "a bag of words 0.550 [0.500, 0.900]." in text
    )
    assert "c: of 20" not in text


def test_one_seed_is_called_one_seed():
    a = summary(row(0, 1.0), row(1, 2.0, 0.0, 1.0), seed=4)
    assert "This is one seed (4)" in said(a=a)
    assert "one seed" not in said(a=a, b=a | {"seed": 5})


def test_arms_come_in_the_order_of_the_config(tmp_path):
    for arm in ("late", "early", "removed"):
        (tmp_path / arm).mkdir()
        (tmp_path / arm / "summary.json").write_text(json.dumps(summary(row(0, 1.0)) | {"name": arm}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"arms": {"early": {}, "late": {}, "pending": {}}}, sort_keys=False))
    assert list(read_summaries(tmp_path)) == ["early", "late"]  # not by age; what left the config is left out, what is not run yet too
    assert list(read_summaries(tmp_path / "late")) == ["late"]
    with pytest.raises(FileNotFoundError, match=r"holds no summary.json: the run has not finished a round"):
        read_summaries(tmp_path / "nothing")


def test_the_table_shows_what_there_is():
    file = io.StringIO()
    rows = row(0, 1.234), row(1, 2.0, 0.5, 0.75, 0.625, ess=17.4, win_rate=0.5, win_rate_low=0.25, win_rate_high=0.75)
    show({"mine": summary(*rows), "other": summary(*rows)}, Console(file=file, width=200))
    text = file.getvalue()
    for cell in ("mine", "other", "SFT", "1.23", "0.625", "17", ".50 [.25, .75]", "–", "gold: true reward of the policy"):
        assert cell in text, cell


def test_the_table_has_as_many_intervals_as_fit():
    arms = {
        arm: summary(
            row(0, 1.0),
            moved(1, 0.5, 1.0, 40, accuracy=0.6)
            | as_fields("gold", Interval(1.5, 1.2, 1.8, 40))
            | as_fields("kl_sft", Interval(2.0, 1.5, 2.5, 40)),
        )
        for arm in ("ppo", "retrain")
    }
    printed = {}
    for width in (60, 80, 120):
        show(arms, Console(file=(file := io.StringIO()), width=width))
        printed[width] = file.getvalue()
        assert max(map(len, printed[width].splitlines())) <= width
    assert "1.50 ±.30" in printed[80] and "over n = 40 prompts" in " ".join(printed[80].split())
    # What does not fit is named, with where it stands; a name that is too long is folded, not cut, and no figure is.
    missing = {width: " ".join(text.split()).partition("too narrow for ")[2] for width, text in printed.items()}
    assert missing[60] == "the interval of gold; the interval of KL to SFT; the interval of RM accuracy. summary.json has all."
    assert missing[80] == missing[120] == ""
    long = {f"retrain-fixed-reference-{arm}": rows for arm, rows in arms.items()}
    show(long, Console(file=(file := io.StringIO()), width=80))
    table = file.getvalue().split("gold: true")[0]
    assert "…" not in table and "1.50" in table and "the interval of gold" in " ".join(file.getvalue().split())
    assert all(cell in printed[120] for cell in ("1.50 ±.30", "2.00 ±.50", "0.600 ±.145")) and "±" not in printed[60].split("gold: true")[0]


def test_without_gold_the_table_shows_the_accuracy_on_held_out_pairs():
    file = io.StringIO()
    rows = row(0, reward_accuracy_valid=None), row(1, None, 0.5, 0.75, reward_accuracy_valid=0.8125)
    show({"mine": summary(*rows)}, Console(file=file, width=80))
    text = file.getvalue()
    assert "RM acc." in text and "0.812" in text and "whether the policy became better" in " ".join(text.split())
    assert "win rate" not in text and "true reward" not in text
    file = io.StringIO()
    show({"mine": summary(*rows), "other": summary(row(0, 1.0), row(1, 2.0, 0.5, 0.75, 0.625))}, Console(file=file, width=80))
    assert "RM acc." not in file.getvalue() and "win rate" in file.getvalue()  # one arm with gold keeps its columns


def test_filtered_against_random_round_by_round():
    """Rounds that have both are set side by side, the filter first; the title says whether they kept equally many pairs."""
    zero = {"proxy": 0.2, "proxy_start": 0.1, "kl_sft": 1.0, "reward_accuracy": 0.6, "reward_accuracy_valid": 0.7, "ess": None}

    def rows(update, *pairs):
        made = [zero | {"round": n, "gold": n / 10, "update": update, "pairs": kept} for n, kept in enumerate(pairs, start=2)]
        return {"method": update, "seed": 0, "rounds": [zero | {"round": 1, "gold": 0.0, "update": None, "pairs": 40}, *made]}

    summaries = {"random": rows("random-subset", 12, 12), "near": rows("nearest", 12), "all": rows("unweighted", 40, 40)}
    found = subset_table(summaries)
    assert found is not None and [list(column.cells) for column in found.columns][:3] == [["2", "2"], ["near", "random"], ["12", "12"]]
    assert [list(column.cells) for column in found.columns][3:5] == [["0.600"] * 2, ["0.700"] * 2]
    assert str(found.title).endswith("equal budget")
    assert "NOT the same number" in str(subset_table(summaries | {"near": rows("nearest", 11)}).title)  # type: ignore[union-attr]
    assert subset_table({"near": summaries["near"], "all": summaries["all"]}) is None


@pytest.mark.parametrize(
    ("trained", "evaluated", "words"),
    [
        (1.0, 1.0, None),
        (0.7, 1.0, "the policy at evaluation.temperature 1, and KL of a rollout that at ppo.temperature 0.7"),
        (
            1.0,
            0.0,
            "greedy text (evaluation.temperature 0) under the policy at temperature 1, and KL of a rollout that at ppo.temperature 1",
        ),
    ],
)
def test_the_temperatures_of_the_kls_are_the_config_s(trained, evaluated, words, tiny_config, tmp_path):
    said = other_temperature(tiny_config(tmp_path, ppo__temperature=trained, evaluation__temperature=evaluated))
    assert said is None if words is None else words in (said or ""), said


def test_gold_that_is_not_finite_is_compared_with_nothing():
    """The report leaves it out too."""
    golds = {"a": {"0": 1.0, "1": 2.0}, "b": {"0": 1.0, "1": math.nan}, "c": {"0": 2.0, "1": 3.5}}
    text = said(**{arm: summary(row(0, 1.0), row(1, 1.0)) | {"last_gold": gold} for arm, gold in golds.items()})
    assert "c +1.25" in text and "b " not in text


def test_chance_stands_beside_rounds_that_are_told():
    """Six changes are looked at: gold's of two rounds in both arms, and the proxy's in the one where it is known."""
    told = summary(row(0, 1.0), moved(1, 0.5, 1.0, 500), moved(2, 0.05, 1.5, 500))
    noise = summary(row(0, 1.0), *({k: v for k, v in moved(n, 0.05, 1.0, 500).items() if "proxy" not in k} for n in (1, 2)))
    assert "Chance alone puts 5 % of changes beyond their intervals: about 0.3 of these 6." in said(a=told, b=noise)
    assert "hance" not in said(a=noise)
