"""The two heads on one backbone: vocabulary logits, or one number a position for rewards and values.

A parameter tree is {"backbone": …, "head": {"kernel": …}}; a tied lm head has no "head" of its own.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf.models.transformer import DecoderConfig
from jaxrlhf.types import Params

HEADS = ("lm", "scalar")


def check_head(head: str) -> None:
    if head not in HEADS:
        raise ValueError(f"head {head!r} is not one of {HEADS}.")


def init_scalar_head(key: Array, hidden_size: int) -> Params:
    """kernel [d, 1] ~ N(0, 1/(d + 1)), no bias: a shared constant cancels in Bradley–Terry. Stiennon et al. (2020), appendix B.1."""
    return {"kernel": jax.random.normal(key, (hidden_size, 1), jnp.float32) * (hidden_size + 1) ** -0.5}


def init_lm_head(key: Array, config: DecoderConfig) -> Params:
    """kernel [d, V] ~ N(0, initializer_range²)."""
    return {"kernel": jax.random.normal(key, (config.hidden_size, config.vocab_size), jnp.float32) * config.initializer_range}


def with_head(params: Params, key: Array | None, config: DecoderConfig, head: str) -> Params:
    """The same backbone under a new head. A tied lm head needs no key; every other new head is random and does.

    The backbone's arrays are shared, not copied: do not donate one tree while the other is in use.
    """
    check_head(head)
    if head == "lm" and config.tied_head:
        return {"backbone": params["backbone"]}
    if key is None:
        raise ValueError(f"a new {head!r} head is random: pass key=.")
    made = init_scalar_head(key, config.hidden_size) if head == "scalar" else init_lm_head(key, config)
    return {"backbone": params["backbone"], "head": made}


def lm_logits(params: Params, hidden: Array) -> Array:
    """float32 logits [..., V] of hidden states [..., d]; the product runs in the dtype of `hidden` and accumulates in float32."""
    if "head" in params:
        kernel, contract = params["head"]["kernel"], 0
    else:
        kernel, contract = params["backbone"]["embed"]["embedding"], 1
    dimensions = (((hidden.ndim - 1,), (contract,)), ((), ()))
    return jax.lax.dot_general(hidden, kernel.astype(hidden.dtype), dimensions, preferred_element_type=jnp.float32)


def scalars(params: Params, hidden: Array) -> Array:
    """One float32 number a position, [..., d] → [...]; always exact in float32, because scores are compared by their differences."""
    kernel = params["head"]["kernel"].astype(jnp.float32)
    return jnp.matmul(hidden.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)[..., 0]
