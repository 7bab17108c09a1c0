"""Activations whose derivative is computed in the forward pass and saved.

Autodiff of GELU saves its input and evaluates erf or tanh again in the backward pass; on a CPU that second evaluation costs as much as
the matrix product beside it. Saving the derivative costs the same memory as saving the input.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def _saves_derivative(value: Callable[[Array], Array], value_and_derivative: Callable[[Array], tuple[Array, Array]]):
    """An elementwise function whose backward pass is one product with a saved array."""

    @jax.custom_vjp
    @functools.wraps(value)
    def activation(x):
        return value(x)

    def backward(derivative, cotangent):
        return (cotangent * derivative,)

    activation.defvjp(value_and_derivative, backward)
    return activation


def _gelu_and_derivative(x: Array) -> tuple[Array, Array]:
    """d/dx x·Φ(x) = Φ(x) + x·φ(x). Hendrycks and Gimpel (2016), eq. 1."""
    cdf = 0.5 * jax.lax.erfc(-x * math.sqrt(0.5))
    density = jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
    return x * cdf, cdf + x * density


_TANH_SCALE = math.sqrt(2.0 / math.pi)
_TANH_CUBIC = 0.044715


def _gelu_tanh_and_derivative(x: Array) -> tuple[Array, Array]:
    """The tanh approximation ("gelu_new", "gelu_pytorch_tanh"). Hendrycks and Gimpel (2016), section 2."""
    square = x * x
    tanh = jnp.tanh(_TANH_SCALE * x * (1.0 + _TANH_CUBIC * square))
    half = 0.5 * (1.0 + tanh)
    slope = _TANH_SCALE * (1.0 + 3.0 * _TANH_CUBIC * square)
    return x * half, half + 0.5 * x * (1.0 - tanh * tanh) * slope


def _silu_and_derivative(x: Array) -> tuple[Array, Array]:
    """x·σ(x)."""
    sigmoid = jax.nn.sigmoid(x)
    return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _saves_derivative(functools.partial(jax.nn.gelu, approximate=False), _gelu_and_derivative),
    "gelu_tanh": _saves_derivative(functools.partial(jax.nn.gelu, approximate=True), _gelu_tanh_and_derivative),
    "silu": _saves_derivative(jax.nn.silu, _silu_and_derivative),
}
