"""Every random key of the library comes from here: derived from (seed, stream name, step), never stored.

Keys are of threefry2x32 and draws 32 bits wide by name, whatever the flags of the process: under another generator a row's draw would
depend on its batch mates and on the devices.
"""

import zlib

import jax
import jax.numpy as jnp

IMPL = "threefry2x32"
MAX_SEED = 2**64 - 1
_GUARDS = [f"jax_transfer_guard{way}" for way in ("", "_host_to_device", "_device_to_device", "_device_to_host")]
# Flags of the process and their values under which a command has other bits (64: the draws are the same, the rest is not), or no end.
_REFUSED = {"jax_enable_x64": (True,), "jax_numpy_dtype_promotion": ("strict",), "jax_numpy_rank_promotion": ("raise",)}
_REFUSED |= dict.fromkeys(_GUARDS, ("disallow", "disallow_explicit"))


def root_key(seed: int) -> jax.Array:
    """The key a run derives all others from, another for every seed. ValueError outside of 0..2⁶⁴ − 1 and under a flag that moves bits."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed {seed} must lie between 0 and 2⁶⁴ − 1.")
    if not jax.config.jax_threefry_partitionable:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError("JAX_THREEFRY_PARTITIONABLE is off, under which a seed draws other numbers; unset it.")
    # jax.random.key would keep the lower 32 bits alone; below 2³² these are its keys.
    return jax.random.wrap_key_data(jnp.array(divmod(seed, 2**32), jnp.uint32), impl=IMPL)


def check_flags() -> None:
    """ValueError where the process has a flag under which the same command has other bits, which no hash would know, or stops half-way."""
    for name, refused in _REFUSED.items():
        found = getattr(value := getattr(jax.config, name), "value", value)  # some are enumerations
        if found in refused:
            why = "has other bits" if found is True else "stops half-way"
            raise ValueError(f"{name.upper()} is {'on' if found is True else found}, under which the same command {why}; unset it.")


def stream(root: jax.Array, name: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of stream `name` at `step`; the same (root, name, step) is always the same key.

    `step` may be traced, so a jitted step derives its keys from the step counter in its state and a
    resumed run needs nothing but the checkpoint.
    """
    return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), step)


def per_row(key: jax.Array, index_B: jax.Array) -> jax.Array:
    """One key a row, from the row's global number: a row's samples do not depend on its batch or on the mesh.

    ValueError for a key of another generator, for which that does not hold.
    """
    if str(jax.random.key_impl(key)) != IMPL:
        raise ValueError(f"this is a key of {jax.random.key_impl(key)}; make it with jaxrlhf.rng.root_key(seed).")
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index_B)


def bits(key: jax.Array) -> jax.Array:
    """32 random bits."""
    return jax.random.bits(key, dtype=jnp.uint32)


def number(key: jax.Array) -> int:
    """A whole number from a key, for what is seeded by one on the host."""
    return int(bits(key))
