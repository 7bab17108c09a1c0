"""Every random key of the library comes from here: derived from (seed, stream name, step), never stored."""

import zlib

import jax


def root_key(seed: int) -> jax.Array:
    """The key a run derives all others from."""
    return jax.random.key(seed)


def stream(root: jax.Array, name: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of stream `name` at `step`; the same (root, name, step) is always the same key.

    `step` may be traced, so a jitted step derives its keys from the step counter in its state and a
    resumed run needs nothing but the checkpoint.
    """
    return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), step)


def per_row(key: jax.Array, index_B: jax.Array) -> jax.Array:
    """One key a row, from the row's global number: a row's samples do not depend on its batch or on the mesh."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index_B)


def number(key: jax.Array) -> int:
    """A whole number from a key, for what is seeded by one on the host."""
    return int(jax.random.bits(key))
