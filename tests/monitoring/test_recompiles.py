"""What compiles in the middle of a loop is named; the cache of compiled programs is on, is left to the user, and ends no run."""

import logging
import os
import re
import subprocess
import sys
import threading
import zlib
from io import StringIO

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.monitoring.recompiles import EXPLAIN, SHOWN, CompileWatch, RecompileError, count_compilations, ignore_compilations
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.sharding import compile_cache
from jaxrlhf.storage.checkpoint import Checkpoints
from jaxrlhf.types import TrainState


def step_of():
    def step(state, batch):
        return {"w": state["w"] * 2}, batch["tokens"].sum()

    return jax.jit(step)


def tokens(rows=8, width=32, dtype=np.int32):
    return {"tokens": np.ones((rows, width), dtype)}


def said(batches, *, state=None, step=None, **options):
    """What a watch says of a loop over `batches`."""
    heard: list[str] = []
    watch = CompileWatch(say=heard.append, **options).start()
    step, state = step or step_of(), {"w": np.ones(3, np.float32)} if state is None else state
    try:
        for n, batch in enumerate(batches, start=1):
            step(state, batch)
            watch.step(n)
    finally:
        watch.stop()
    return heard


def test_the_first_step_may_compile_and_equal_ones_are_silent():
    assert said([tokens()] * 4) == []


@pytest.mark.parametrize(
    "other",
    [
        tokens(width=40),
        tokens(rows=5),
        tokens(dtype=np.float32),
        {"tokens": np.ones((8, 32), np.int32), "more": 1},  # an argument that is not used
    ],
    ids=["width", "rows", "dtype", "structure"],
)
def test_what_compiles_again_is_named_with_its_step_and_seconds(other):
    (text,) = said([tokens(), tokens(), other, other, tokens()])
    assert re.match(r"step 3: jit\(step\) compiled again, [\d.e-]+ s: ", text) and f"{EXPLAIN}=1" in text


def test_the_way_out_of_the_message_exists(caplog):
    """JAX has the option, reads it from the environment under that name, and says which argument changed."""
    assert EXPLAIN.lower() in jax.config.values
    step, state = step_of(), {"w": np.ones(3, np.float32)}
    with jax.explain_cache_misses(True), caplog.at_level(logging.WARNING):
        step(state, tokens())
        step(state, tokens(width=40))
    assert "batch['tokens']" in caplog.text and "[8,40]" in caplog.text


def test_arrays_that_are_committed_compile_again():
    """What a restored checkpoint can do: the very same shapes, and another program."""
    step, heard = step_of(), []
    watch = CompileWatch(say=heard.append).start()
    state = {"w": np.ones(3, np.float32)}
    for n, where in enumerate((state, state, jax.device_put(state, jax.devices()[0])), start=1):
        step(where, tokens())
        watch.step(n)
    watch.stop()
    assert len(heard) == 1 and heard[0].startswith("step 3: jit(step) compiled again, ")


def test_a_restored_state_needs_no_other_program(tmp_path):
    """What goes on from a checkpoint compiles what the cache of compiled programs has: the arrays lie as if placed anew."""
    state = TrainState(jnp.int32(3), {"w": jnp.arange(3.0)}, {})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
        restored = checkpoints.restore(sharding.template(state, None))[0]
        again = checkpoints.restore(sharding.template(state, None))[0]
    step = step_of()
    step(sharding.place(state.params, None), tokens())
    for tree, programs in ((sharding.uncommitted(restored.params, None), 0), (again.params, 1)):
        with count_compilations() as watch:
            step(tree, tokens())
        assert len(watch.seen) == programs
    assert np.array_equal(sharding.uncommitted(again.params, None)["w"], np.arange(3.0))


def test_a_function_made_anew_in_every_step_is_summed_up():
    heard: list[str] = []
    watch = CompileWatch(say=heard.append).start()
    for n in range(1, 9):
        step_of()({"w": np.ones(3, np.float32)}, tokens())
        watch.step(n)
    watch.stop()
    assert len(heard) == SHOWN + 1 and heard[0].startswith("step 2: ")
    assert heard[-1].startswith("7 compilations after the first step in all, ")


def test_a_graph_that_is_first_called_late():
    step, heard = step_of(), []
    watch = CompileWatch(say=heard.append).start()
    watch.step(1)
    step({"w": np.ones(3, np.float32)}, tokens())
    watch.step(2)
    watch.stop()
    assert len(heard) == 1 and heard[0].startswith("step 2: jit(step) compiled, ") and "not called in the first step" in heard[0]


