"""One update of PPO or RLOO: K epochs of minibatches over a rollout, in one scan."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.losses import adaptive_kl, kl_estimate, masked_sum, ppo_value_loss, ppo_value_stats
from jaxrlhf.steps.accumulate import ConstrainRows, accumulate_gradients, global_rows, global_sum, own_rows, shards
from jaxrlhf.steps.state import apply_gradients, joined, named
from jaxrlhf.types import Array, Metrics, Model, Params, PolicyLoss, Rollout, TrainState

PPOStep = Callable[..., tuple[TrainState, Metrics]]  # (state, Rollout, key, frozen parameters or None)


def minibatch_indices(key: Array, rows: int, *, epochs: int, minibatches: int) -> Array:
    """[epochs · minibatches, rows / minibatches]: every epoch is a permutation of all rows of its own."""
    permutations = jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(key, epochs))
    return permutations.reshape(epochs * minibatches, rows // minibatches)


def critic_values(
    model: Model,
    params: Params,
    prompt_BL: Array,
    prompt_mask_BL: Array,
    tokens_BT: Array,
    mask_BT: Array,
    bias: float | Array = 0.0,
) -> Array:
    """V_t, the value before token t, read at position L − 1 + t, less `bias`; [B, T].

    The critic starts as a copy of the reward model and so inherits its `reward_bias`: without it every value would start off by that much.
    """
    tokens = jnp.concatenate([prompt_BL, tokens_BT], axis=1)
    mask = jnp.concatenate([prompt_mask_BL, mask_BT], axis=1)
    scalars = model.apply(params, tokens, mask, start=prompt_BL.shape[1] - 1).scalars
    assert scalars is not None
    return scalars[:, :-1] - bias


class LossPart(NamedTuple):
    """One term of the loss of a rollout."""

    mask: Callable[[Rollout], Array]  # the positions its mean is over: [B, T]
    loss: Callable[..., tuple[Array, Metrics]]  # (params, rollout, *, total, controller) → (scalar divided by `total`, metrics)


def policy_part(policy: Model, policy_loss: PolicyLoss, *, temperature: float | Array) -> LossPart:
    """The policy's loss: all of it for a method without critic. Reads `params["policy"]`."""

    def loss(params: Params, rows: Rollout, *, total: Array, controller: Any) -> tuple[Array, Metrics]:
        tokens = jnp.concatenate([rows.prompt_BL, rows.tokens_BT], axis=1)
        mask = jnp.concatenate([rows.prompt_mask_BL, rows.mask_BT], axis=1)
        stats = policy.score_tokens(params["policy"], tokens, mask, start=rows.prompt_BL.shape[1], temperature=temperature)
        value, metrics = policy_loss.loss(stats, rows, total=total)
        return value, {"loss/policy": value, **named("ppo", metrics)}

    return LossPart(lambda rows: rows.mask_BT, loss)


def value_part(critic: Model, *, cliprange_value: float, vf_coef: float) -> LossPart:
    """`vf_coef` times the critic's loss. Reads `params["critic"]` and, where the controller has one, its `value_bias`."""

    def loss(params: Params, rows: Rollout, *, total: Array, controller: Any) -> tuple[Array, Metrics]:
        sides = (rows.prompt_BL, rows.prompt_mask_BL, rows.tokens_BT, rows.mask_BT)
        values = critic_values(critic, params["critic"], *sides, controller.get("value_bias", 0.0))
        targets = (values, rows.values_BT, rows.returns_BT, rows.value_mask_BT)
        value = ppo_value_loss(*targets, clip=cliprange_value, total=total)
        metrics = named("ppo", ppo_value_stats(*targets, clip=cliprange_value, total=total))
        return vf_coef * value, {"loss/value": value, **metrics}

    return LossPart(lambda rows: rows.value_mask_BT, loss)


def rollout_loss(
    params: Params, rows: Rollout, *, parts: Sequence[LossPart], totals: Sequence[Array], controller: Any
) -> tuple[Array, Metrics]:
    """The sum of the parts, each divided by its own total over the global minibatch."""
    terms: list[Array] = []
    metrics: Metrics = {}
    for part, total in zip(parts, totals, strict=True):
        term, figures = part.loss(params, rows, total=total, controller=controller)
        terms.append(term)
        metrics |= figures
    return reduce(jnp.add, terms), metrics


