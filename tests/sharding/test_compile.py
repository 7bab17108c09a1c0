"""What every way of compiling takes and gives back alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import sharding

KINDS = [lambda: None, sharding.make_mesh, lambda: sharding.make_mesh(2, 2, 1), lambda: sharding.Replicas(sharding.make_mesh())]


@pytest.mark.parametrize("devices", KINDS, ids=["one", "data", "fsdp", "pmap"])
def test_a_scalar_of_a_batch_is_whole_on_every_device(devices):
    mesh = devices()
    batch = sharding.place_batch({"x": np.arange(8, dtype=np.float32), "shift": np.float32(2)}, mesh)
    run = sharding.rows(lambda scale, batch: scale * batch["x"] + batch["shift"], mesh)
    np.testing.assert_array_equal(sharding.gather(run(sharding.place(jnp.float32(3), mesh), batch)), 3 * np.arange(8) + 2)
    shapes = jax.eval_shape(lambda: (jnp.float32(3), {"x": jnp.zeros(8), "shift": jnp.float32(2)}))
    assert "HloModule" in run.lower(*shapes).compile().as_text()


@pytest.mark.parametrize("devices", KINDS, ids=["one", "data", "fsdp", "pmap"])
def test_a_state_from_a_step_compiles_nothing_anew(devices):
    mesh = devices()

    def make_step(axis_name):
        def step(state, batch):
            moved = jax.tree.map(lambda w: w + 1, state)
            return moved, {"rows": jnp.float32(batch.shape[0])}

        return step

    def compiled(event, seconds, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(more)

    seen = []
    step, batch = sharding.step(make_step, mesh), sharding.place_batch(np.zeros((8, 2), np.float32), mesh)
    state = sharding.place({"up": {"kernel": np.zeros((4, 4), np.float32)}, "count": np.zeros((), np.int32)}, mesh)
    jax.monitoring.register_event_duration_secs_listener(compiled)
    try:
        state, _ = step(state, batch)
        first = len(seen)
        for _ in range(2):
            state, _ = step(state, batch)
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)
    assert first and len(seen) == first
    np.testing.assert_array_equal(sharding.gather(state)["up"]["kernel"], np.full((4, 4), 3))
