"""`jaxrlhf evaluate`: any two of policy, stored responses and references; by gold, judge or both; and what is said of other folders."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrlhf import rng
from jaxrlhf.commands import evaluate as evaluate_command
from jaxrlhf.commands.evaluate import default_output
from jaxrlhf.comparison.candidates import Candidate, read_candidate
from jaxrlhf.comparison.compare import evaluate, gold_scorer
from jaxrlhf.comparison.judge_client import Judge
from jaxrlhf.comparison.prompts import prompts_of
from jaxrlhf.comparison.responses import GenerationSettings, new_tokens_of
from jaxrlhf.config import ToyTask
from jaxrlhf.data import toy
from jaxrlhf.data.read_report import DataError
from jaxrlhf.data.stored_responses import label, read_stored
from jaxrlhf.data.tables import write_table
from jaxrlhf.data.tokens import Limits, decode_responses, tokenize_prompts
from jaxrlhf.models.families import config_from_shape
from jaxrlhf.models.hub import eos_ids, initialise, load, save
from jaxrlhf.rollouts.dataset import Sampling, sample_dataset
from jaxrlhf.scorers.toy import toy_gold

sys.path.insert(0, str(Path(__file__).parent))
from faulty_server import FaultyServer

QUIET = {"max_prompt_length": 17, "batch_size": 8}


def record(folder, name, kind="model", **config):
    facts = {"name": name, "kind": kind, "hash": name, "config": config, "finished": "2026"}
    (folder / "stage.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, with untrained models: π_SFT, a policy, a reward model and an evaluation of six prompts."""
    tokenizer = toy.toy_tokenizer()
    stages = tmp_path_factory.mktemp("runs") / "mine" / "stages"
    shape = {"family": "llama", "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    config, _ = config_from_shape(shape, len(tokenizer), max_positions=32, pad_id=0, eos_id=1)
    for number, (name, head) in enumerate((("01-sft", "lm"), ("03-r1-reward", "scalar"), ("04-r1-policy", "lm"))):
        save(initialise(config, key=jax.random.key(number), tokenizer=tokenizer, head=head), stages / name)
    record(stages / "04-r1-policy", "r1-policy", ppo={"response_length": 5})
    record(stages / "03-r1-reward", "r1-reward")
    (stages / "02-pairs").mkdir()
    record(stages / "02-pairs", "pairs", "data")
    rows = toy.prompts(ToyTask(), 6, 0, "evaluation")
    evaluation = stages / "05-r1-evaluation"
    evaluation.mkdir()
    record(evaluation, "r1-evaluation", "data", response_length=5)
    columns = {"id": [r.id for r in rows], "prompt": [r.prompt for r in rows], "reference": [r.reference for r in rows]}
    said = [" ".join(r.prompt.split()[:4]) + " ." for r in rows]
    write_table(evaluation / "samples.parquet", columns | {"response_1": said, "response_2": ["."] * 6, "prompt_tokens": [[1]] * 6})
    return stages.parent


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def by_gold(prompts, responses):
    return toy_gold()(prompts, responses)


def test_policy_against_references_by_gold(run, tmp_path):
    policy = str(run / "stages" / "04-r1-policy")
    done = evaluate(policy, output=tmp_path / "out", gold="toy", toy_prompts=20, seed=3, **QUIET)
    rows = toy.prompts(ToyTask(), 20, 3, "evaluation")
    assert [row["b"] for row in done.rows] == [r.reference for r in rows] and [row["prompt"] for row in done.rows] == [
        r.prompt for r in rows
    ]
    # what a run's evaluation would sample: the same stream, the row's number
    loaded = load(policy)
    table, _ = tokenize_prompts(rows, loaded.tokenizer, Limits(17, 5))
    sampling = Sampling.of(loaded, max_new_tokens=5, temperature=1.0)  # 5: what the policy's stage says
    texts = sample_dataset(loaded.model, loaded.params, table, rng.stream(rng.root_key(3), "evaluation"), sampling, batch_size=20)
    written = decode_responses(texts.response_BT, texts.response_mask_BT, loaded.tokenizer, eos_ids(loaded))  # type: ignore[arg-type]
    assert [row["a"] for row in done.rows] == written
    prompts = [r.prompt for r in rows]
    gold = by_gold(prompts, written), by_gold(prompts, [r.reference or "" for r in rows])
    assert done.figures["gold"]["win_rate"] == np.mean(gold[0] > gold[1]) and done.figures["a"]["gold"]["value"] == pytest.approx(
        gold[0].mean()
    )
    assert done.figures["against_references"] is None and 0 <= done.figures["a"]["finished"] <= 1 and done.figures["b"]["finished"] is None
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == json.loads(json.dumps(done.figures))


def test_two_policies_get_the_same_random_numbers(run, tmp_path):
    """A copy of a policy writes the same: all ties. π_SFT writes something else, and both are measured against the references."""
    import shutil

    shutil.copytree(run / "stages" / "04-r1-policy", tmp_path / "copy")
    policy = str(run / "stages" / "04-r1-policy")
    same = evaluate(policy, str(tmp_path / "copy"), output=tmp_path / "same", gold="toy", toy_prompts=8, **QUIET)
    assert same.figures["gold"]["tie_rate"] == 1.0 and all(row["a"] == row["b"] for row in same.rows)
    sft = str(run / "stages" / "01-sft")
    other = evaluate(policy, sft, output=tmp_path / "other", gold="toy", toy_prompts=8, **QUIET)
    assert [row["a"] for row in other.rows] == [row["a"] for row in same.rows] != [row["b"] for row in other.rows]
    assert other.figures["against_references"]["a"]["n"] == 8 and other.figures["gold"]["length_controlled"]["n"] == 8
    turned = evaluate(sft, policy, output=tmp_path / "turned", gold="toy", toy_prompts=8, **QUIET)
    assert turned.figures["gold"]["score"] == pytest.approx(1 - other.figures["gold"]["score"])


def test_stored_responses_bring_their_prompts(run, tmp_path):
    stage = run / "stages" / "05-r1-evaluation"
    done = evaluate(str(stage), output=tmp_path / "a", gold="toy")
    assert done.figures["prompts"] == 6 and done.rows[0]["a"] == " ".join(done.rows[0]["prompt"].split()[:4]) + " ."
    # a file with some of them in another order, two answers to one, one with a spelled end
    prompts = [row["prompt"] for row in done.rows]
    stored = [{"prompt": prompts[i], "response": f"{i} .", "finished": i == 4} for i in (4, 1, 2)]
    stored += [{"prompt": prompts[1], "response": "later"}, {"prompt": "another", "response": "x"}]
    stored[2]["response"] += " <eos></s>"
    file = lines(tmp_path / "stored.jsonl", stored)
    both = evaluate(str(stage), file, output=tmp_path / "b", gold="toy")
    assert [row["b"] for row in both.rows] == ["1 .", "2 .", "4 ."]  # in the order of A's prompts
    assert [row["reference"] for row in both.rows] == [done.rows[i]["reference"] for i in (1, 2, 4)]
    notes = " ".join(both.figures["notes"])
    assert (
        "1 further responses" in notes
        and "spelled at the end (taken off): 1." in notes
        and "3 of 6 prompts are left out: 3 without one of B" in notes
    )
    assert both.figures["b"]["finished"] == 1 / 3 and both.figures["a"]["finished"] is None
    # against a policy: it answers the stored prompts, at the length under which they were written
    policy = str(run / "stages" / "04-r1-policy")
    mixed = evaluate(policy, str(stage), output=tmp_path / "c", gold="toy", **QUIET)
    assert mixed.figures["prompts"] == 6 and mixed.figures["settings"]["max_new_tokens"] == 5 and mixed.figures["notes"] == []
    limited = evaluate(policy, str(stage), output=tmp_path / "d", gold="toy", max_new_tokens=3, **QUIET)
    assert "policies wrote up to 3 tokens" in limited.figures["notes"][0]
    assert max(len(row["a"].split()) for row in limited.rows) <= 3
    with pytest.raises(DataError, match="no prompt that both sides answer: of 6, A has responses to 6 and B to 0"):
        evaluate(str(stage), lines(tmp_path / "x.jsonl", [{"prompt": "q", "response": "r"}]), output=tmp_path / "e", gold="toy")


def test_gold_scorers(run, tmp_path, monkeypatch):
    stage = str(run / "stages" / "05-r1-evaluation")
    reward = evaluate(stage, output=tmp_path / "a", gold=str(run / "stages" / "03-r1-reward"), **QUIET)
    scorer = gold_scorer(str(run / "stages" / "03-r1-reward"), GenerationSettings(5, 17, batch_size=8), (40, 40))
    expected = scorer([row["prompt"] for row in reward.rows], [row["a"] for row in reward.rows])
    assert [row["gold_a"] for row in reward.rows] == pytest.approx(list(map(float, expected)), abs=1e-5)
    # a stored response is read whole, however much longer than what policies would write
    prompt, words = reward.rows[0]["prompt"], " ".join(["sold"] * 30)
    long = lines(tmp_path / "long.jsonl", [{"prompt": prompt, "response": words + " maps"}])
    other = lines(tmp_path / "longer.jsonl", [{"prompt": prompt, "response": words + " maps apples"}])
    both = evaluate(long, other, output=tmp_path / "long", gold=str(run / "stages" / "03-r1-reward"), max_new_tokens=4, **QUIET)
    assert both.rows[0]["gold_a"] != both.rows[0]["gold_b"]
    (tmp_path / "my_judge.py").write_text("def score(prompts, responses):\n    return [-len(r) for r in responses]\n")
    monkeypatch.syspath_prepend(tmp_path)
    shorter = evaluate(stage, output=tmp_path / "b", gold="my_judge:score")
    assert all(row["gold_a"] == -len(row["a"]) for row in shorter.rows)
    with pytest.raises(ValueError, match=r"--gold .*LlamaForCausalLM, not a reward model"):
        gold_scorer(str(run / "stages" / "01-sft"), GenerationSettings(5), (40, 40))
    with pytest.raises(ValueError, match=r"no config.json; its reward models are .*03-r1-reward"):
        gold_scorer(str(run), GenerationSettings(5), (40, 40))
    monkeypatch.setattr("jaxrlhf.comparison.compare.judge_pairs", lambda *a, **k: pytest.fail("asked before gold was tried"))
    rows = [{"prompt": row["prompt"], "response": "."} for row in reward.rows] + [{"prompt": "q", "response": "r"}]
    one, other = lines(tmp_path / "one.jsonl", rows), lines(tmp_path / "other.jsonl", [rows[-1] | {"response": "s"}])
    with pytest.raises(ValueError, match="not a post of the toy task: 'q'"):
        evaluate(one, other, output=tmp_path / "f", gold="toy", judge=Judge("m"))
    with pytest.raises(ValueError, match="nobody judges"):
        evaluate(stage, output=tmp_path / "c")


def test_a_judge_beside_gold_and_again_without_a_question(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openai", reason="the judge's client library is not installed: pip install 'jaxrlhf[judge]'")
    monkeypatch.setenv("MY_KEY", "sk-0123456789")
    policy = str(run / "stages" / "04-r1-policy")
    with FaultyServer(lambda _: "A") as server:
        parser = argparse.ArgumentParser()
        evaluate_command.add_arguments(parser)
        given = [
            policy,
            "reference",
            "--toy",
            6,
            "--gold",
            "toy",
            "--judge",
            "m",
            "--judge_base_url",
            server.url,
            "--api_key_env",
            "MY_KEY",
        ]
        given += ["--output", tmp_path / "out", "--judge_price_in", 1, "--judge_price_out", 2, "--max_prompt_length", 17, "--batch_size", 8]
        given += ["--judge_template", "{prompt}|{first}|{second}", "--judge_request", '{"seed": 7}', "--length", "words"]
        assert evaluate_command.main(parser.parse_args(list(map(str, given)))) == 0
        out = capsys.readouterr().out
        assert "A wins (strictly)" in out and "comparison:" in out and "The judge gave 6 of 6 verdicts" in out
        figures = json.loads((tmp_path / "out" / "comparison.json").read_text())
        assert figures["judge"]["score"] == 0.5 and figures["judge"]["usage"]["first_rate"] == 1.0  # always the first: nothing
        asked = len(server.bodies)
        assert asked == 12 and server.bodies[0]["seed"] == 7
        assert figures["judge"]["usage"]["cost"] == pytest.approx(12 * (100 * 1 + 3 * 2) / 1e6)
        # once more, the weights gone: all is there already
        monkeypatch.setattr("jaxrlhf.rollouts.texts.load", lambda *a, **k: pytest.fail("generated again"))
        assert evaluate_command.main(parser.parse_args(list(map(str, given)))) == 0
        assert len(server.bodies) == asked
        again = json.loads((tmp_path / "out" / "comparison.json").read_text())
        again["judge"]["usage"]["asked_now"] = 12
        assert again == figures
    rows = [json.loads(line) for line in (tmp_path / "out" / "comparison.jsonl").read_text().splitlines()]
    answers = {json.loads(line)["key"] for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()}
    assert {key for row in rows for key in row["judge_answers"]} == answers
    for path in (tmp_path / "out").iterdir():
        assert b"sk-0123456789" not in path.read_bytes()


def test_a_folder_of_another_comparison_is_not_replaced(run, tmp_path):
    stage = str(run / "stages" / "05-r1-evaluation")
    evaluate(stage, output=tmp_path / "out", gold="toy")
    content = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    evaluate(stage, output=tmp_path / "out", gold="toy")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == content
    with pytest.raises(FileExistsError, match="another length, prompts, seed; give another --output, or --overwrite"):
        evaluate(stage, output=tmp_path / "out", gold="toy", seed=1, length="words", limit=5)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == content
    assert evaluate(stage, output=tmp_path / "out", gold="toy", limit=5, overwrite=True).figures["prompts"] == 5
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="holds no comparison"):
        evaluate(stage, output=tmp_path / "mine", gold="toy", overwrite=True)
    for foreign in ("[1]", '{"editor": 1}', '{"a": "b", "seed": 0}', "null", "{"):
        (tmp_path / "mine" / "settings.json").write_text(foreign)
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="mine exists and holds no comparison; give another --output"):
                evaluate(stage, output=tmp_path / "mine", gold="toy", overwrite=overwrite)
        assert (tmp_path / "mine" / "settings.json").read_text() == foreign


