"""The table of a sweep by hand: means, errors, differences seed by seed, missing runs, narrow screens, and words after figures."""

import io
import json
import math

import pytest
from rich.console import Console
from scipy import stats

from jaxrlhf.evaluation.curves import estimate
from jaxrlhf.evaluation.findings import Trial
from jaxrlhf.evaluation.findings import findings as findings_of
from jaxrlhf.evaluation.intervals import Interval, as_fields, chance_beyond
from jaxrlhf.formatting import with_numbers
from jaxrlhf.sweep.findings import findings
from jaxrlhf.sweep.statistics import Run, Sweep
from jaxrlhf.sweep.table import as_json, as_markdown, columns_of, show

PPO = {
    "method": "ppo", "policy_update": "ppo", "reference": "SFT, β 0.05", "reward": "kept", "restart": "optimizer + critic", "rounds": 2,
    "episodes": 96, "prompts": 96, "response_length": 8,
}  # fmt: skip


def rounds(*golds, ess=None, proxy=(0.0, 1.0), kl=1.0, accuracy=0.5, win=0.25):
    rows = [{"round": n, "gold": gold, "kl_sft": kl * n, "ess": None} for n, gold in enumerate(golds)]
    for row in rows:
        row |= {"proxy_start": proxy[0], "proxy": proxy[1], "reward_accuracy": accuracy, "win_rate": win}
    rows[0] |= {"proxy_start": None, "proxy": None, "reward_accuracy": None}
    for row, one in zip(rows[1:], ess or (), strict=False):
        row["ess"] = one
    return rows


def done(seed, arm, *golds, fits=1, seconds=10.0, notes=(), **more):
    return Run(seed, arm, "finished", rounds(*golds, **more), notes, fits, seconds, folder=f"runs/s/seed-{seed}/{arm}")


def a_sweep(*runs, sft_seed=None, **settings):
    arms = dict.fromkeys(run.arm for run in runs)
    return Sweep("s", sft_seed, {arm: PPO | settings.get(arm, {}) for arm in arms}, runs)


@pytest.fixture
def three() -> Sweep:
    """a: final gold 1, 2, 3 at the seeds 0, 1, 2; b: 3, 3, 8 at the seeds 1, 2, 5."""
    return a_sweep(
        done(0, "a", 0.0, 5.0, 1.0), done(1, "a", 0.0, 1.0, 2.0), done(2, "a", 0.0, 4.0, 3.0),
        done(1, "b", 0.0, 1.0, 3.0, ess=(None, 40.0), fits=2),
        done(2, "b", 0.0, 1.0, 3.0, ess=(60.0, None), fits=2), done(5, "b", 0.0, 1.0, 8.0, fits=2),
    )  # fmt: skip


def test_mean_and_standard_error_by_hand(three):
    assert estimate([1.0, 2.0, 3.0]) == (3, 2.0, pytest.approx(1 / math.sqrt(3)), 1.0)  # s = 1
    assert estimate([4.0]) == (1, 4.0, None, 4.0) and estimate([]) is None
    assert three.estimate("a", "gold") == estimate([1.0, 2.0, 3.0])
    assert three.estimate("a", "peak").mean == pytest.approx((5 + 2 + 4) / 3)  # the best of each seed's trained rounds
    assert three.estimate("b", "ess") == (2, 50.0, pytest.approx(10.0), 40.0)  # the last there is; a seed without is left out
    assert three.estimate("a", "ess") is None and three.estimate("b", "fits").mean == 2
    assert three.estimate("a", "kl_sft").mean == 2.0


def test_differences_are_paired_over_the_seeds_both_have(three):
    found = three.difference("b")  # seeds 1 and 2: 3 − 2 and 3 − 3
    assert found == (2, 0.5, pytest.approx(0.5), 0.0)
    assert three.difference("a") is None
    apart = a_sweep(done(0, "a", 0.0, 1.0), done(1, "b", 0.0, 2.0))
    assert apart.difference("b") is None and "above" not in " ".join(findings(apart))


def test_seeds_that_do_not_vary_are_not_exact():
    """0 of 20 wins at both seeds: no ± that says 0, in the table and under it."""
    page = as_markdown(a_sweep(*(done(seed, arm, 0.0, 1.0 + seed, win=0.0) for seed in (0, 1) for arm in ("a", "b"))))
    assert "± 0.00 " not in page and "± 0 |" not in page and "1.50 ± 0.50" in page, page
    assert "| +0.00 |" in page and "all alike, which does not make the figure exact" in page


