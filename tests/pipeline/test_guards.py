"""Guards in a run that goes on, is stopped and is run again; and the sets of rows of which nothing is left."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml

from jaxrlhf import cli
from jaxrlhf.algorithms.rounds import Round
from jaxrlhf.data.pairs import DataError, Pair, Prompt, ReadReport
from jaxrlhf.data.tables import write_pair_table
from jaxrlhf.data.toy import toy_tokenizer
from jaxrlhf.evaluation.guards import GuardStop
from jaxrlhf.evaluation.intervals import Interval, as_fields
from jaxrlhf.monitoring.metrics_file import read
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.pipeline import inputs
from jaxrlhf.pipeline.stages import pairs as pairs_module
from jaxrlhf.pipeline.stages import reward_update
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.pipeline.summary import Summary
from jaxrlhf.pipeline.table import findings, read_summaries
from jaxrlhf.recipe import to_yaml
from jaxrlhf.storage.blocks import NOWHERE
from jaxrlhf.storage.stage import Done, Stage
from jaxrlhf.storage.store import Store
from jaxrlhf.sweep import sweep
from jaxrlhf.types import PairBatch, TextBatch

KLS = (1.0, 60.0, 70.0, 80.0)


class Driven:
    """One process of a run whose policy stage logs planted figures; `start` is its checkpoint, and it dies after step `dies`."""

    def __init__(self, folder: Path, config):
        self.shown, self.folder = io.StringIO(), folder / "tiny"
        self.log = RunLog(self.folder, plain=True, every=1e9, file=self.shown)
        self.run = RunContext(config, Store(folder / ".stages"), self.folder, self.log, None)
        self.summary = Summary(self.run, 1)

    def go(self, *, start=0, dies=None):
        row = as_fields("kl_sft", Interval(0.0, np.nan, np.nan, 20))
        self.summary.add(None, Done("sft-evaluation", self.folder, "e", {"result": row}))

        def build(folder):
            with self.log.stage("policy", round=1, total_steps=len(KLS), start=start, folder=folder) as stage:
                for n, kl in enumerate(KLS[start:], start=start + 1):
                    stage.step(n, {"rollout/kl": kl})
                    if n == dies:
                        raise InterruptedError("killed")
            return {}

        return self.run.build(Stage("r1-policy", "data", "planted", {}), build, round=1)

    @property
    def written(self):
        return json.loads((self.folder / "summary.json").read_text())["guards"]

    @property
    def said(self):
        return [line for line in self.shown.getvalue().splitlines() if line.startswith("guard ")]


def test_a_guard_speaks_once_is_written_at_once_and_is_there_again_after_a_stop(tmp_path, tiny_config):
    config = tiny_config(tmp_path)
    first = Driven(tmp_path, config)
    with pytest.raises(InterruptedError):
        first.go(dies=4)
    (one,) = first.written
    assert (one["name"], one["round"], one["figure"], one["low"], one["n"], one["bound"]) == ("kl", 1, 60.0, None, 16, 50.0)
    assert first.said == [f"guard kl: {one['text']}"] and one["text"].startswith("round 1, policy, step 2: KL to the reference")
    again = Driven(tmp_path, config)  # from a checkpoint behind what the guard saw
    again.go(start=3)
    assert again.written == [one] and again.said == first.said
    finished = Driven(tmp_path, config)  # nothing is built any more
    assert finished.go().cached and finished.written == [one] and finished.said == first.said
    assert findings(read_summaries(finished.folder))[-1] == first.said[0]


def test_a_guard_that_may_stop_the_run_does_so_where_it_speaks_and_not_where_it_may_not(tmp_path, tiny_config):
    stopping = tiny_config(tmp_path, guards={"stop": ["kl", "ess"]})
    for start in (0, 2):  # the second from a checkpoint behind it: it has not become better
        one = Driven(tmp_path, stopping)
        with pytest.raises(GuardStop, match=r"^guard kl: round 1, policy, step 2: .* is 60 "):
            one.go(start=start)
        assert len(one.written) == len(one.said) == 1 and not list(one.folder.glob("stages/*"))
    later = Driven(tmp_path, tiny_config(tmp_path, guards={"kl": 65.0}))
    assert not later.go(start=1).cached and later.written[0]["figure"] == 70.0


def test_an_error_that_ends_a_training_is_not_hidden_by_a_guard_that_would_have_ended_it(tmp_path, tiny_config):
    stopping = tiny_config(tmp_path, guards={"stop": ["kl"]})
    with pytest.raises(InterruptedError, match="killed"):
        Driven(tmp_path, stopping).go(dies=2)  # the line of step 2, which the guard stops at, is written last
    assert [line["step"] for line in read(tmp_path / "tiny" / "metrics.jsonl")] == [1, 2]
    with pytest.raises(GuardStop, match=r"^guard kl: round 1, policy, step 2: "):
        Driven(tmp_path, stopping).go(start=2)


def test_the_command_ends_with_one_line_and_status_1(tmp_path, tiny_mapping, monkeypatch, capsys):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_mapping(tmp_path, guards={"stop": "all"})))
    line = {"stage": "policy", "round": 1, "step": 2, "rollout/kl": 60.0}
    monkeypatch.setattr("jaxrlhf.pipeline.run.check", lambda config: None)
    monkeypatch.setattr("jaxrlhf.pipeline.run.walk_through", lambda run, until: run.log.seen(line))
    assert cli.main(["run", str(recipe)]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jaxrlhf: ")]
    assert len(said) == 1 and said[0].startswith("jaxrlhf: guard kl: round 1, policy, step 2: ") and "guards.stop" in said[0]


@pytest.mark.parametrize("stop, counted", [((), True), (("kl",), False), ("all", False)])
def test_a_sweep_counts_a_run_that_a_guard_stops_as_not_finished(tmp_path, tiny_config, monkeypatch, stop, counted):
    """A guard may stop a run behind its last evaluation, when all its stages are finished."""
    config = tiny_config(tmp_path, guards={"stop": stop})
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.yaml").write_text(to_yaml(config))
    body = {"rounds": [], "notes": [], "finished": True, "guards": [{"name": "kl", "text": "high", "round": 1}]}
    (tmp_path / "tiny" / "summary.json").write_text(json.dumps(body))
    monkeypatch.setattr(sweep, "foresee", lambda config: SimpleNamespace(stages=[], undecided=None))
    done = sweep.read_finished(sweep.Job(0, "ppo", config))
    assert (done is not None) is counted and (done is None or done.notes == ("guard kl spoke; summary.json of the run says why.",))


def lines(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_holding_out_that_leaves_no_demonstration_says_so(tmp_path, tiny_config):
    """Prompts that are held out by chance, and the only ones with a reference."""
    changes = {"tokenizer__vocab_size": 300, "gold": {"kind": "function", "source": "m:f"}, "pairs__num_valid": 5}
    rows = [{"prompt": f"prompt {i} ", "response": "a reference"} for i in range(20)]
    config = tiny_config(tmp_path, data={"train": lines(tmp_path / "all.jsonl", rows), "valid_fraction": 0.2}, **changes)
    held = {row.prompt for row in inputs.evaluation_prompts_of(config)}
    assert 0 < len(held) < 20
    some = [row if row["prompt"] in held else {"prompt": row["prompt"]} for row in rows]
    config = tiny_config(tmp_path, data={"train": lines(tmp_path / "some.jsonl", some), "valid_fraction": 0.2}, **changes)
    with pytest.raises(DataError, match=r"every row of data\.train has a prompt that is also held out"):
        inputs.demonstrations_of(config)


def test_a_policy_that_always_says_the_same_leaves_no_pair_and_that_is_said(tmp_path, tiny_config, monkeypatch):
    config, tokenizer = tiny_config(tmp_path), toy_tokenizer()
    words = [token for token in tokenizer.get_vocab() if token.isalpha()][:3]
    rows = [Prompt(f"{i}", word, "here") for i, word in enumerate(words)]
    one = np.ones((3, 2), np.int32)
    side = TextBatch(one, one > 0, one, one > 0, np.ones(3, bool), np.arange(3))  # type: ignore[arg-type]
    monkeypatch.setattr(pairs_module, "two_responses", lambda *given, **how: ((side, side), (words, words)))
    run = SimpleNamespace(
        blocks=NOWHERE, config=config, mesh=None, key=RunContext.key.fget(SimpleNamespace(config=config)), report_rows=lambda *given: None
    )
    given = (run, tmp_path, pairs_module.TRAIN, SimpleNamespace(tokenizer=tokenizer), rows, ReadReport(kept=3))
    monkeypatch.setattr(pairs_module.inputs, "gold_of", lambda config, mesh: lambda prompts, texts, blocks: np.zeros(len(texts)))
    with pytest.raises(DataError, match=r"^no pair is left: π_SFT gave all 3 prompts the same text twice.* Raise pairs.temperature \(1\)"):
        pairs_module.labelled(*given, rule="argmax", label_flip=0.0)


def table_of(n: int) -> PairBatch:
    one = np.ones((n, 3), np.int32)
    return PairBatch(one, one > 0, one, one > 0, 2 * one, one > 0, np.ones(n), np.ones(n, bool), np.arange(n))  # type: ignore[arg-type]


def test_a_reward_update_that_keeps_no_pair_is_named(tmp_path, tiny_config, monkeypatch):
    (tmp_path / "keeps.py").write_text("def none(context, pairs):\n    return pairs.select([]), []\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows = [Pair(f"{i}", "p", "c", "r", "here") for i in range(2)]
    write_pair_table(tmp_path / pairs_module.TRAIN, rows, table_of(2), pad_id=0)
    models = SimpleNamespace(tokenizer=toy_tokenizer())
    facts = {"config": tiny_config(tmp_path), "mesh": None, "columns": tmp_path, "key": jax.random.key(0), "log": RunLog(None)}
    run = SimpleNamespace(blocks=NOWHERE, **facts, load=lambda done, head: models, build=lambda stage, build, round: build(tmp_path))
    done = Done("made", tmp_path, "hash", {})
    round = Round(2, "ppo", "keeps:none", True, "sft", None, 1, 1, False, True, True)
    with pytest.raises(ValueError, match=r"^reward update 'keeps:none' left none of the 2 pairs"):
        reward_update.update_stage(run, round, pairs=done, sft=done, policy=done, reward=done, before=None)  # type: ignore[arg-type]
    write_pair_table(tmp_path / pairs_module.UPDATED, [], table_of(0), pad_id=0)  # of a version that finished such a stage
    with pytest.raises(ValueError, match=r"^there is nothing to fit on: .*pairs\.parquet has no pairs"):
        reward_update.updated_pairs(done, done)