def test_another_batch_size_writes_nothing_anew(run, tmp_path, monkeypatch):
    policy = str(run / "stages" / "04-r1-policy")
    first = evaluate(policy, output=tmp_path / "out", gold="toy", toy_prompts=4, **QUIET)
    monkeypatch.setattr("jaxrlhf.rollouts.texts.load", lambda *a, **k: pytest.fail("generated again"))
    again = evaluate(policy, output=tmp_path / "out", gold="toy", toy_prompts=4, **QUIET | {"batch_size": 3})
    assert again.rows == first.rows


def test_what_is_no_side_says_what_is_missing(run, tmp_path):
    stages = run / "stages"
    policy = stages / "04-r1-policy"

    def refused(given, *says):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            read_candidate(str(given))
        for part in says:
            assert part in str(caught.value), (part, str(caught.value))

    refused(run, "is a run's folder", str(policy), "01-sft", "05-r1-evaluation")
    refused(run.parent, "holds several runs", str(policy))
    refused(stages / "03-r1-reward", "holds a reward model (LlamaForSequenceClassification)", str(policy), "given as --gold")
    refused(stages / "02-pairs", "is the stage pairs (data)", "name a policy or evaluation stage beside it", str(policy))
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is empty; a policy folder holds config.json")
    (tmp_path / ".partial-abc").mkdir()
    (tmp_path / ".partial-abc" / "config.json").write_text("{}")
    refused(tmp_path / ".partial-abc", "not finished: run the same `jaxrlhf run` again")
    refused(tmp_path, "holds stages under their hashes")
    (tmp_path / "x" / "begun" / "stages").mkdir(parents=True)
    refused(tmp_path / "x" / "begun", "a run that has no policy yet", "config.yaml")
    broken = tmp_path / "x" / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    refused(broken, "no *.safetensors, so its parameters are missing")
    (broken / "config.json").write_text("{")
    refused(broken, "config.json cannot be read")
    (broken / "config.json").rename(broken / "model.safetensors")
    refused(broken, "parameters but no config.json")
    foreign = tmp_path / "x" / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("hello")
    refused(foreign, "neither a policy folder", "it holds notes.txt", "jaxrlhf generate")
    refused(foreign / "notes.txt", "none of responses", ".jsonl")
    refused(tmp_path / "no.jsonl", "does not exist")
    (tmp_path / "x" / "gone").symlink_to(tmp_path / "x" / "nowhere")
    refused(tmp_path / "x" / "gone", "links to a folder that is gone")
    for text, says in (("", "there is no response in"), ("{\n", "not JSON"), ('{"prompt": "a"}\n', ":1: a stored response has the texts")):
        (foreign / "r.jsonl").write_text(text)
        refused(foreign / "r.jsonl", says)
    (foreign / "r.jsonl").write_text('{"prompt": "a", "response": "\\ud800"}\n')
    refused(foreign / "r.jsonl", "lone surrogate")


