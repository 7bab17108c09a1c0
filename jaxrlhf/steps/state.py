"""Training state and the optimizers that move it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.types import Array, Metrics, Params, TrainState


def init_state(params: Params, optimizer: optax.GradientTransformation, controller: Mapping[str, Array] | None = None) -> TrainState:
    """A state at step 0. `controller` holds what adapts between steps (PPO: the KL coefficient)."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), controller=dict(controller or {}))


def joined(learned: Params, frozen: Params | None) -> Params:
    """Two trees of nested dicts laid over each other: the parameters of a model of which a part learns and the rest does not.

    Where both have a dict it is joined; where both have a leaf, the one that learns counts. Arrays are shared. Without `frozen` all learn.
    """
    if frozen is None:
        return learned
    both = {name: joined(part, frozen[name]) for name, part in learned.items() if name in frozen and isinstance(part, dict)}
    return {**frozen, **learned, **both}


def learning_rate_schedule(kind: str, learning_rate: float, *, steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Rate of optimizer step 0, 1, …: linear warm-up to `learning_rate`, then `constant`, or `linear` or `cosine` to 0 after `steps` steps.

    As in torch and transformers the last step (`steps` − 1) is still above 0.
    """
    rest = max(steps - warmup_steps, 1)
    if kind == "constant":
        main = optax.constant_schedule(learning_rate)
    elif kind == "linear":
        main = optax.linear_schedule(learning_rate, 0.0, rest)
    elif kind == "cosine":
        main = optax.cosine_decay_schedule(learning_rate, rest)
    else:
        raise ValueError(f"lr_scheduler_type {kind!r} is unknown; use 'constant', 'linear' or 'cosine'.")
    if warmup_steps == 0:
        return main
    # The first step is already 1/warmup of the peak: a step at rate 0 would be lost.
    ramp = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, max(warmup_steps - 1, 1))
    return optax.join_schedules([ramp, main], [warmup_steps])


class Frozen(NamedTuple):
    """State of `freeze_for`: calls so far, and the state of what is frozen."""

    count: Array
    inner: Any


def freeze_for(inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """`inner`, but for its first `steps` calls nothing moves: not the parameters, not the moments, not the decay."""
    if steps == 0:
        return inner

    def init(params):
        return Frozen(jnp.zeros((), jnp.int32), restarted_schedules(inner.init(params)))  # the rate it reports is 0

    def update(updates, state, params=None):
        count, inner_state = state.count, state.inner
        moved, moved_state = inner.update(updates, inner_state, params)
        frozen = count < steps
        updates = jax.tree.map(lambda u: jnp.where(frozen, jnp.zeros_like(u), u), moved)
        return updates, Frozen(count + 1, jax.tree.map(lambda old, new: jnp.where(frozen, old, new), inner_state, moved_state))

    return optax.GradientTransformation(init, update)


def adamw(
    schedule: optax.Schedule,
    *,
    adam_beta1: float,
    adam_beta2: float,
    adam_epsilon: float,
    weight_decay: float,
    weight_decay_on: str = "all",
    max_grad_norm: float | None = None,
) -> optax.GradientTransformation:
    """AdamW in torch's form (ε is added after the bias correction), optionally after clipping the global gradient norm.

    The decay is of "all" parameters, or of "matrices" (and embeddings), without norms and biases.
    """
    decayed = None if weight_decay_on == "all" else lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    def at_rate(learning_rate: Array) -> optax.GradientTransformation:
        return optax.adamw(learning_rate, b1=adam_beta1, b2=adam_beta2, eps=adam_epsilon, weight_decay=weight_decay, mask=decayed)

    adam = optax.inject_hyperparams(at_rate, hyperparam_dtype=jnp.float32)(schedule)  # keeps the rate in its state, to be logged
    return adam if max_grad_norm is None else optax.chain(optax.clip_by_global_norm(max_grad_norm), adam)


def actor_critic(
    policy: optax.GradientTransformation,
    critic: optax.GradientTransformation,
    *,
    critic_warmup: int = 0,
) -> optax.GradientTransformation:
    """One optimizer over {"policy", "critic"}; for the first `critic_warmup` steps only the critic learns."""
    return optax.partition({"policy": freeze_for(policy, critic_warmup), "critic": critic}, {"policy": "policy", "critic": "critic"})


def apply_gradients(state: TrainState, grads: Params, loss: Array, optimizer: optax.GradientTransformation) -> tuple[TrainState, Metrics]:
    """One optimizer step; `step` is left to the caller, who knows what a step is.

    Where the loss or the norm of the gradient is not finite, parameters and optimizer stay as they were, and `nonfinite` is 1, else 0.
    Further metrics: `learning_rate` and `grad_norm`, the global norm before clipping. A critic beside the policy is clipped on its own and
    has a schedule of its own: then they are the policy's, and the critic's are `critic_learning_rate` and `critic_grad_norm`.
    """

    def move(before: tuple[Params, Any]) -> tuple[Params, Any]:
        params, opt_state = before
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    parts = {"grad_norm": grads["policy"], "critic_grad_norm": grads["critic"]} if "critic" in grads else {"grad_norm": grads}
    metrics: Metrics = {name: optax.tree.norm(part) for name, part in parts.items()}
    finite = jnp.isfinite(jnp.stack([loss, *metrics.values()])).all()
    before = (state.params, state.opt_state)
    moved = move(before)
    # A GPU copies a conditional's predicate to the host and waits; a CPU does not, and would hold both states for `where`.
    params, opt_state = jax.lax.platform_dependent(
        before,
        moved,
        cpu=lambda before, _: jax.lax.cond(finite, move, lambda before: before, before),
        default=lambda before, moved: jax.tree.map(lambda old, new: jnp.where(finite, new, old), before, moved),
    )
    for path, rates in optax.tree.get_all_with_path(moved[1], "hyperparams"):  # none of an optimizer that `adamw` did not make
        metrics["critic_learning_rate" if jax.tree_util.DictKey("critic") in path else "learning_rate"] = rates["learning_rate"]
    new = TrainState(step=state.step, params=params, opt_state=opt_state, controller=state.controller)
    return new, metrics | {"nonfinite": 1 - finite.astype(jnp.int32)}


def restarted_schedules(opt_state):
    """The optimizer state with its moments kept, every learning-rate schedule at its beginning and the critic's warm-up ahead.

    The two belong together: the policy's schedule is as long as what the warm-up leaves of a round.
    """
    counted = (optax.InjectStatefulHyperparamsState, Frozen)

    def restart(node):
        if not isinstance(node, counted):
            return node
        kept = {"inner": restarted_schedules(node.inner)} if isinstance(node, Frozen) else {"inner_state": node.inner_state}
        return jax.tree.map(jnp.zeros_like, node._replace(**dict.fromkeys(kept)))._replace(**kept)

    return jax.tree.map(restart, opt_state, is_leaf=lambda node: isinstance(node, counted))


def named(prefix: str, metrics: Metrics) -> Metrics:
    """The bare metric names of a loss under the prefix of whoever logs them."""
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
