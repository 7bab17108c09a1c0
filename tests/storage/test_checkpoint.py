import errno
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import sharding
from jaxrlhf.storage.checkpoint import CheckpointError, Checkpoints
from jaxrlhf.types import TrainState

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
KERNEL = ("backbone", "layers_0", "q", "kernel")


def make_params():
    layer = {"q": {"kernel": jnp.arange(32.0).reshape(8, 4) / 7, "bias": jnp.ones(4, jnp.bfloat16) / 3}}
    return {"backbone": {"layers_0": layer}, "head": {"kernel": jnp.full((8, 1), 0.1)}}


@pytest.fixture
def state():
    params = make_params()
    opt_state = OPTIMIZER.init(params)
    grads = jax.tree.map(lambda p: p * 0.3, params)
    _, opt_state = OPTIMIZER.update(grads, opt_state, params)  # moments that are not zero
    return TrainState(jnp.int32(3), params, opt_state, {"kl_coef": jnp.float32(0.1)})


@jax.jit
def step(state):
    updates, opt_state = OPTIMIZER.update(jax.tree.map(jnp.sin, state.params), state.opt_state, state.params)
    return replace(state, step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state) is None
        checkpoints.save(3, state, {"stage": "reward", "seconds": 1.5})
    whole = step(step(state))
    with Checkpoints(tmp_path) as checkpoints:
        back, meta = checkpoints.restore(sharding.template(state, None))
    assert meta == {"stage": "reward", "seconds": 1.5}
    assert_same_bits(back, state)
    assert_same_bits(step(step(back)), whole)


def test_saving_does_not_race_with_donation(tmp_path):
    """`save` returns before the bytes are on disk; a step that overwrites the same memory must not reach into the file."""
    add = jax.jit(lambda params: jax.tree.map(lambda x: x + 1, params), donate_argnums=0)
    params = {str(n): jnp.zeros(200_000) for n in range(5)}
    opened = [Checkpoints(tmp_path / str(n)) for n in range(4)]
    for n, checkpoints in enumerate(opened):
        checkpoints.save(n, TrainState(n, params, {}))
        params = add(params)
    for n, checkpoints in enumerate(opened):
        with checkpoints:
            back, _ = checkpoints.restore(TrainState(0, params, {}))
        assert all(float(x.min()) == float(x.max()) == n for x in back.params.values())


def test_scalars_come_back_exactly_and_as_what_they_were(tmp_path):
    controller = {"tenth": 0.1, "big": 2**53 + 1, "np": np.float64(0.1), "on": True, "f32": jnp.float32(0.1), "key": jax.random.key(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2**40, TrainState(2**40, {"w": jnp.ones(2)}, (), controller))
        back, _ = checkpoints.restore(TrainState(0, {"w": jnp.ones(2)}, (), controller))
    assert back.step == 2**40 and back.opt_state == ()
    key, saved = back.controller.pop("key"), controller.pop("key")
    assert (jax.random.key_data(key) == jax.random.key_data(saved)).all()
    assert back.controller == controller
    assert [type(v) for v in back.controller.values()] == [type(controller[k]) for k in back.controller]


def test_the_newest_stay(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for n in (1, 2, 5):
            checkpoints.save(n, replace(state, step=jnp.int32(n)), {"n": n})
        checkpoints.save(5, replace(state, step=jnp.int32(99)))  # the same step is the same state: nothing to do
        back, meta = checkpoints.restore(state)
        assert int(back.step) == 5 and meta == {"n": 5}
    assert {path.name for path in tmp_path.iterdir()} == {"2", "5"}


def test_a_checkpoint_of_a_training_without_an_optimizer_is_refused(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, replace(state, opt_state=()))
        with pytest.raises(CheckpointError, match="lacks"):
            checkpoints.restore(state)


def test_a_checkpoint_moves_to_another_mesh(tmp_path, state):
    first, second = sharding.make_mesh(1, 4, 1), sharding.make_mesh(1, 1, 2, devices=jax.devices()[:2])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, sharding.place(state, first))
        back, _ = checkpoints.restore(sharding.template(state, second))
    kernel = back.params["backbone"]["layers_0"]["q"]["kernel"]
    assert kernel.sharding.mesh.size == 2 and kernel.addressable_shards[0].data.shape == (8, 2)
    assert_same_bits(sharding.gather(back), sharding.gather(state))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: {**p, "new": jnp.ones(2)}, "params lacks new: the config changed"),
        (lambda p: {"head": p["head"]}, "also holds backbone/layers_0/q/bias, backbone/layers_0/q/kernel"),
        (lambda p: {**p, "head": {"kernel": jnp.ones((9, 1))}}, r"head/kernel as \[8, 1\] float32, and the config needs \[9, 1\] float32"),
        (lambda p: {**p, "head": {"kernel": jnp.ones((8, 1), jnp.bfloat16)}}, r"the config needs \[8, 1\] bfloat16"),
    ],
)
def test_another_model_is_refused_not_padded_or_cast(tmp_path, state, change, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(replace(state, params=change(state.params)))


KILLED = """
import sys, jax.numpy as jnp, os, signal, time
from pathlib import Path
from jaxrlhf.storage.checkpoint import Checkpoints
from jaxrlhf.types import TrainState
checkpoints = Checkpoints(sys.argv[1])
small = {"w": jnp.ones(2)}
checkpoints.save(1, TrainState(jnp.int32(1), small, {}))
checkpoints.wait()

# However fast the disk is, the second one does not get its name before the process is killed, nor is it killed before that has begun.
def unless_it_is_the_second(rename):
    def checked(source, target, **options):
        if Path(target).name == "2":
            time.sleep(600)
        return rename(source, target, **options)
    return checked

os.rename, os.replace = unless_it_is_the_second(os.rename), unless_it_is_the_second(os.replace)
checkpoints.save(2, TrainState(jnp.int32(2), {"w": jnp.ones(30_000_000)}, {}))
while not list(Path(sys.argv[1]).glob("2*/*")):
    time.sleep(0.001)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_half_written_checkpoint_is_never_seen(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    left = {path.name for path in tmp_path.iterdir()}
    assert any(name.startswith("2") for name in left), left  # it had begun
    template = TrainState(jnp.int32(0), {"w": jnp.zeros(2)}, {})
    with Checkpoints(tmp_path) as checkpoints:
        back, _ = checkpoints.restore(template)
        assert int(back.step) == 1 and back.params["w"].tolist() == [1, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"1"}  # the half-written one is gone
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, replace(back, step=jnp.int32(2)))  # and the step can be taken again
    with Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(template)[0].step) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_a_full_disk_is_one_clear_error(tmp_path, state, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        with pytest.raises(CheckpointError, match=r"does not fit: .* 0\.0 MiB free; free some space"):
            checkpoints.save(2, state)
        monkeypatch.undo()

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", full)  # where a background write's error surfaces
        with pytest.raises(CheckpointError, match="the disk is full; free some space, then run the same command again"):
            checkpoints.wait()
        monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"1"}


def test_two_leaves_of_one_path_are_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="same path"):
        checkpoints.save(1, TrainState(1, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {}))
