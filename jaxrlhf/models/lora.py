"""LoRA: a kernel W learns by a product of two thin matrices beside it. Hu et al. (2021), LoRA: Low-Rank Adaptation, section 4.1.

    x·W + (x·A)·B · α/r        W [in, out] frozen, A [in, r] ~ N(0, 1/in), B [r, out] = 0

An adapted parameter tree is an ordinary one in which the dicts of the target kernels hold `lora_a`, `lora_b` and `lora_scale` beside
`kernel`; the model reads them where it finds them (`transformer.Projection`), and never makes W + A·B·α/r while it trains. What learns is
a tree of its own that holds `lora_a` and `lora_b` alone: gradients, moments and checkpoints are as small. `steps.state.joined` lays it
over the frozen rest.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from jaxrlhf import rng
from jaxrlhf.types import Params

TARGETS = ("q", "k", "v", "out", "up", "gate", "down")  # every kernel of a layer
LEAVES = ("lora_a", "lora_b", "lora_scale")


def adapters(params: Params, key: Array, *, r: int, alpha: float, targets: Collection[str] = TARGETS) -> tuple[Params, Params]:
    """(what learns, the frozen rest) of a model's parameters, such that both joined compute what `params` do, bit for bit.

    The rest holds the very arrays of `params`, and the scale α/r beside every target kernel. A target that this family does not have (a
    gate) is passed over. Raises ValueError for r < 1, and where no target is there.
    """
    if r < 1:
        raise ValueError(f"the rank r of an adapter is {r}; it must be at least 1.")
    learned: dict[Any, Array] = {}
    frozen: Any = flatten_dict(params)
    for path, kernel in list(frozen.items()):
        *at, leaf = path
        if at[0] == "backbone" and leaf == "kernel" and kernel.ndim == 2 and at[-1] in targets:
            rows, columns = kernel.shape
            learned[*at, "lora_a"] = jax.random.normal(rng.stream(key, "/".join(at)), (rows, r), jnp.float32) * rows**-0.5
            learned[*at, "lora_b"] = jnp.zeros((r, columns), jnp.float32)
            frozen[*at, "lora_scale"] = jnp.float32(alpha / r)
    if not learned:
        raise ValueError(f"none of the targets {', '.join(targets)} is a kernel of this model; its layers have {', '.join(TARGETS)}.")
    return unflatten_dict(learned), unflatten_dict(frozen)


def merged(params: Params) -> Params:
    """An adapted tree as an ordinary one, W + A·B·α/r in float32; a tree without adapters as it is. The other leaves are shared."""
    if "lora_a" in params:
        update = jnp.matmul(params["lora_a"], params["lora_b"], precision=jax.lax.Precision.HIGHEST)
        rest = {name: leaf for name, leaf in params.items() if name not in LEAVES}
        return rest | {"kernel": params["kernel"] + update * params["lora_scale"]}
    return {name: merged(part) if isinstance(part, dict) else part for name, part in params.items()}