def make_ppo_step(
    parts: Sequence[LossPart],
    optimizer: optax.GradientTransformation,
    *,
    num_ppo_epochs: int,
    num_mini_batches: int,
    adaptive: dict[str, float] | None = None,
    accumulate: int = 1,
    axis_name: str | None = None,
    constrain_rows: ConstrainRows | None = None,
) -> PPOStep:
    """A step (state, Rollout, key, frozen=None) → (state, metrics) that learns from one rollout, whatever made its advantages.

        PPO    make_ppo_step((policy_part(…), value_part(…)), …)    state.params = {"policy", "critic"}
        RLOO   make_ppo_step((policy_part(…),), …)                  state.params = {"policy"}

    `frozen` are parameters of these models that do not learn, beside those in the state (`state.joined`): {"policy": base under adapters}.
    `state.step` counts rollouts; `state.controller` may hold `kl_coef` and `value_bias`. The key (derived by the caller from
    seed and step) shuffles rows over the *global* batch, so one device, a mesh and pmap take the same minibatches. A minibatch may
    split the responses to one prompt: advantages are part of the rollout.
    `adaptive` ({"target", "horizon"}) moves the KL coefficient in `state.controller` after the update.
    `constrain_rows` (`sharding.constrain_rows(mesh)`) is called on every minibatch: where the compiler decides, the rows that a
    shuffle picks have to be dealt out to the devices again, or every device computes all of them.
    Metrics are means over all minibatches; `…_first` is the first minibatch, where the ratio must be 1. A minibatch whose loss or gradient
    is not finite changes nothing (`apply_gradients`); `nonfinite` counts them, and where there is one the controller stays as it was.
    """

    def step(state: TrainState, rollout: Rollout, key: Array, frozen: Params | None = None) -> tuple[TrainState, Metrics]:
        everything = global_rows(rollout, axis_name)
        rows = everything.row_mask_B.shape[0]
        if rows % (num_mini_batches * accumulate * shards(axis_name)):
            over = "" if axis_name is None else f" × {shards(axis_name)} devices"
            raise ValueError(f"{rows} rows do not divide into {num_mini_batches} minibatches × {accumulate} microbatches{over}.")

        def update(state: TrainState, index: Array) -> tuple[TrainState, Metrics]:
            picked = jax.tree.map(lambda x: x[own_rows(index, axis_name)], everything)
            minibatch = _live(picked if constrain_rows is None else constrain_rows(picked))
            totals = global_sum(tuple(part.mask(minibatch).sum().astype(jnp.float32) for part in parts), axis_name)

            def loss_fn(params: Params, rows: Rollout) -> tuple[Array, Metrics]:
                return rollout_loss(joined(params, frozen), rows, parts=parts, totals=totals, controller=state.controller)

            how = {"steps": accumulate, "axis_name": axis_name, "constrain_rows": constrain_rows}
            grads, loss, metrics = accumulate_gradients(loss_fn, state.params, minibatch, **how)
            state, norms = apply_gradients(state, grads, loss, optimizer)
            return state, {"loss/ppo": loss, **metrics, **norms}

        indices = minibatch_indices(key, rows, epochs=num_ppo_epochs, minibatches=num_mini_batches)
        state, history = jax.lax.scan(update, state, indices)
        metrics = {name: values.mean() for name, values in history.items()} | {"nonfinite": history["nonfinite"].sum()}
        metrics |= {f"{name}_first": history[name][0] for name in ("ppo/ratio", "ppo/approxkl") if name in history}
        if adaptive is not None:
            moved, well = _adapt(state.controller, everything, **adaptive), metrics["nonfinite"] == 0
            state = replace(state, controller=jax.tree.map(lambda old, new: jnp.where(well, new, old), state.controller, moved))
        return replace(state, step=state.step + 1), metrics

    return step


def _live(rows: Rollout) -> Rollout:
    """The rows with empty masks where a row only fills the batch."""
    live = rows.row_mask_B[:, None]
    return replace(rows, mask_BT=rows.mask_BT & live, value_mask_BT=rows.value_mask_BT & live)


def _adapt(controller, rollout: Rollout, *, target: float, horizon: float):
    """The KL coefficient after a rollout, from its mean KL to the penalty reference in nats a response (k1)."""
    live = rollout.row_mask_B[:, None]
    kl_BT = kl_estimate(rollout.logp_BT, rollout.reference_logp_BT, estimator="k1")
    episodes = rollout.row_mask_B.sum()
    kl = masked_sum(kl_BT, rollout.mask_BT & live) / jnp.maximum(episodes, 1)
    return {**controller, "kl_coef": adaptive_kl(controller["kl_coef"], kl, target=target, horizon=horizon, steps=episodes)}
