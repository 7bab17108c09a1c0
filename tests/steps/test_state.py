"""Schedules, AdamW, clipping, the critic's warm-up: numbers that a user reads off a config must be what the optimizer does."""

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.algorithms.training import optimizer_of
from jaxrlhf.config.training import OptimizerConfig
from jaxrlhf.steps.state import (
    Frozen,
    actor_critic,
    adamw,
    apply_gradients,
    freeze_for,
    init_state,
    learning_rate_schedule,
    restarted_schedules,
)

LOSS = jnp.float32(1.0)
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-5, "weight_decay": 0.1}


def rates(kind, steps, warmup=0):
    schedule = learning_rate_schedule(kind, 2.0, steps=steps, warmup_steps=warmup)
    return [float(schedule(step)) for step in range(steps + 1)]


def test_schedules_without_warmup():
    assert rates("constant", 4) == [2.0] * 5
    np.testing.assert_allclose(rates("linear", 4), [2.0, 1.5, 1.0, 0.5, 0.0])
    np.testing.assert_allclose(rates("cosine", 4), [1 + np.cos(np.pi * t / 4) for t in range(5)], atol=1e-6)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warmup_rises_to_the_peak_and_loses_no_step(kind):
    got = rates(kind, 10, warmup=4)
    np.testing.assert_allclose(got[:4], [0.5, 1.0, 1.5, 2.0])
    assert got[4] == 2.0
    np.testing.assert_allclose(got[10], 2.0 if kind == "constant" else 0.0, atol=1e-6)
    assert all(later <= earlier for earlier, later in pairwise(got[4:]))


def test_one_step_of_warmup_is_the_peak():
    assert rates("constant", 3, warmup=1) == [2.0] * 4


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"lr_scheduler_type 'cosin' is unknown; use 'constant', 'linear' or 'cosine'"):
        learning_rate_schedule("cosin", 1.0, steps=3)


def test_adamw_is_torchs():
    """Two steps by hand: ε after the bias correction, decay decoupled and scaled by the rate."""
    optimizer = adamw(optax.constant_schedule(0.01), **ADAM)
    params, grads = {"w": jnp.array([1.0, -2.0])}, [jnp.array([0.5, -1e-5]), jnp.array([-0.2, 2e-5])]
    state = init_state(params, optimizer)
    for grad in grads:
        state, _ = apply_gradients(state, {"w": grad}, LOSS, optimizer)
    w, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for t, grad in enumerate(np.asarray(grads, np.float64), start=1):
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        w = w - 0.01 * ((m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-5) + 0.1 * w)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-6)


def test_clipping_scales_the_global_norm_and_the_metric_shows_it_before():
    sgd = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    state = init_state({"a": jnp.zeros(1), "b": jnp.zeros(1)}, sgd)
    state, metrics = apply_gradients(state, {"a": jnp.array([3.0]), "b": jnp.array([4.0])}, LOSS, sgd)
    np.testing.assert_allclose([state.params["a"][0], state.params["b"][0]], [-0.6, -0.8], rtol=1e-6)
    assert float(metrics["grad_norm"]) == 5.0
    # adamw clips first: a gradient ten times as long moves nothing further once both are above the norm.
    ends = []
    for scale in (1.0, 10.0):
        clipped = adamw(optax.constant_schedule(0.1), **ADAM, max_grad_norm=1.0)
        state = init_state({"w": jnp.zeros(2)}, clipped)
        for grad in ([3.0, 4.0], [1.0, -7.0]):
            state, _ = apply_gradients(state, {"w": scale * jnp.array(grad)}, LOSS, clipped)
        ends.append(state.params["w"])
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-6)


