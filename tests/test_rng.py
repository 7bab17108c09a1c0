import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import rng
from jaxrlhf.models.heads import init_scalar_head
from jaxrlhf.rollouts.generate import token_uniforms
from jaxrlhf.steps.ppo import minibatch_indices


def bits(key):
    return np.asarray(jax.random.key_data(key))


def test_same_seed_name_and_step_give_the_same_key():
    again = rng.stream(rng.root_key(7), "rollout", 3)
    np.testing.assert_array_equal(bits(rng.stream(rng.root_key(7), "rollout", 3)), bits(again))
    traced = jax.jit(lambda step: rng.stream(rng.root_key(7), "rollout", step))(jnp.int32(3))
    np.testing.assert_array_equal(bits(traced), bits(again))


def test_streams_are_pinned():
    """A change here changes every run that anyone reproduces: these bits may not move."""
    assert bits(rng.stream(rng.root_key(0), "rollout", 1)).tolist() == [4043309685, 923649334]


def test_seed_name_and_step_all_matter():
    keys = [rng.stream(rng.root_key(seed), name, step) for seed in (0, 1) for name in ("rollout", "init") for step in (0, 1)]
    assert len({tuple(bits(key)) for key in keys}) == 8


def test_rows_draw_the_same_whatever_their_batch():
    key = rng.stream(rng.root_key(0), "rollout")
    whole = bits(rng.per_row(key, jnp.arange(8)))
    np.testing.assert_array_equal(bits(rng.per_row(key, jnp.array([5, 2]))), whole[[5, 2]])
    assert len({tuple(row) for row in whole}) == 8


def test_every_seed_is_another_key_and_what_is_none_is_refused():
    """jax cuts a seed to 32 bits, so that 0 and 2³² were one seed, and 2⁶³ a traceback of numpy's."""
    assert bits(rng.root_key(2**32)).tolist() == [1, 0]
    for seed in (0, 1, 2**31, 2**32 - 1, 2**32 + 1, 2**63, 2**64 - 1):
        assert bits(rng.root_key(seed)).tolist() == list(divmod(seed, 2**32))
    for seed in (2**64, -1):
        with pytest.raises(ValueError, match=f"seed {seed} must lie between 0 and 2⁶⁴ − 1"):
            rng.root_key(seed)


def draws():
    """Every kind of draw of the library, as bytes."""
    key = rng.stream(rng.root_key(3), "rollout", 1)
    drawn = (
        init_scalar_head(key, 5)["kernel"],
        token_uniforms(key, np.arange(3, dtype=np.int32), 4),
        minibatch_indices(key, 8, epochs=2, minibatches=2),
        jax.vmap(rng.bits)(rng.per_row(key, np.arange(3, dtype=np.int32))),
    )
    return [*(np.asarray(draw).astype(np.float64).tolist() for draw in drawn), rng.number(key)]


def test_flags_of_the_process_change_no_draw_or_are_refused():
    usual = draws()
    with jax.default_prng_impl("rbg"), jax.enable_x64(True):
        assert draws() == usual
    with jax.threefry_partitionable(False), pytest.raises(ValueError, match="JAX_THREEFRY_PARTITIONABLE"):
        draws()
    with pytest.raises(ValueError, match="a key of rbg; make it with"):
        rng.per_row(jax.random.key(0, impl="rbg"), np.arange(3, dtype=np.int32))