def test_prompts(run, tmp_path):
    sides = read_candidate(str(run / "stages" / "04-r1-policy")), read_candidate("reference")
    with pytest.raises(ValueError, match="there is no prompt: give --prompts"):
        prompts_of(sides, None, None, None, 0, None)
    with pytest.raises(ValueError, match="give one"):
        prompts_of(sides, "x", 3, None, 0, None)
    bare = lines(tmp_path / "bare.jsonl", [{"prompt": "well"}, {"prompt": "well"}, {"prompt": "hello"}])
    with pytest.raises(DataError, match="no prompt has a reference"):
        prompts_of(sides, bare, None, None, 0, None)
    other = replace(sides[1], kind="policy", folder=sides[0].folder)
    assert [row.prompt for row in prompts_of((sides[0], other), bare, None, None, 0, None).rows] == ["well", "hello"]
    pairs = lines(tmp_path / "pairs.jsonl", [{"prompt": f"q{i}", "chosen": f"c{i}", "rejected": "r"} for i in range(4)])
    assert [(row.prompt, row.reference) for row in prompts_of(sides, pairs, None, 3, 0, None).rows] == [
        (f"q{i}", f"c{i}") for i in range(3)
    ]
    stage = prompts_of(sides, str(run / "stages" / "05-r1-evaluation"), None, None, 0, None).rows
    assert len(stage) == 6 and stage[0].reference
    toys = prompts_of(sides, None, 6, None, 0, None).rows
    assert [(row.prompt, row.reference) for row in stage] == [(row.prompt, row.reference) for row in toys]


