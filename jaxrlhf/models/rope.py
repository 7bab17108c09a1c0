"""Rotary position embeddings as a table computed once, and the rotation that gathers from it.

Su et al. (2021), eq. 34, in the half-split layout of GPT-NeoX and Llama: dimension i is paired with i + rotary_dim/2.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array

Rope = tuple[Array, Array]  # cos and sin, [B, 1, T, rotary_dim / 2] float32


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched beyond the pre-training length.

    "linear" divides every frequency by `factor`; "llama3" keeps high frequencies, divides low ones, and interpolates between
    (Llama 3.1's `rope_type`).
    """

    kind: str  # "linear" | "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


def inverse_frequencies(rotary_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians a position of each dimension pair, float32 [rotary_dim / 2]."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    frequencies = (np.float32(1.0) / np.float32(theta) ** exponents).astype(np.float32)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return (frequencies / np.float32(scaling.factor)).astype(np.float32)
    wavelengths = 2.0 * math.pi / frequencies
    longest = scaling.original_max_positions / scaling.low_freq_factor
    shortest = scaling.original_max_positions / scaling.high_freq_factor
    spread = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / spread
    between = (1.0 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = np.where(wavelengths > longest, frequencies / scaling.factor, np.where(wavelengths < shortest, frequencies, between))
    return scaled.astype(np.float32)


def rope_table(length: int, rotary_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of positions 0..length−1, float32 [length, rotary_dim / 2].

    A numpy constant of the length in use: computed in a layer it would be recomputed by every consumer, and for the model's
    whole context it would be a constant of many megabytes in every compiled program.
    """
    angles = np.arange(length, dtype=np.float32)[:, None] * inverse_frequencies(rotary_dim, theta, scaling)[None, :]
    return np.cos(angles), np.sin(angles)


def gather_rope(table: tuple[np.ndarray, np.ndarray], positions_BT: Array) -> Rope:
    """The rows of the table at `positions_BT`, with an axis for heads."""
    cos, sin = table
    return jnp.asarray(cos)[positions_BT][:, None], jnp.asarray(sin)[positions_BT][:, None]


def rotate(x_BHTD: Array, rope: Rope) -> Array:
    """Rotates the first rotary_dim dimensions of each head and passes the rest."""
    cos, sin = (part.astype(x_BHTD.dtype) for part in rope)
    half = cos.shape[-1]
    first, second, rest = x_BHTD[..., :half], x_BHTD[..., half : 2 * half], x_BHTD[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
