"""The report on run folders written by hand: figures worked out on paper, files that are broken, texts that want out of their cell."""

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import socket
import struct
import threading
import urllib.request
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest
import yaml

from jaxrlhf.commands import report as command
from jaxrlhf.evaluation.intervals import Interval, as_fields
from jaxrlhf.files import identities
from jaxrlhf.pipeline.table import findings as terminal_findings
from jaxrlhf.pipeline.table import read_summaries
from jaxrlhf.report import costs, runs
from jaxrlhf.report.arms import COLUMNS, as_text, collect, table
from jaxrlhf.report.build import report, watched, write
from jaxrlhf.report.drawing import dashed_style, line_style
from jaxrlhf.report.figures import DRAWINGS, draw
from jaxrlhf.report.page import cell_text
from jaxrlhf.report.runs import ReportError
from jaxrlhf.report.server import CONNECTIONS, Live, server_of

PACKAGE = Path(runs.__file__).parent


def view_of(folder):
    return collect([folder]).arms[0].first


@pytest.fixture
def run(make_run, tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture(scope="module")
def composed(two_arms):
    return report([two_arms])


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without their figures, where these are not what is asked about."""
    monkeypatch.setattr("jaxrlhf.report.build.draw", lambda arms: ([], []))


# The figures


def test_curve_of_a_run(run):
    """Scores of the held-out pairs vary by √5 before the refit and by 2 after it; SFT's gold over ten samples 1 ± i by √6."""
    curve = view_of(run).curve
    assert curve.gold_scale == pytest.approx(6**0.5)
    assert [p.proxy_scale for p in curve.points] == [None, pytest.approx(5**0.5), pytest.approx(2)]
    assert curve.proxy_gain == [0, pytest.approx(2 / 5**0.5), pytest.approx(2 / 5**0.5 + 1.5)]
    assert curve.peak is not None and (curve.peak.round, curve.peak.gold, curve.lost) == (1, 2.0, 0.5)
    assert curve.gap == pytest.approx(2 / 5**0.5 + 1.5 - 0.5 / 6**0.5)
    assert [p.refit for p in curve.points] == [False, False, True] and [p.start for p in curve.points] == [0, 0, 1]


def test_drift_budget_and_health_of_a_run(run):
    view = view_of(run)
    assert view.drifts == {2: {"agreement": 0.5, "correlation": pytest.approx(-2 / 20**0.5 / 1), "scale": pytest.approx(2 / 5**0.5)}}
    assert [row["spent"] for row in view.budgets] == [0.5, 1.5]  # the second round's reference is the first round's policy
    assert [row["penalty"] for row in view.budgets] == [0.5, 1.0]  # k1, whatever kl_estimator penalises
    assert view.weights[2]["by_length"][0]["ess_fraction"] == 0.5 and view.filters[2]["kept"] == 5 and view.reliabilities[2]["ece"] == 0.2
    assert view.training["kl/sft"] == [(1, 1), (2, 2), (3, 2), (4, 4)]  # updates count on over rounds


def test_cost_by_hand(run):
    """SFT: two epochs of 65 rows, whose second batch is one row. Pairs: 4 + 4 + 6 + 6 of prompts, 8 + 2 of responses = 30 tokens, 15 a
    pair; 14 more were sampled of a pair that gold tied. Rollouts: 20 · (4 + 6.5) = 210 tokens a round."""
    view = view_of(run)
    flops, reasons = view.flops
    assert reasons == []
    assert flops["SFT"] == 6 * 100 * 2 * 650
    assert flops["pairs"] == 2 * 100 * 44
    assert flops["reward model, round 1"] == 6 * 50 * 15 * (2 * 3)
    # Policy: sampled, read, and read by the reference (in round 2 by π_SFT too); reward 50 and critic 50; two epochs over both.
    first = 210 * (2 * (3 * 100 + 50 + 50) + 6 * 150 * 2)
    assert flops["policies"] == first + 210 * (2 * (4 * 100 + 50 + 50) + 6 * 150 * 2)
    assert flops["corrections"] == 2 * (100 + 100) * 30 + 6 * 50 * 15 * 6
    # Five prompts of 4 tokens, responses of 2 to 6: 40. Two sampled, KL under two models, three tables under one reward model.
    assert flops["evaluation"] == 2 * 40 * 200 + 2 * (2 * 40 * (200 + 200 + 150))
    share = costs.share_of_corrections(flops)
    assert share == pytest.approx(flops["corrections"] / (sum(flops.values()) - flops["evaluation"]))
    assert view.seconds == {"SFT": 8, "pairs": 2, "reward model, round 1": 4, "policies": 10, "corrections": 7, "evaluation": 3}
    assert costs.share_of_corrections(view.seconds) == 7 / 31
    assert COLUMNS[-1].key == "seconds" and COLUMNS[-1].of(view) == 34 + 1  # the tokenizer's second is no part, and was spent
    assert [costs.rows_seen(10, steps, 4) for steps in range(5)] == [0, 4, 8, 10, 14]  # three batches an epoch, of 4, 4 and 2


def test_the_samplers_log_probs_save_a_pass_of_the_policy(run):
    before = view_of(run).flops[0]["policies"]
    for path in run.glob("stages/*-policy/stage.json"):
        path.write_text(path.read_text().replace('"old_logp": "score"', '"old_logp": "sampler"'))
    assert before - view_of(run).flops[0]["policies"] == 2 * 210 * 2 * 100


def test_a_count_that_is_missing_is_no_zero(run):
    path = next(run.glob("stages/*-sft/stage.json"))
    record = json.loads(path.read_text())
    del record["result"]["tokens"]
    path.write_text(json.dumps(record))
    flops, reasons = view_of(run).flops
    assert flops["SFT"] is None and reasons == ["sft: the folder does not say 'tokens'"]
    assert costs.share_of_corrections(flops) is None
    next(run.glob("stages/*-r1-policy/model.safetensors")).write_bytes(b"\xff" * 64)
    assert "no safetensors file" in " ".join(view_of(run).flops[1])


def test_updates_that_are_not_counted_say_so(run):
    path = next(run.glob("stages/*-update/stage.json"))
    path.write_text(path.read_text().replace("importance-weighted", "nearest"))
    flops, reasons = view_of(run).flops
    assert flops["corrections"] is None and "nearest" in reasons[0] and flops["policies"]


# Arms and seeds


def test_seeds_of_a_sweep_are_one_arm(make_run, tmp_path):
    for seed, shift in ((0, 0.0), (1, 0.5), (10, 1.0)):
        make_run(tmp_path / f"seed-{seed}" / "ocrm", seed=seed, gold_shift=shift)
        make_run(tmp_path / f"seed-{seed}" / "ppo", arm="ppo", seed=seed, refits=False)
    arms = collect([tmp_path]).arms
    assert [(arm.name, [view.run.seed for view in arm.views]) for arm in arms] == [("ocrm", [0, 1, 10]), ("ppo", [0, 1, 10])]
    columns, rows = table(arms)
    assert as_text(rows[0]["gold"], 3) == "2.500 ± 0.577" and rows[0]["seeds"] == 3  # 1.5, 2.5, 3.5
    # What all seeds have alike is not exact: no ± says 0, and the first seed's interval over prompts stands there, where it has one.
    texts = {column.key: cell_text(rows[0], column) for column in columns}
    assert texts["round"] == ("2", "") and not [text for text, _ in texts.values() if text.rstrip("0.").endswith("±")], texts
    assert texts["win_rate"][1].startswith("[") and texts["gold"][1] == ""
    assert "ece" in {column.key for column in columns}


def test_a_seed_that_is_behind_is_in_no_mean(make_run, tmp_path, undrawn):
    for seed, rounds in ((0, 2), (1, 1), (2, 2)):
        make_run(tmp_path / f"seed-{seed}" / "ocrm", seed=seed, rounds=rounds, gold_shift=float(seed))
    (arm,) = collect([tmp_path]).arms
    (row,) = table([arm])[1]
    assert row["seeds"] == 2 and row["round"] == (2, 2.0, 0.0, 2.0)
    assert row["gold"] == (2, 3.5, pytest.approx(2.0), 1.5)  # 1.5 and 5.5; 3.0 of round 1 is no end
    assert row["state"] == "2 of 3 finished"
    assert "ocrm: means are of the 2 of 3 seeds with the most finished rounds." in report([tmp_path]).html


def test_runs_side_by_side_keep_their_names_apart(make_run, tmp_path, undrawn):
    first, second = make_run(tmp_path / "a" / "ppo", arm="ppo"), make_run(tmp_path / "b" / "ppo", arm="ppo")
    (second / "config.yaml").write_text((second / "config.yaml").read_text() + "ppo: {kl_coef: 0.5}\n")
    arms = collect([tmp_path / "a", tmp_path / "b"]).arms
    assert [arm.name for arm in arms] == ["a/ppo", "b/ppo"]
    assert len(collect([first, first]).arms) == 1  # the same folder twice is one run
    assert len(collect([first, make_run(tmp_path / "c" / "ppo", arm="ppo")]).arms) == 2  # the same seed again is no second seed
    rows = [line for line in report([tmp_path / "a", tmp_path / "b"]).markdown.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| a/ppo", "| b/ppo"]


def test_the_table_for_papers(composed):
    text = composed.markdown
    head, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert head.startswith("| arm | gold | gold − ppo | peak gold |") and len(rows) == 2
    assert "\n- The same in all arms: rounds 2, " in text and "length" not in head
    assert {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
    assert rows[1].startswith("| ocrm | 2.500 | +1.000 | 2.500 |")


def with_intervals(folder, half=0.2, **values):
    """The run with the intervals that a run of this version keeps, each ± `half`, and some figures of its last round changed."""
    path = folder / "summary.json"
    body = json.loads(path.read_text())
    body["rounds"][-1] |= values
    for row in body["rounds"]:
        for name in ("gold", "gold_change", "proxy_change", "kl_sft", "proxy", "reward_accuracy", "ece"):
            if row.get(name) is not None:
                row |= as_fields(name, Interval(row[name], row[name] - half, row[name] + half, 15))
    path.write_text(json.dumps(body))
    return folder


def test_brackets_of_old_folders_are_explained(composed):
    """Their summary.json has the ends of the win rate, and no interval of the KL."""
    assert "[10.0, 30.0]" in composed.html and "over the pairs that gold decides (n not kept: win rate %)." in composed.html


def best(html):
    return re.findall(r'<td class="text">([^<]*)</td>(?=(?:(?!</tr>).)*class=best)', html)


def test_nothing_is_highlighted_that_is_not_two_errors_above_every_other(make_run, tmp_path, undrawn, composed):
    assert best(composed.html) == []  # two arms of one seed
    for name, shift in (("clear", 0.1), ("unclear", 2.0)):
        for seed in (0, 1, 2):
            make_run(tmp_path / name / f"seed-{seed}" / "ppo", arm="ppo", seed=seed)
            make_run(tmp_path / name / f"seed-{seed}" / "ocrm", arm="ocrm", seed=seed, gold_shift=0.5 + shift * (seed - 1))
    html = report([tmp_path / "clear"]).html  # 1 ± 0.1, by seed
    assert best(html) == ["ocrm"]
    assert "Final gold against ocrm, seed by seed: below: ppo -1.00" in html and "−1" not in html
    assert "Chance alone puts 18 % of rows beyond: about 0.2 of these 1." in html and "than two above every other arm" in html
    unclear = report([tmp_path / "unclear"]).html  # 1 ± 2.3
    assert best(unclear) == [] and "within noise (n = 3 seeds): ppo" in unclear


def test_an_arm_that_is_behind_is_compared_with_nothing(make_run, tmp_path, undrawn):
    """ocrm, after its first of two rounds, is above what ppo ended at: in colour it would be called better."""
    for seed in (0, 1):
        make_run(tmp_path / f"seed-{seed}" / "ppo", arm="ppo", seed=seed)
        make_run(tmp_path / f"seed-{seed}" / "ocrm", arm="ocrm", seed=seed, rounds=1, gold_shift=5 + 0.1 * seed)
    html = report([tmp_path]).html
    assert best(html) == []
    assert "Final gold of ppo (2) is not compared with that of ocrm: it is not of round 1." in html
    assert "with n = 2 seeds one comparison is beyond by chance in 30 % of cases" in html


def test_the_page_says_what_the_terminal_says(two_arms, tmp_path, undrawn):
    """The same function writes both; of fifteen prompts neither calls anything a rise or a fall."""
    home = shutil.copytree(two_arms, tmp_path / "demo")
    for arm in ("ppo", "ocrm"):
        with_intervals(home / arm, half=2.0, gold_change=-0.5, proxy_change=1.0)
    said = terminal_findings(read_summaries(home))
    html = report([home]).html
    assert said and all(escape(line) in html for line in said), said
    assert escape("ppo: gold's change is within noise in round 2 (n = 15)") in html
    assert not [
        word
        for word in ("rose", " fell", "liked", "highest", "larger", "smaller")
        if word in html.split("<footer>")[0].split("findings")[-1].split("</ul>")[0]
    ]


def test_what_guards_say_stands_at_the_top_as_text(make_run, tmp_path, undrawn):
    """Arms that share a round share its line; what is no finding is left out."""
    said = "round 1, policy, step 2: KL is 60 (n = 16), above 50. Raise </b></li><img src=x onerror=alert(1)> & |"
    for arm in ("ppo", "ocrm"):
        folder = make_run(tmp_path / "run" / arm, arm=arm)
        body = json.loads((folder / "summary.json").read_text())
        body["guards"] = [{"name": "kl", "text": said}, {"name": "ess"}, "ess", {"text": 3}]
        (folder / "summary.json").write_text(json.dumps(body))
    done = report([tmp_path / "run"])
    line = f"<li><b>ocrm, ppo</b>: {escape(f'guard kl: {said}')}</li>"
    assert done.html.count(line) == 1 and 0 < done.html.index(line) < done.html.index('id="results"') and said not in done.html
    assert done.html.count("guard ") == 1
    top = done.markdown[: done.markdown.index("| arm |")]
    assert top.count("ocrm, ppo: guard kl: round 1") == 1 and "<img" not in top


def test_intervals_stand_in_the_table_and_under_the_figures(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrlhf.report.figures.DRAWINGS", [one for one in DRAWINGS if one.name in ("gold_kl", "win_rate", "cost_seconds")])
    home = tmp_path / "demo"
    for arm, accuracy in (("ppo", 0.6), ("ocrm", 0.7)):
        with_intervals(make_run(home / arm, arm=arm, refits=arm == "ocrm"), reward_accuracy=accuracy)
    done = report([home])
    assert '1.500<span class="soft">[1.300, 1.700]</span>' in done.html
    assert '0.700<span class="soft">[0.500, 0.900]</span>' in done.html and "KL to SFT 4.00 [3.80, 4.20]" in done.html  # the same in both
    said = re.findall(r"Brackets: .*?\)\.", unescape(done.html))[0]
    assert said.startswith("Brackets: 95 % over one seed's prompts, of accuracy and ECE over the pairs that gold decides (n = 15: gold, ")
    assert said.endswith("; n not kept: win rate %).") and "one standard error" not in done.html  # a win rate from before n was kept
    captions = {figure.name: figure.caption for figure in done.figures}
    assert captions["gold_kl"].endswith("Bands and bars: 95 % intervals over prompts.") and "Bands" not in captions["cost_seconds"]
    assert "length 6.0" in re.findall(r"The same in all arms: (.*?)\.</p>", done.html)[0]
    with_intervals(make_run(home / "seed-1" / "ppo", arm="ppo", seed=1))
    make_run(home / "seed-0" / "ppo", arm="ppo")
    for figure in draw(collect([home / "seed-0", home / "seed-1"]).arms)[0]:
        assert "over prompts." not in figure.caption  # bands mean one thing, whatever an arm has


def test_the_header_says_of_what_and_with_what(run, undrawn):
    config = yaml.safe_load((run / "config.yaml").read_text())
    shape = {"family": "llama", "num_layers": 2, "hidden_size": 48}
    (run / "config.yaml").write_text(
        yaml.safe_dump(config | {"data": {"train": ["a/pairs.jsonl"]}, "model": {"source": None, "shape": shape}})
    )
    for path in run.glob("stages/*/stage.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"versions": {"jaxrlhf": "0.1.0", "jax": "0.10.2"}}))
    said = "data: pairs.jsonl · model: llama from scratch, 48 wide and 2 deep · jaxrlhf 0.1.0 · jax 0.10.2 · last stage finished 2026-01-01"
    assert said in report([run]).html


# What is missing, broken or foreign


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "does not exist; `jaxrlhf run"),
        (lambda path: path.mkdir(), "is empty; `jaxrlhf run CONFIG.yaml`"),
        (lambda path: path.write_text("x"), "is a file"),
        (
            lambda path: (path.mkdir(), (path / "photo.jpg").write_text("x")),
            "it has neither a summary.json with rounds nor stages/NN-",
        ),
        (lambda path: (path.mkdir(), (path / "config.yaml").write_text("name: x")), "no stage is finished yet: `jaxrlhf run"),
        (lambda path: (path.mkdir(), (path / "model.safetensors").write_text("x")), "is a model folder"),
        (lambda path: (path.mkdir(), (path / "stage.json").write_text("{}")), "folder of one stage"),
    ],
)
def test_folders_of_which_nothing_can_be_shown(tmp_path, make, said):
    make(tmp_path / "run")
    with pytest.raises(ReportError, match=re.escape(said)):
        report([tmp_path / "run"])


def test_a_folder_of_runs_names_them(make_run, tmp_path):
    make_run(tmp_path / "first" / "ppo")
    make_run(tmp_path / "second" / "seed-0" / "ppo")
    with pytest.raises(ReportError, match="name those to show, first, second in it"):
        report([tmp_path])


def test_lines_of_many_arms_differ_in_colour_or_mark():
    looks = [(line_style(n)["color"], line_style(n)["marker"]) for n in range(40)]
    assert len(set(looks)) == 40
    plain = [tuple(map(str, dashed_style(n).values())) for n in range(40)]
    assert len(set(plain)) == 40 and len({dashes for _, dashes in plain[:7]}) == 7  # seven arms are told apart on grey paper


@pytest.mark.parametrize("name", ["training_score", "filter_histogram", "gold_kl", "accuracy"])
def test_lines_differ_in_more_than_colour(make_run, tmp_path, name):
    """Of two arms with two seeds, on paper without colours: marks or dashes tell which is which."""
    from matplotlib.figure import Figure

    for seed in (0, 1):
        for arm in ("ocrm", "ppo"):
            make_run(tmp_path / f"seed-{seed}" / arm, arm=arm, seed=seed)
    axes = Figure().subplots()
    next(one for one in DRAWINGS if one.name == name).draw(axes, collect([tmp_path]).arms)
    looks = {}
    for line in [one for one in (*axes.get_lines(), *axes.patches) if not str(one.get_label()).startswith("on held")]:
        if not hasattr(line, "get_xdata") or (
            len(line.get_xdata()) > 1 and line.get_color() in (line_style(0)["color"], line_style(1)["color"])
        ):
            colour = line.get_color() if hasattr(line, "get_color") else line.get_edgecolor()
            mark = line.get_marker() if hasattr(line, "get_marker") else "None"
            dashes = str(line._dash_pattern) if mark == "None" else ""
            looks.setdefault((mark, dashes), set()).add(str(colour))
    assert len(looks) >= 2 and all(len(colours) == 1 for colours in looks.values()), looks


def test_a_bad_folder_beside_a_good_one_is_named(run, tmp_path, undrawn):
    done = report([run, tmp_path / "nowhere"])
    assert "nowhere does not exist" in done.html and any("nowhere" in line for line in done.missing)


def test_an_unfinished_run_shows_what_is_there(make_run, tmp_path):
    folder = make_run(tmp_path / "run", rounds=1)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "policy", "round": 2, "step": 7, "kl/pen')  # a line that is being written
    done = report([folder])
    assert "Unfinished: round 1 of 2 is done. The same `jaxrlhf run` goes on from here." in done.html
    assert "last heard from: policy of round 1, step 2" in done.html
    names = {figure.name for figure in done.figures}
    assert "gold_kl" in names and "drift_scale" not in names and "Needs a refit, and valid_scores.npy" in done.html


def test_before_the_first_round_samples_and_training_are_there(make_run, tmp_path):
    folder = make_run(tmp_path / "run", rounds=0)
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").write_text('{"stage": "policy", "round": 1, "step": 1, "rollout/score": 0.5, "kl/sft": 0.1}\n')
    done = report([folder])
    assert "No round is finished" in done.html and {"training_score", "training_kl", "cost_seconds"} <= {f.name for f in done.figures}
    assert "answer 0" in done.html


BREAKS = {
    "summary.json": "summary.json cannot be read",
    "config.yaml": "config.yaml is missing or broken",
    "metrics.jsonl": "metrics.jsonl is missing or empty",
    "stages/*-r1-policy/stage.json": "stage.json cannot be read",
    "stages/*-r2-evaluation/samples.parquet": "samples.parquet of 10-r2-evaluation cannot be read",
    "stages/*-r2-evaluation/reliability.json": "reliability.json cannot be read",
    "stages/*-r2-reward/valid_scores.npy": "valid_scores.npy of 08-r2-reward cannot be used",
    "stages/*-update/weight_health.json": "weight_health.json cannot be read",
    "stages/*-update/filter_report.json": "filter_report.json cannot be read",
    "stages/*-pairs/train.parquet": "train.parquet of the pairs cannot be read",
    "stages/*-r2-reward/lineage.json": "lineage.json cannot be read",
}


@pytest.mark.parametrize("content", [b"\x00{[ half a fi", b"", b"PK\x03\x04 half a fi"], ids=["half", "empty", "zip"])
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_file_costs_what_it_holds_and_no_more(run, name, content, undrawn):
    (path,) = run.glob(name)
    path.write_bytes(content)
    html = report([run]).html
    assert BREAKS[name] in html
    assert "Samples" in html and "half a fi" not in re.sub(r"cannot be read \(.*?\):|half a fi</pre>", "", html)


WRONG = [
    ("stages/*-sft/stage.json", {"seconds": "x"}, "stage.json of 01-sft: seconds is not a number"),
    ("stages/*-sft/stage.json", {"seconds": True, "inputs": [1]}, "stage.json of 01-sft: inputs is not an object of hashes"),
    ("stages/*-sft/stage.json", {"inputs": {"a": [1]}}, "inputs is not an object of hashes"),
    ("stages/*-r1-policy/stage.json", {"result": "x", "config": 3, "hash": [1], "finished": {}}, "result is not an object"),
    (
        "stages/*-r1-policy/stage.json",
        {"result": {"episodes": "x", "prompt_length": 4}},
        "r1-policy: the folder&#x27;s counts",
    ),
    ("stages/*-pairs/stage.json", {"result": {"train": 0, "sampled_tokens": 44}}, "counts cannot be used (division by zero)"),
    ("summary.json", {"notes": 5}, "notes is not a list"),
    ("summary.json", {"guards": 5}, "guards is not a list"),
    ("summary.json", {"rounds": {"a": 1}}, "summary.json has no rounds of ours"),
    ("summary.json", {"seed": "x", "method": [1]}, "Samples"),
    ("stages/*-r2-evaluation/reliability.json", {"bins": 5}, "reliability.json of r2-evaluation has no bins of ours"),
    ("stages/*-r2-evaluation/reliability.json", {"bins": [{"pairs": "x"}], "ece": "x"}, "Samples"),
    ("stages/*-update/weight_health.json", {"by_length": [1]}, "weight_health.json of r2-update is of a wrong form"),
    (
        "stages/*-update/weight_health.json",
        {"ess_fraction": "NaN", "by_length": [{"from": "a"}]},
        "weight_health.json of r2-update is of a",
    ),
    ("stages/*-update/filter_report.json", {"similarity": {"chosen": 1}}, "filter_report.json of r2-update: similarity is of a wrong form"),
    ("stages/*-update/filter_report.json", {"similarity": [1]}, "filter_report.json of r2-update: similarity is of a wrong form"),
    ("stages/*-r2-reward/lineage.json", {"data": {"weights": 5}}, "Samples"),
]


@pytest.mark.parametrize(("name", "fields", "said"), WRONG)
def test_valid_json_of_the_wrong_type_is_said(run, name, fields, said, undrawn):
    from matplotlib.figure import Figure

    (path,) = run.glob(name)
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert said in report([run]).html
    for drawing in DRAWINGS:
        drawing.draw(Figure().subplots(), collect([run]).arms)  # no figure stumbles either


@pytest.mark.parametrize("name", [name for name in BREAKS if name.endswith(".json")])
def test_json_that_is_no_object_is_said(run, name, undrawn):
    (path,) = run.glob(name)
    for text in ("[1]", "null", '"x"', "7"):
        path.write_text(text)
        assert f"{path.name} is not a JSON object" in report([run]).html


def test_a_log_of_wrong_types_is_left_out_and_said(run, undrawn):
    with (run / "metrics.jsonl").open("a") as file:
        for wrong in ({"step": "x"}, {"step": 1, "round": [1]}, {"stage": 5}, {"step": 1.5}):
            file.write(json.dumps({"stage": "policy", "round": 2, "rollout/kl": 7.0} | wrong) + "\n")
    assert "metrics.jsonl: 4 lines without a stage, round and step of ours left out" in report([run]).html
    assert view_of(run).budgets[1]["penalty"] == 1.0


def test_columns_and_scores_of_a_wrong_type_are_said(run, undrawn):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = next(run.glob("stages/*-sft-evaluation/samples.parquet"))
    rows = {"prompt": [1, 2], "response_1": ["a", None], "gold_1": ["x", "y"], "response_1_tokens": [3, 4], "proxy": [float("nan"), 1.0]}
    pq.write_table(pa.table(rows), path)
    np.save(next(run.glob("stages/*-r2-reward/valid_scores.npy")), np.array([["a"], ["b"]]))
    html = report([run]).html
    assert all(f"column {name} is of a wrong type" in html for name in ("prompt", "gold_1", "response_1_tokens"))
    assert "valid_scores.npy of 08-r2-reward cannot be used (not numbers of shape [2, M])" in html


def test_what_is_shown_of_a_damaged_stage_is_said(run):
    """A text of samples.parquet that is another by one letter: every reader takes it."""
    path = next(run.glob("stages/*-sft-evaluation/samples.parquet"))
    record = path.with_name("stage.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"files": identities(path.parent, [path.name])}))
    assert runs.read_run(run, arm="a").missing == []
    raw = path.read_bytes()
    path.write_bytes(raw[:5] + bytes([raw[5] ^ 1]) + raw[6:])
    (said,) = runs.read_run(run, arm="a").missing
    assert "samples.parquet is damaged: its content (sha256) is another" in said and "of sft-evaluation may be wrong; delete" in said
    record.write_text(json.dumps(json.loads(record.read_text()) | {"files": {"samples.parquet": "x"}}))
    assert "files is not an object of sizes and checksums, and is left out" in runs.read_run(run, arm="a").missing[0]


def test_the_log_of_a_run_that_diverged_is_drawn(run):
    """The log writes NaN as the string "NaN"; neither the budget nor a figure can be made of that."""
    with (run / "metrics.jsonl").open("a") as file:
        for value in ("Infinity", "NaN"):
            line = {"stage": "policy", "round": 2, "step": 3, "rollout/kl": value, "kl/sft": value, "rollout/score": value}
            file.write(json.dumps(line) + "\n")
    view = view_of(run)
    assert [row["spent"] for row in view.budgets] == [0.5, None] and len(view.training["kl/sft"]) == 4
    assert "kl_budget" in {figure.name for figure in report([run]).figures}


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    """Another tool's summary.json is no run, and its neighbours are not overwritten."""
    home = tmp_path / "coverage"
    home.mkdir()
    (home / "summary.json").write_text('{"coverage": 1}')
    (home / "summary.md").write_text("mine")
    (home / "stages" / "build").mkdir(parents=True)
    with pytest.raises(ReportError, match="no run folder"):
        command.main(options(home))
    assert (home / "summary.md").read_text() == "mine" and not (home / "report.html").exists()


def test_numbers_that_are_none_and_rows_that_are_not_ours(run, undrawn):
    body = json.loads((run / "summary.json").read_text())
    body["rounds"][1]["gold"] = float("nan")
    body["rounds"][2]["proxy"] = "high"
    body["rounds"].append(["?"])
    (run / "summary.json").write_text(json.dumps(body))
    assert report([run]).html.count("NaN") == 0


def test_links_to_a_store_that_moved(run, undrawn):
    path = next(run.glob("stages/*-r2-policy"))
    shutil.rmtree(path)
    path.symlink_to("../../nowhere")
    assert "links to a folder that is gone" in report([run]).html


# The page


class Page(HTMLParser):
    """Tags and attributes of a page, and the texts of its scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.scripts, self._in = [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = dict(attrs) if tag == "script" else self._in
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in = None if tag == "script" else self._in

    def handle_data(self, data):
        if self._in is not None:
            self.scripts[-1] += data


def test_texts_from_data_stay_text(composed):
    html = composed.html
    page = Page(html)
    assert not [tag for tag, attrs in page.tags if tag == "img" or any(name.startswith("on") for name in attrs)]
    assert [attrs.get("type") for tag, attrs in page.tags if tag == "script"] == ["application/json", None]
    data = json.loads(page.scripts[0])
    row = dict(zip(data["columns"], data["rows"][5], strict=True))  # the first of round 1
    assert row["response"].endswith('</script><img src=x onerror="alert(1)"><!-- & `|$x_1$') and row["round"] == 1
    assert row | {"prompt": "", "response": ""} == {
        "arm": 0, "round": 1, "prompt": "", "response": "", "reference": "reference 0", "gold": 2.0, "proxy": 1.0, "kl": 0.0, "length": 2,
        "ended": True,
    }  # fmt: skip
    assert data["rows"][9][-1] is False and data["rows"][1][data["columns"].index("reference")] is None
    assert html.count("</script>") == 2


def test_the_page_asks_for_nothing(composed):
    html = composed.html
    policy = next(a["content"] for tag, a in Page(html).tags if a.get("http-equiv") == "Content-Security-Policy")
    allowed = base64.b64encode(hashlib.sha256(Page(html).scripts[1].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; img-src data:; form-action 'none'; base-uri 'none'"
    )
    links = [a.get(name) or "" for _, a in Page(html).tags for name in ("src", "href", "xlink:href", "action")]
    assert {link[:1] for link in links if link} <= {"#", "d"} and "@import" not in html and "url(http" not in html
    ids = [a["id"] for _, a in Page(html).tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = re.findall(r"url\(#([^)]*)\)", html) + [link[1:] for link in links if link.startswith("#")]
    assert set(targets) <= set(ids)


def test_samples_are_capped_and_the_cap_is_said(run, undrawn):
    html = report([run], cap=2).html
    assert "The first 2 evaluation prompts of every arm and round" in html
    assert len(json.loads(Page(html).scripts[0])["rows"]) == 6
    none = report([run], cap=0).html
    assert "None, as --samples 0 asks." in none and "answer 0" not in none


def test_files(composed, tmp_path, two_arms):
    assert {figure.name for figure in composed.figures} == {drawing.name for drawing in DRAWINGS}
    (tmp_path / "figures").mkdir()
    for name in ("mine.svg", f"{composed.figures[0].name}.svg"):
        (tmp_path / "figures" / name).write_text("of earlier")
    target = write(composed._replace(figures=composed.figures[1:]), tmp_path / "report.html")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{figure.name}.{kind}" for figure in composed.figures[1:] for kind in ("svg", "png")} | {"mine.svg"}
    assert target.read_text() == composed.html and (tmp_path / "summary.md").read_text() == composed.markdown
    svg = (tmp_path / "figures" / "gold_kl.svg").read_text()
    assert "#010203" not in svg and "√KL to SFT" in svg and (tmp_path / "figures" / "gold_kl.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.rglob("*.partial"))


def test_the_same_folders_give_the_same_figures(composed, two_arms, monkeypatch):
    monkeypatch.setattr("jaxrlhf.report.figures.DRAWINGS", DRAWINGS[:2])
    assert [figure.svg for figure in draw(collect([two_arms]).arms)[0]] == [figure.svg for figure in composed.figures[:2]]


# The command


def options(*argv):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(list(map(str, argv)))


def test_the_command_writes_beside_the_first_run_or_where_it_is_told(run, tmp_path, capsys, undrawn):
    assert command.main(options(run)) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n" and (run / "summary.md").exists()
    command.main(options(run, "--output", tmp_path / "page.html"))
    command.main(options(run, "--output", tmp_path / "there"))
    assert (tmp_path / "page.html").exists() and (tmp_path / "there" / "report.html").exists()


def test_a_finished_run_does_not_fail_for_its_report(run, tmp_path, capsys, monkeypatch):
    def broken(arms):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("jaxrlhf.report.build.draw", broken)
    assert command.write_report(run) is None
    assert "the report was not written (RuntimeError: no fonts); the run is complete" in capsys.readouterr().err
    monkeypatch.setattr("jaxrlhf.report.build.draw", lambda arms: ([], []))
    assert command.write_report(run) == run / "report.html"


def test_served_on_loopback_and_fresh(run, undrawn):
    with server_of([str(run)], 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"

        def get(path, **headers):
            with urllib.request.urlopen(urllib.request.Request(address + path, headers=headers), timeout=300) as answer:
                return answer.read().decode()

        assert server.server_address[0] == "127.0.0.1"
        version, page = get("/version"), get("/")
        assert f'data-version="{version}"' in page and "connect-src 'self'" in page and get("/version") == version
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"stage": "policy", "round": 2, "step": 3}\n')
        assert get("/version") != version and f'data-version="{get("/version")}"' in get("/")
        for path, headers, status in (("/../summary.json", {}, 404), ("/", {"Host": "evil.example"}, 403)):
            with pytest.raises(HTTPError) as refused:
                get(path, **headers)
            assert refused.value.code == status
            refused.value.close()
        shutil.rmtree(run)
        assert "does not exist" in get("/")
        server.shutdown()


def test_a_served_page_says_an_error_that_nobody_thought_of(run, monkeypatch):
    def broken(arms):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("jaxrlhf.report.build.draw", broken)
    assert "the page cannot be made (RuntimeError: no fonts)" in Live([str(run)]).page()


def test_clients_that_are_slow_or_gone_keep_nobody_out(tmp_path, monkeypatch, capsys):
    """Silent ones are hung up on, more than there is room for make room, and one that breaks off is no traceback."""

    def connected(said=b""):
        client = socket.create_connection(("127.0.0.1", server.server_port), timeout=20)
        client.sendall(said)
        return client

    with monkeypatch.context() as patch:
        patch.setattr("jaxrlhf.report.server.PATIENCE", 0.2)
        server = server_of([str(tmp_path)], 0)
    with server, server_of([str(tmp_path)], 0) as patient:
        for one in (server, patient):
            threading.Thread(target=one.serve_forever, daemon=True).start()
        with connected() as silent:
            assert silent.recv(1) == b""  # the end, and not the test's own timeout
        gone = connected(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.close()  # with a reset
        server.shutdown()
        server = patient
        crowd = [connected(b"GET /") for _ in range(CONNECTIONS + 8)]
        assert len(urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/version", timeout=20).read()) == 16
        assert [one.recv(1) for one in crowd[:8]] == [b""] * 8 and len(server._open) <= CONNECTIONS
        for one in crowd:
            one.close()
        server.shutdown()
    assert capsys.readouterr() == ("", "")


def test_a_port_that_cannot_be_used(run):
    with server_of([str(run)], 0) as server, pytest.raises(ReportError, match="give another"):
        server_of([str(run)], server.server_port)


def test_watched_follows_sweeps(make_run, tmp_path):
    make_run(tmp_path / "seed-0" / "ppo", rounds=0)
    before = watched([tmp_path])
    (tmp_path / "seed-0" / "ppo" / "stages" / "04-r1-reward").mkdir()
    assert watched([tmp_path]) != before


def test_a_report_reads_folders_and_nothing_else():
    allowed = {"jaxrlhf.evaluation", "jaxrlhf.files", "jaxrlhf.formatting", "jaxrlhf.report"}
    for path in [*sorted(PACKAGE.glob("*.py")), *(PACKAGE.parent / "evaluation" / f"{name}.py" for name in ("curves", "plotting"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ("jax", "flax", "transformers", "datasets"), f"{path}: {name}"
                assert not name.startswith("jaxrlhf.") or ".".join(name.split(".")[:2]) in allowed, f"{path}: {name}"