@pytest.mark.parametrize("bad", ["loss", "norm", "critic"])
def test_what_is_not_finite_moves_nothing(bad):
    """A loss without a gradient, a norm beyond float32, a critic alone: parameters, moments and schedules are those of before."""
    optimizer = warm_optimizer(0)
    good = {"policy": {"w": jnp.array([3.0, 4.0])}, "critic": {"w": jnp.array([6.0, 8.0])}}
    worse = {"norm": {"policy": {"w": jnp.array([1e30, 0.0])}}, "critic": {"critic": {"w": jnp.array([jnp.nan, 1.0])}}}
    grads = {"loss": good} | {name: good | part for name, part in worse.items()}
    state, metrics = apply_gradients(init_state(jax.tree.map(jnp.ones_like, good), optimizer), good, LOSS, optimizer)
    assert int(metrics["nonfinite"]) == 0 and float(state.params["policy"]["w"][0]) < 1
    kept, metrics = apply_gradients(state, grads[bad], jnp.float32(jnp.inf) if bad == "loss" else LOSS, optimizer)
    assert int(metrics["nonfinite"]) == 1 and float(metrics["learning_rate"]) == pytest.approx(0.1 * 5 / 6)  # of this step
    jax.tree.map(np.testing.assert_array_equal, (kept.params, kept.opt_state), (state.params, state.opt_state))
    on, metrics = apply_gradients(kept, good, LOSS, optimizer)
    assert int(metrics["nonfinite"]) == 0
    jax.tree.map(np.testing.assert_array_equal, on.params, apply_gradients(state, good, LOSS, optimizer)[0].params)


def test_metrics_tell_the_learning_rate_of_the_step_and_each_clipped_norm_by_name():
    """Of an actor and a critic both: each has a schedule and a clipping of its own, and a norm over the two would meet neither."""
    schedule = learning_rate_schedule("linear", 0.1, steps=4)
    alone = adamw(schedule, **ADAM, max_grad_norm=1.0)
    state, seen = init_state({"w": jnp.zeros(2)}, alone), []
    for _ in range(4):
        state, metrics = apply_gradients(state, {"w": jnp.array([3.0, 4.0])}, LOSS, alone)
        seen.append(metrics)
    assert [float(m.get("learning_rate", -1)) for m in seen] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert [float(m["grad_norm"]) for m in seen] == [5.0] * 4
    both = warm_optimizer(2)
    state, seen = init_state({"policy": {"w": jnp.zeros(2)}, "critic": {"w": jnp.zeros(2)}}, both), []
    for _ in range(6):
        grads = {"policy": {"w": jnp.array([3.0, 4.0])}, "critic": {"w": jnp.array([6.0, 8.0])}}
        state, metrics = apply_gradients(state, grads, LOSS, both)
        seen.append({name: float(value) for name, value in metrics.items()})
    assert [m["learning_rate"] for m in seen] == pytest.approx([0, 0, 0.1, 0.075, 0.05, 0.025])  # frozen is a rate of 0
    assert [m["critic_learning_rate"] for m in seen] == pytest.approx([0.1 * (6 - n) / 6 for n in range(6)])
    assert {(m["grad_norm"], m["critic_grad_norm"]) for m in seen} == {(5.0, 10.0)}
    # A round that carries its moments begins with the rates of a first one.
    carried = replace(state, opt_state=restarted_schedules(state.opt_state))
    _, metrics = apply_gradients(carried, {"policy": {"w": jnp.ones(2)}, "critic": {"w": jnp.ones(2)}}, LOSS, both)
    assert (float(metrics["learning_rate"]), float(metrics["critic_learning_rate"])) == (0, pytest.approx(0.1))


def warm_optimizer(warmup, steps=6):
    part = adamw(learning_rate_schedule("linear", 0.1, steps=steps - warmup), **ADAM)
    return actor_critic(part, adamw(learning_rate_schedule("linear", 0.1, steps=steps), **ADAM), critic_warmup=warmup)


