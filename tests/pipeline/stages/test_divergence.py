"""A training whose loss or gradient is not finite: noticed at the step, its rows written down, stopped or left out."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import cli
from jaxrlhf.config import Config
from jaxrlhf.config.run import CheckpointConfig
from jaxrlhf.data.batches import permutation
from jaxrlhf.monitoring.metrics_file import read
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.pipeline.stages.context import RunContext, epochs, with_best
from jaxrlhf.pipeline.stages.divergence import Diverged, Fed
from jaxrlhf.rollouts.dataset import repeated
from jaxrlhf.steps.state import adamw, apply_gradients, init_state
from jaxrlhf.storage.checkpoint import Checkpoints
from jaxrlhf.storage.stage import Stage
from jaxrlhf.storage.store import Store
from jaxrlhf.types import PromptBatch, TextBatch

ROWS, SIZE, STEPS = 12, 4, 6
OPTIMIZER = adamw(optax.linear_schedule(0.1, 0.0, STEPS), adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-5, weight_decay=0.0)
SIDE = np.arange(ROWS * 2, dtype=np.int32).reshape(ROWS, 2)
TABLE = TextBatch(SIDE, SIDE % 2 == 1, SIDE, np.ones((ROWS, 2), bool), np.ones(ROWS, bool), np.arange(ROWS, dtype=np.int32))  # type: ignore[arg-type]
ORDER = [[int(i) for i in permutation(0, n // 3, ROWS, "order")[SIZE * (n % 3) :][:SIZE]] for n in range(STEPS)]  # rows of step n + 1
BAD = ORDER[3][0]  # in the fourth step, and in one of the first epoch, where nothing is wrong with it yet


@jax.jit
def step(state, batch, poison):
    loss = jnp.mean(batch.index_B) + jnp.where((batch.index_B == poison) & (state.step >= 3), jnp.nan, 0.0).sum()
    state, metrics = apply_gradients(state, {"w": state.params["w"] + loss * 0 + 1}, loss, OPTIMIZER)
    return replace(state, step=state.step + 1), {"loss/x": loss, **metrics}


def trained(folder, taken, poison=BAD, **checkpoint):
    """(done, log) of a stage that trains on a row that is poison from step 4 on; `taken` gets the steps that were dispatched."""
    config = Config(output=str(folder), checkpoint=CheckpointConfig(**{"every": 2, "keep": 2} | checkpoint))
    run = RunContext(config, Store(folder / ".stages"), folder / "run", RunLog(folder / "run", plain=True), None)
    fed = epochs(run, TABLE, [f"row-{i}" for i in range(ROWS)], SIZE, STEPS, seed=0, name="order")

    def build(at):
        def loop(state, rows):
            for batch in rows:
                state, metrics = step(state, batch, poison)
                taken.append(int(state.step))
                yield state, metrics

        state = run.train(at, "sft", init_state({"w": jnp.ones(3)}, OPTIMIZER), loop, fed, steps=STEPS, tokens=1)
        return {"w": float(state.params["w"][0])}

    done = run.build(Stage("sft", "data", "test", {}), build, keep_state=True)
    return done, read(done.folder / "metrics.jsonl")


def test_it_stops_at_the_step_and_says_all_that_is_known(tmp_path):
    taken = []
    with pytest.raises(Diverged) as failed:
        trained(tmp_path, taken, every=5)
    assert taken == [1, 2, 3, 4, 5], "the fourth is looked at once the fifth is dispatched, and before it is saved"
    partial = next((tmp_path / ".stages").glob(".partial-*"))
    message = str(failed.value)
    for part in (
        "sft, step 4 of 6",
        "loss/x nan",
        "learning rate 0.05",
        f"row-{BAD}",
        "no checkpoint yet",
        "--checkpoint.on_nonfinite skip",
    ):
        assert part in message, f"{part} is not in: {message}"
    said = json.loads((partial / "nonfinite-step-4.json").read_text())
    assert [row["number"] for row in said["rows"]] == ORDER[3] and said["metrics"]["loss/x"] == "NaN"
    first = said["rows"][0]
    assert first == {"id": f"row-{BAD}", "number": BAD, "prompt": [2 * BAD + 1], "response": [2 * BAD, 2 * BAD + 1]}
    assert cli._is_plain(failed.value) and not list((tmp_path / "run" / "stages").glob("*"))


def test_the_checkpoint_before_is_kept_and_skip_goes_on_from_it_to_the_same_bits(tmp_path):
    taken = []
    with pytest.raises(Diverged, match=r"checkpoint 2 in .* is kept"):
        trained(tmp_path / "a", taken)
    assert taken == [1, 2, 3, 4], "looked at before it would be saved"
    done, lines = trained(tmp_path / "a", taken, on_nonfinite="skip")
    assert taken[4:] == [3, 4, 5, 6] and done.record["result"]["skipped_steps"] == 1
    assert [line.get("nonfinite", 0) for line in lines] == [0, 0, 0, 1, 0, 0] and lines[3]["loss/x"] == "NaN"
    whole, _ = trained(tmp_path / "b", [], on_nonfinite="skip")
    assert whole.record["result"] == done.record["result"] and whole.hash == done.hash
    fine, lines = trained(tmp_path / "c", [], poison=-1)
    assert "skipped_steps" not in fine.record["result"] and not any("nonfinite" in line for line in lines)
    assert fine.record["result"]["w"] != done.record["result"]["w"]


def test_skipping_stops_after_a_number_in_a_row_counted_over_a_stop(tmp_path, monkeypatch):
    """Every step from the fourth on is bad, and two in a row are too many: a run that goes on after the first has not forgotten it."""
    one = step
    monkeypatch.setitem(globals(), "step", lambda state, batch, _: one(state, batch, batch.index_B[0]))
    taken, how = [], {"on_nonfinite": "skip", "max_nonfinite": 2, "every": 4}
    save = Checkpoints.save

    def save_and_die(self, n, *rest):
        save(self, n, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", save_and_die)
        trained(tmp_path, taken, **how)
    with pytest.raises(Diverged, match=r"step 5 of 6: .*checkpoint 4 in .*2 in a row are checkpoint.max_nonfinite"):
        trained(tmp_path, taken, **how)
    assert taken == [1, 2, 3, 4, 5, 6]


def test_prompts_are_named_by_their_row_whatever_the_epoch_and_the_group():
    prompts = PromptBatch(SIDE[:4], SIDE[:4] >= 0, np.ones(4, bool), np.array([1, 3, 4, 6], np.int32))  # type: ignore[arg-type]
    fed = Fed(lambda done: iter([repeated(prompts, 2)][done:]), ["a", "b", "c"], 2)  # three prompts, in their third epoch at the end
    assert [row["id"] for row in fed.rows(1)] == ["b", "b", "a", "a", "b", "b", "a", "a"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_is_no_result(tmp_path, value):
    run = RunContext(Config(output=str(tmp_path)), Store(tmp_path / ".stages"), tmp_path / "run", RunLog(None), None)
    with pytest.raises(Diverged, match=f"r1-reward: reward_bias is {value}, so its model has diverged"):
        run.build(Stage("r1-reward", "data", "reward", {}), lambda folder: {"reward_bias": value, "pairs": 3})
    assert not list((tmp_path / "run").glob("stages/*"))


def test_no_best_look_among_looks_that_are_not_finite(tmp_path):
    with Checkpoints(tmp_path) as kept, pytest.raises(Diverged, match="no look at the held-out rows gave a finite figure"):
        with_best(init_state({"w": jnp.ones(3)}, OPTIMIZER), kept, None)
