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