def test_widths_of_buckets_are_no_error_and_a_new_graph_is():
    heard = said([tokens(), tokens(width=40), tokens(width=48), tokens(width=40)], mode="error", widths=8)
    assert [text.split(",")[0] for text in heard] == [f"step {n}: jit(step) compiled again" for n in (2, 3)]
    assert "data.bucket 8" in heard[0]
    watch = CompileWatch("error", widths=8).start()
    watch.step(1)
    step_of()({"w": np.ones(3, np.float32)}, tokens())
    with pytest.raises(RecompileError, match=r"step 2: jit\(step\) compiled, .*not called in the first step"):
        watch.step(2)
    watch.stop()


def test_error_raises_and_off_is_silent():
    with pytest.raises(RecompileError, match=rf"step 2: jit\(step\) compiled again, .* s: .*{EXPLAIN}=1.*log\.recompiles: warn"):
        said([tokens(), tokens(width=40)], mode="error")
    assert said([tokens(), tokens(width=40)], mode="off") == []


def test_through_the_log_under_the_stage_s_name_and_until_its_end(tmp_path):
    out, step, state = StringIO(), step_of(), {"w": np.ones(3, np.float32)}
    with RunLog(tmp_path, plain=True, file=out) as log:
        with log.stage("policy", round=1, watch=CompileWatch()) as stage:
            for n, width in enumerate((32, 32, 40), start=1):
                step(state, tokens(width=width))
                stage.dispatched(n)
        step(state, tokens(width=48))
        with log.stage("reward", round=1, watch=CompileWatch()) as stage:  # every stage has a warm-up of its own
            step(state, tokens(width=56))
            stage.step(1, {})
    text = out.getvalue()
    assert text.count("compiled") == 1 and "round 1 policy: step 3: jit(step) compiled again, " in text


def test_seconds_are_counted_until_the_end_of_the_block():
    with count_compilations() as outer:
        with count_compilations() as inner:
            step_of()({"w": np.ones(3, np.float32)}, tokens(width=24))
        before = outer.seconds
        step_of()({"w": np.ones(3, np.float32)}, tokens(width=16))
    assert 0 < inner.seconds == before < outer.seconds
    assert [c.graph for c in inner.seen] == ["jit(step)"] and len(outer.seen) == 2


def test_other_threads_and_ignored_blocks_are_not_counted():
    def compile_one():
        step_of()({"w": np.ones(3, np.float32)}, tokens())

    with count_compilations() as watch:
        thread = threading.Thread(target=compile_one)
        thread.start()
        thread.join()
        with ignore_compilations():
            compile_one()
        assert watch.seen == []
        compile_one()
    assert len(watch.seen) == 1


CACHE = """
import os, sys, jax
from jaxrlhf.sharding.compile_cache import cache_compilations
cache_compilations()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
f = jax.jit(lambda x: x @ x + 1)
print(float(f(jax.numpy.ones((4, 4)))[0, 0]), jax.config.values["jax_compilation_cache_dir"])
"""


def cached(folder, **environment):
    """(what a process prints that computes 5.0, what it warns of) with its home in `folder`."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("JAX") and k != "XDG_CACHE_HOME"}
    done = subprocess.run(
        [sys.executable, "-c", CACHE],
        env=keep | {"HOME": str(folder), "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_programs_are_kept_at_home_and_a_damaged_one_ends_no_run(tmp_path):
    (value, folder), _ = cached(tmp_path)
    assert value == "5.0" and folder.startswith(str(tmp_path / ".cache" / "jaxrlhf" / "xla"))
    entries = sorted((tmp_path / ".cache").rglob("jit__lambda*-cache"))
    assert len(entries) == 1
    entries[0].write_bytes(zlib.compress(b"\0" * 400))  # unpacks well and is no program
    (value, _), warned = cached(tmp_path)
    assert value == "5.0" and "jit__lambda" in warned


def test_a_home_that_takes_no_folder_and_a_folder_of_the_user_s(tmp_path):
    (tmp_path / ".cache").write_text("in the way")
    printed, warned = cached(tmp_path)
    assert printed == ["5.0", "None"] and "compiled programs are not kept" in warned and "JAX_COMPILATION_CACHE_DIR" in warned
    for chosen in (str(tmp_path / "mine"), ""):  # a folder, and none
        printed, warned = cached(tmp_path, JAX_COMPILATION_CACHE_DIR=chosen)
        assert printed in (["5.0", chosen or "None"], ["5.0"]) and "not kept" not in warned


def test_a_setting_made_in_python_is_left_alone():
    before = jax.config.values["jax_compilation_cache_dir"]
    assert before  # the tests' own
    compile_cache.cache_compilations()
    assert jax.config.values["jax_compilation_cache_dir"] == before