def test_sft_is_no_round_that_can_be_best():
    assert a_sweep(done(0, "a", 9.0, 1.0, 2.0)).estimate("a", "peak").mean == 2.0


def test_spelled():
    assert estimate([1.0, 2.0, 3.0]).spelled(2) == "2.00 ± 0.58" and estimate([1.0]).spelled(2, sign=True) == "+1.00"  # type: ignore[union-attr]


@pytest.mark.parametrize("n", [2, 3, 10])
def test_chance_is_students_t(n):
    assert chance_beyond(n) == pytest.approx(2 * stats.t.sf(2, n - 1), rel=1e-4)


def test_findings_name_the_rows_beyond_two_errors():
    runs = [done(seed, "a", 0.0, 1.0) for seed in (0, 1, 2)]
    runs += [done(seed, "up", 0.0, 2.0 + 0.1 * seed) for seed in (0, 1, 2)]
    runs += [done(seed, "down", 0.0, 0.5 - 0.1 * seed) for seed in (0, 1, 2)]
    runs += [done(seed, "same", 0.0, 1.0 + 0.3 * (seed - 0.9)) for seed in (0, 1, 2)]
    text = " ".join(findings(a_sweep(*runs)))
    assert "above: up +1.10 ± 0.06; below: down -0.60 ± 0.06; within noise (n = 3 seeds): same +0.03 ± 0.17." in text
    assert "Chance alone puts 18 % of rows beyond: about 0.6 of these 3." in text and "smaller than 2 standard errors are not" in text
    assert "one seed" not in text


def test_one_seed_has_no_error_and_says_so():
    text = " ".join(findings(a_sweep(done(4, "a", 0.0, 1.0), done(4, "b", 0.0, 2.0))))
    assert "This is one seed (4)" in text and "standard errors" not in text


def test_a_shared_sft_conditions_the_errors():
    runs = done(0, "a", 0.0, 1.0), done(1, "a", 0.0, 1.0)
    assert "errors are conditional on it" in " ".join(findings(a_sweep(*runs, sft_seed=0)))
    assert "conditional" not in " ".join(findings(a_sweep(*runs)))


def test_episodes_that_differ_are_named_and_equal_ones_too():
    runs = [done(0, arm, 0.0, 1.0) for arm in ("a", "b", "dpo")]
    text = " ".join(findings(a_sweep(*runs, dpo={"episodes": 0, "prompts": 0})))
    assert "dpo: trained on the offline pairs, no episodes sampled." in text
    assert "Equal in all rows that sample: episodes (96), prompts (96), generation length in tokens (8)." in text
    text = " ".join(findings(a_sweep(*runs, b={"episodes": 1000}, dpo={"episodes": 0})))
    assert "Rows differ in episodes: a 96; b 1,000." in text and "sample: prompts (96), generation length" in text


def test_a_proxy_that_rose_while_gold_fell_is_counted():
    """Where both lie beyond their intervals over prompts: at seed 2 gold is within noise, and in b the proxy fell."""

    def run(seed, arm, gold, proxy):
        one = done(seed, arm, 0.0, 2.0, 1.0)
        for name, value in (("gold_change", gold), ("proxy_change", proxy)):
            one.rounds[-1].update(as_fields(name, Interval(value, value - 0.3, value + 0.3, 50)))
        return one

    text = findings(a_sweep(run(0, "a", -1.0, 1.0), run(1, "a", -0.5, 1.0), run(2, "a", -0.2, 1.0), run(0, "b", -1.0, -0.5)))
    assert "In the last round the proxy rose while gold fell, both beyond their intervals: a in 2 of 3 runs." in text


def test_accuracy_that_falls_over_seeds_is_said():
    runs = [done(seed, arm, 0.0, 2.0, 1.0) for arm in "ab" for seed in range(3)]
    for n, run in enumerate(runs):
        run.rounds[1]["reward_accuracy"] = 0.7 + (0.01 * n if run.arm == "a" else 0.2 * (n % 3))
    text = " ".join(findings(a_sweep(*runs)))
    assert "last round less first: below: a -0.210 ± 0.006, b -0.400 ± 0.115. Chance alone puts 18 % of rows beyond" in text


