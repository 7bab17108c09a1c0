"""Trainings that are watched while they run: looks at held-out rows, rates and norms in the log, the best look kept over a kill."""

import dataclasses
import io
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf.config import DPOConfig, RewardConfig, SFTConfig
from jaxrlhf.config.guards import GuardsConfig
from jaxrlhf.evaluation.guards import Guards
from jaxrlhf.monitoring.metrics_file import read
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.pipeline.run import run
from jaxrlhf.pipeline.stages import context
from jaxrlhf.pipeline.summary import Summary
from jaxrlhf.storage.record import read_record
from jaxrlhf.storage.stage import Done

pytestmark = pytest.mark.usefixtures("one_device")

# SFT far too fast, over the same few rows again and again: its held-out loss falls and rises.
WATCHED = {
    "rounds": 1,
    "data__num_demonstrations": 32,
    "sft": {"batch_size": 32, "learning_rate": 0.1, "lr_scheduler_type": "constant", "num_train_epochs": 6, "eval_steps": 1,
            "load_best_model_at_end": True},
    "reward__eval_steps": 1,
    "checkpoint": {"every": 2, "keep": 1},
}  # fmt: skip


def params_of(folder, name, head="lm"):
    return jax.tree.leaves(jaxrlhf.load(next((folder / "stages").glob(f"*-{name}")), head=head).params)


def lines_of(folder, stage):
    return [line for line in read(folder / "metrics.jsonl") if line["stage"] == stage]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_config):
    for section in (SFTConfig, RewardConfig, DPOConfig):
        assert {"eval_steps", "load_best_model_at_end", "metric_for_best_model"} <= {field.name for field in dataclasses.fields(section)}
    return run(tiny_config(tmp_path_factory.mktemp("watched"), **WATCHED), until="reward")


def test_every_training_logs_its_rate_its_norm_and_its_looks(whole):
    sft, reward = (lines_of(whole, name) for name in ("sft", "reward"))
    assert [line.get("learning_rate") for line in reward] == pytest.approx([1e-3, 5e-4])  # half a cosine
    for line in [*sft, *reward]:
        assert line["learning_rate"] > 0 and line["grad_norm"] > 0 and 0 <= line["eval_accuracy"] <= 1 and line["eval_loss"] > 0
    # The last look at the held-out pairs is what the stage reports of them.
    record = read_record(next((whole / "stages").glob("*-r1-reward")))["result"]
    assert reward[-1]["eval_accuracy"] == pytest.approx(record["accuracy_valid"]) and record["kept_step"] == record["steps"]


def test_the_best_look_is_what_goes_on(whole):
    losses = [line["eval_loss"] for line in lines_of(whole, "sft")]
    best = int(np.argmin(losses)) + 1
    assert best < len(losses) == 6
    record = read_record(next((whole / "stages").glob("*-sft")))["result"]
    assert (record["kept_step"], record["steps"]) == (best, 6)
    assert not list((whole / "stages").glob("*/checkpoint"))


def test_the_step_that_goes_on_is_said(whole, tmp_path, tiny_config):
    """In the terminal, of a stage that was found too, and in summary.json, whose notes the report shows."""
    kept = read_record(next((whole / "stages").glob("*-sft")))["result"]["kept_step"]
    said = f"sft goes on with step {kept} of 6, its best look (load_best_model_at_end)."
    run(tiny_config(whole.parent, **WATCHED), until="sft", log=RunLog(tmp_path, plain=True, file=(out := io.StringIO())))
    assert f"note: {said}" in out.getvalue()
    stages = [Done(name, tmp_path, name, {"seconds": 1.0, "result": result}) for name, result in (
        ("sft", {"steps": 6, "kept_step": kept}), ("r1-reward", {"steps": 2, "kept_step": 2}), ("sft-evaluation", {}))]  # fmt: skip
    config = SimpleNamespace(method="ppo", row={}, seed=0, name="tiny")
    given = SimpleNamespace(stages=stages, config=config, folder=tmp_path, guards=Guards(GuardsConfig(), print))
    Summary(given, 1).add(None, stages[-1])  # type: ignore[arg-type]
    assert json.loads((tmp_path / "summary.json").read_text())["notes"] == [said]


@pytest.mark.parametrize("after", [3, 5])
def test_a_kill_after_any_look_changes_no_bit(whole, tmp_path, tiny_config, monkeypatch, after):
    config, looked = tiny_config(tmp_path, **WATCHED), []

    def stopped(held_out, n, state, kept):
        seen = look(held_out, n, state, kept)
        looked.append(n)
        if len(looked) == after:
            if kept is not None:
                kept.wait()  # as bad as it gets: the look is on disk, and the step is not
            raise InterruptedError("stopped")
        return seen

    look = context.look
    monkeypatch.setattr(context, "look", stopped)
    with pytest.raises(InterruptedError):
        run(config, until="sft")
    folder = run(config, until="sft")
    assert looked == [*range(1, after + 1), *range(after - after % 2 + 1, 7)]
    assert all((a == b).all() for a, b in zip(params_of(folder, "sft"), params_of(whole, "sft"), strict=True))
    assert lines_of(folder, "sft") == lines_of(whole, "sft")


def test_a_policy_fitted_to_pairs_is_watched_too(tmp_path, tiny_config):
    dpo = {"batch_size": 16, "learning_rate": 1e-3, "num_train_epochs": 2, "eval_steps": 2, "load_best_model_at_end": True,
           "metric_for_best_model": "accuracy"}  # fmt: skip
    folder = run(tiny_config(tmp_path, rounds=1, method="dpo", dpo=dpo, lora={"r": 2}), until="ppo")
    lines = lines_of(folder, "policy")
    seen = {line["step"]: line["eval_accuracy"] for line in lines if "eval_accuracy" in line}
    assert list(seen) == [2, 4, 6] == [line["step"] for line in lines if "eval_loss" in line]
    record = read_record(next((folder / "stages").glob("*-r1-policy")))["result"]
    assert record["kept_step"] == max(seen, key=lambda n: (seen[n], -n))


def test_keeping_the_best_of_no_look_is_refused(tiny_config, tmp_path):
    for section in ("sft", "reward", "dpo"):
        with pytest.raises(
            ValueError, match=rf"{section}.load_best_model_at_end keeps the best look .* {section}.eval_steps asks for none"
        ):
            tiny_config(tmp_path, **{f"{section}__load_best_model_at_end": True})