def test_prompts_that_are_too_long_for_one_side_are_left_out_for_both(run, tmp_path, capsys):
    file = lines(tmp_path / "p.jsonl", [{"prompt": p, "response": "."} for p in ("well", "well well well", "hello", "folks")])
    policies = [str(run / "stages" / name) for name in ("04-r1-policy", "01-sft")]
    (tmp_path / "len.py").write_text("def score(p, r):\n    return [len(x) for x in r]\n")
    sys.path.insert(0, str(tmp_path))
    try:
        done = evaluate(*policies, output=tmp_path / "out", gold="len:score", prompts=file, max_prompt_length=2, batch_size=8)
        whole = evaluate(*policies, output=tmp_path / "all", gold="len:score", prompts=file, max_prompt_length=8, batch_size=8)
    finally:
        sys.path.remove(str(tmp_path))
    assert [row["prompt"] for row in done.rows] == ["well", "hello", "folks"] and "3 tokens, limit 2" in capsys.readouterr().err
    assert "1 of 4 prompts are left out: 1 without one of A, 1 without one of B" in done.figures["notes"][0]
    assert [row["a"] for row in done.rows] == [row["a"] for row in whole.rows if row["prompt"] != "well well well"]


def test_conversations_go_through_each_policys_own_template(run, tmp_path, monkeypatch):
    template = "{% for m in messages %}NAME {{ m['content'] }} <eos> {% endfor %}{% if add_generation_prompt %}NAME {% endif %}"
    for name in ("hello", "thanks"):
        loaded = load(run / "stages" / "01-sft")
        loaded.tokenizer.chat_template = template.replace("NAME", name)
        save(loaded, tmp_path / name)
    file = lines(
        tmp_path / "c.jsonl", [{"prompt": [{"role": "user", "content": "well"}], "completion": [{"role": "assistant", "content": "."}]}]
    )
    seen = {}

    def spy(model, params, table, *rest, **options):
        seen[len(seen)] = table.prompt_BL[0][table.prompt_mask_BL[0]].tolist()
        return sample_dataset(model, params, table, *rest, **options)

    monkeypatch.setattr("jaxrlhf.rollouts.dataset.sample_dataset", spy)
    (tmp_path / "one.py").write_text("def score(p, r):\n    return [1.0] * len(r)\n")
    monkeypatch.syspath_prepend(tmp_path)
    sides = str(tmp_path / "hello"), str(tmp_path / "thanks")
    evaluate(*sides, output=tmp_path / "out", gold="one:score", prompts=file, max_new_tokens=3, **QUIET)
    ids = toy.toy_tokenizer().convert_tokens_to_ids
    assert [seen[0], seen[1]] == [ids([name, "well", "<eos>", name]) for name in ("hello", "thanks")]