def test_arms_that_have_come_unequally_far_are_not_compared():
    """As a report reads a sweep that is going on. Finished runs of fewer rounds (DPO, one round with all the episodes) are compared."""
    rows = {"a": (0.0, 1.0, 2.0), "b": (0.0, 5.0), "c": (0.0, 1.0, 9.0)}
    trials = [
        Trial(arm, seed, rounds(*golds[:-1], golds[-1] + 0.1 * seed * (arm != "a"))) for arm, golds in rows.items() for seed in (0, 1)
    ]
    text = " ".join(findings_of(trials))
    assert "above: c +7.05" in text and "b +3" not in text, text
    assert "Final gold of b (1) is not compared with that of a: it is not of round 2." in text
    assert "c +7.05 ± 0.05, b" not in text and "b +3.05" in " ".join(findings_of([one._replace(finished=True) for one in trials]))


def test_failed_and_pending_runs_are_not_in_the_table_and_are_named():
    sweep = a_sweep(done(0, "a", 0.0, 1.0), Run(0, "b", "failed", error="ValueError: no"), Run(1, "a", "pending"))
    text = findings(sweep)
    assert text[0] == "seed 0, b failed and is not in the table: ValueError: no" and text[1] == "Runs not finished yet: 1 of 3."
    assert sweep.estimate("b", "gold") is None and sweep.estimate("a", "gold").n == 1
    assert "| b | 0 | – |" in as_markdown(sweep)


def test_notes_of_runs_are_said_once_with_their_arms():
    runs = [done(seed, arm, 0.0, 1.0, notes=("a heuristic",)) for seed in (0, 1) for arm in ("a", "b")]
    assert [line for line in findings(a_sweep(*runs)) if "heuristic" in line] == ["a, b: a heuristic"]


def printed(sweep, width) -> str:
    file = io.StringIO()
    show(sweep, Console(file=file, width=width))
    return file.getvalue()


def test_the_screen_shows_as_many_columns_as_fit(three):
    wide, narrow = printed(three, 120), printed(three, 60)
    assert max(map(len, wide.splitlines())) <= 120 and max(map(len, narrow.splitlines())) <= 60
    for cell in ("2.00 ± 0.58", "+0.50 ± 0.50", "50 ± 10", "0.500", "win rate", "optimizer + critic", "SFT, β 0.05"):
        assert cell in wide, cell
    assert "2.00 ± 0.58" in narrow and "+0.50 ± 0.50" in narrow and "win rate" not in narrow.split("Mean ±")[0]
    said = " ".join(narrow.split())
    assert "too narrow for s; RM fits" in said and "win rate" in said.split("too narrow")[1]
    every = printed(three, 200)
    assert "too narrow" not in every and "best round" in every


def test_long_names_fit_too(three):
    long = Sweep("s", None, {"a" * 30: PPO, "b": PPO}, tuple(three.runs))
    assert max(map(len, printed(long, 80).splitlines())) <= 80


def test_markdown_has_every_column_and_row(three):
    page = as_markdown(three)
    head = next(line for line in page.splitlines() if line.startswith("| arm"))
    assert head.count("|") == len(columns_of(three)) + 2 and "gold − a" in head and "gold, least" in head
    assert "| b | 3 | 4.67 ± 1.67 | +0.50 ± 0.50 | 3.00 | +0.00 |" in page
    assert "| a | ppo | SFT, β 0.05 | kept | optimizer + critic | 2 | 96 |" in page and "![" not in page


def test_json_holds_figures_and_reads_back(three):
    sweep = Sweep("s", 0, three.settings, (*three.runs, done(7, "a", 0.0, math.nan)))
    text = json.dumps(as_json(sweep), allow_nan=False)
    body = json.loads(text, object_hook=with_numbers)
    assert body["arms"]["b"]["difference"] == {"n": 2, "mean": 0.5, "se": pytest.approx(0.5), "least": 0.0}
    assert (
        body["compared_with"] == "a"
        and body["arms"]["a"]["seeds"] == [0, 1, 2, 7]
        and math.isnan(body["arms"]["a"]["figures"]["gold"]["mean"])
    )
    assert [run["figures"]["gold"] for run in body["runs"][:3]] == [1.0, 2.0, 3.0]
