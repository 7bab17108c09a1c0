"""Advantages and returns of sampled responses."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Num

from jaxrlhf.losses.masked import AnyArray, Scalar, as_float, masked_fill

Placement: TypeAlias = Literal["after_eos", "at_eos"]


def value_mask(mask: Bool[AnyArray, "B T"], placement: Placement) -> Bool[Array, "B T"]:
    """Positions that have a value: one more than the response when the score lands after EOS and there is room.

        after_eos: t ≤ min(len + 1, T − 1),   at_eos: t ≤ len        (len: index of the last response token)

    Position len + 1 is the state *after* the response; its value is what makes the step to the score learnable.
    """
    check_placement(placement)
    mask = jnp.asarray(mask)
    if placement == "at_eos":
        return mask
    return mask | jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))


def gae(
    rewards: Num[AnyArray, "B T"], values: Float[AnyArray, "B T"], value_mask: Bool[AnyArray, "B T"], *, gamma: Scalar, lam: Scalar
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimates and the returns the values are trained on.

        δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γλ A_{t+1},   R_t = A_t + V_t

    Episodes end: beyond the mask rewards and values are 0 and nothing is bootstrapped, also for a response that was cut
    off without EOS. Advantages and returns are 0 outside the mask. V_t is the value *before* token t.
    Schulman et al. (2016), "High-dimensional continuous control using generalized advantage estimation", eq. 16.
    """
    rewards, values = masked_fill(rewards, value_mask), masked_fill(values, value_mask)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = rewards + gamma * next_values - values

    def back(advantage: Float[Array, " B"], delta: Float[Array, " B"]) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        advantage = delta + gamma * lam * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
    advantages = masked_fill(advantages.T, value_mask)
    return advantages, advantages + values


def rloo_advantages(returns: Num[AnyArray, " B"], *, samples: int) -> Float[Array, " B"]:
    """Leave-one-out advantages: each response against the mean of the other responses to its prompt.

        A_i = R_i − 1/(k−1) Σ_{j≠i} R_j,   k = samples, R = score minus the KL penalty of the whole response

    Rows of one prompt must be neighbours: rows 0 … k−1 belong to the first prompt, and so on. One number a response: every
    token of it gets the same. Needs no critic. Kool et al. (2019); Ahmadian et al. (2024), "Back to basics".
    """
    if samples < 2 or returns.shape[0] % samples:
        raise ValueError(f"{returns.shape[0]} rows do not form groups of {samples}; samples must be 2 or more and divide the rows.")
    groups = as_float(returns).reshape(-1, samples)
    others = (jnp.sum(groups, axis=1, keepdims=True) - groups) / (samples - 1)
    return (groups - others).reshape(-1)


def check_placement(placement: str) -> None:
    """Raise unless the placement of the score is one of the two that exist."""
    if placement not in ("after_eos", "at_eos"):
        raise ValueError(f'placement {placement!r} is not one of "after_eos", "at_eos".')