def test_the_command_reads_prompts_as_a_run_does(run, tmp_path, monkeypatch):
    """By the rule for prompts inside of pairs, and at the date that templates are given, gold's too."""
    parser, gold, by_length = argparse.ArgumentParser(), {}, lambda prompts, said: np.array([len(text) for text in said], np.float32)
    evaluate_command.add_arguments(parser)
    loaded = load(run / "stages" / "01-sft")
    loaded.tokenizer.chat_template = "{% for m in messages %}{{ strftime_now('%Y') }} {{ m['content'] }}.{% endfor %}"
    sides = [str(tmp_path / "dated"), str(tmp_path / "same")]
    for side in sides:
        save(loaded, side)
    turn = {"role": "user", "content": "well"}
    file = lines(tmp_path / "p.jsonl", [{"chosen": "hello well", "rejected": "hello thanks"}, {"prompt": [turn]}])
    monkeypatch.setattr("jaxrlhf.comparison.compare.reward_model_scorer", lambda folder, **options: gold.update(options) or by_length)
    given = ["--gold", str(run / "stages" / "03-r1-reward"), "--prompts", file, "--output", str(tmp_path / "out"), "--max_new_tokens", "2"]
    asked = ["--implicit_prompt", "common_prefix", "--template_date", "2031-02-03"]
    options, unknown = parser.parse_known_args([*sides, *given, *asked])
    assert unknown == []
    evaluate_command.main(options)
    rows = [json.loads(line) for line in (tmp_path / "out" / "comparison.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["hello", "2031 well."] and gold["template_date"] == "2031-02-03"
    with pytest.raises(FileExistsError, match="another prompts, template_date; "):
        evaluate_command.main(parser.parse_args([*sides, *given, *asked[:2]]))


def test_lengths():
    def sides(*limits):
        return tuple(Candidate(kind, f"s{n}", response_length=limit) for n, (kind, limit) in enumerate(limits))

    assert new_tokens_of(sides(("policy", None), ("reference", None)), None) == (128, [])
    assert new_tokens_of(sides(("policy", 53), ("reference", None)), None) == (53, [])
    assert new_tokens_of(sides(("policy", 53), ("stored", 20)), None)[0] == 20
    limit, notes = new_tokens_of(sides(("policy", 53), ("policy", 128)), None)
    assert limit == 128 and notes == ["policies wrote up to 128 tokens; under another limit trained or written: s0 53."]
    assert new_tokens_of(sides(("stored", 53), ("stored", 128)), None)[1] == [
        "the responses were written under different limits: s0 53, s1 128 tokens."
    ]
    assert new_tokens_of(sides(("stored", 53), ("stored", 53)), None)[1] == []


def test_names_and_settings(tmp_path):
    assert label(Path("/runs/x/stages/04-r1-policy")) == "x/04-r1-policy" and label(Path("/a/b.jsonl")) == "b.jsonl"
    assert default_output("runs/x/stages/04-r1-policy", "reference") == Path("comparisons/x-04-r1-policy-against-reference")
    parser = argparse.ArgumentParser()
    evaluate_command.add_arguments(parser)
    template = tmp_path / "t.txt"
    template.write_text("{first} {second} {prompt}")
    options = parser.parse_args(["a", "--judge", "m", "--judge_template", str(template), "--judge_timeout", "3", "--judge_asks", "2"])
    assert evaluate_command.judge_of(options) == Judge("m", template="{first} {second} {prompt}", timeout=3.0, asks=2)
    assert evaluate_command.judge_of(parser.parse_args(["a"])) is None
    for wrong, says in (("{", "not JSON"), ("[1]", "must be a JSON object")):
        with pytest.raises(ValueError, match=says):
            evaluate_command.judge_of(parser.parse_args(["a", "--judge", "m", "--judge_request", wrong]))
    with pytest.raises(ValueError, match="both sides are x; name two different ones"):
        evaluate("x", "x", output=tmp_path, gold="toy")
    rows, _ = read_stored(Path(lines(tmp_path / "s.jsonl", [{"prompt": "a", "completion": "", "templated": True, "id": 4}])))
    assert rows[0].response == "" and rows[0].templated and rows[0].id == "4"