def trajectory(optimizer, steps=6):
    params = {"policy": {"w": jnp.array([1.0, -1.0])}, "critic": {"w": jnp.array([0.5, 2.0])}}
    state = init_state(params, optimizer)
    states = [state]
    update = jax.jit(lambda state, grads: apply_gradients(state, grads, LOSS, optimizer)[0])
    for step in range(steps):
        grad = jnp.array([0.3, -0.1]) * (step + 1)
        state = update(state, {"policy": {"w": grad}, "critic": {"w": grad}})
        states.append(state)
    return states


def test_critic_warmup_leaves_the_policy_alone_to_the_bit():
    """Two of six steps: parameters, moments and decay of the policy stand still; then its schedule begins."""
    states = trajectory(warm_optimizer(2))
    for state in states[1:3]:
        np.testing.assert_array_equal(state.params["policy"]["w"], states[0].params["policy"]["w"])
        jax.tree.map(
            np.testing.assert_array_equal,
            state.opt_state.inner_states["policy"].inner_state.inner,
            states[0].opt_state.inner_states["policy"].inner_state.inner,
        )
    assert all((b.params["critic"]["w"] != a.params["critic"]["w"]).all() for a, b in pairwise(states))
    # Afterwards the policy moves as one that was never frozen does on the same gradients, from its schedule's first rate to its last.
    alone = adamw(learning_rate_schedule("linear", 0.1, steps=4), **ADAM)
    state = init_state({"w": jnp.array([1.0, -1.0])}, alone)
    for step in range(2, 6):
        state, _ = apply_gradients(state, {"w": jnp.array([0.3, -0.1]) * (step + 1)}, LOSS, alone)
        np.testing.assert_allclose(states[step + 1].params["policy"]["w"], state.params["w"], rtol=1e-6)


def test_no_warmup_is_the_plain_optimizer():
    plain = optax.sgd(1.0)
    assert freeze_for(plain, 0) is plain


def test_restarted_schedules_keep_moments_and_begin_the_round_again():
    """Learning rate and warm-up go back to the beginning together; Adam's moments and its own count do not."""
    end = trajectory(warm_optimizer(2))[-1]
    fresh = restarted_schedules(end.opt_state)
    policy, old = (s.inner_states["policy"].inner_state for s in (fresh, end.opt_state))
    assert isinstance(policy, Frozen) and int(policy.count) == 0 and int(old.count) == 6

    def found(tree, kind):
        return [n for n in jax.tree.leaves(tree, is_leaf=lambda n: isinstance(n, kind)) if isinstance(n, kind)]

    for tree, counts in ((end.opt_state, [6, 4]), (fresh, [0, 0])):
        schedules = found(tree, optax.InjectStatefulHyperparamsState)
        assert [(int(s.count), int(s.hyperparams_states["learning_rate"].count)) for s in schedules] == [(n, n) for n in counts]
    before, after = (found(tree, optax.ScaleByAdamState) for tree in (end.opt_state, fresh))
    assert len(before) == 2
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize(("where", "still"), [("all", set()), ("matrices", {"bias", "scale"})])
def test_decay_is_of_all_parameters_or_of_matrices_alone(where, still):
    """Without a gradient nothing but the decay moves a parameter."""
    params = {"kernel": jnp.ones((2, 3)), "embedding": jnp.ones((4, 2)), "bias": jnp.ones(3), "scale": jnp.ones(2)}
    optimizer = optimizer_of(
        OptimizerConfig(learning_rate=0.1, weight_decay=0.1, weight_decay_on=where, lr_scheduler_type="constant"), steps=1
    )
    new, _ = apply_gradients(init_state(params, optimizer), jax.tree.map(jnp.zeros_like, params), LOSS, optimizer)
    assert {name for name, value in new.params.items() if (np.asarray(value) == 1.0).all()} == still
    policy = actor_critic(optimizer, optimizer)  # PPO's two in one, under a mask of its own
    both = {"policy": params, "critic": params}
    new, _ = apply_gradients(init_state(both, policy), jax.tree.map(jnp.zeros_like, both), LOSS, policy)
    assert {name for name, value in new.params["critic"].items() if (np.asarray(value) == 1.0).all()} == still
