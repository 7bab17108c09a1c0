"""Checks of what is trained: every step traced, the gradients of each loss, the user's reward update, memory and time."""

import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf.algorithms.policy_updates import POLICY_UPDATES, loss_parts
from jaxrlhf.algorithms.ppo import policy_loss_of
from jaxrlhf.algorithms.preference import REFERENCE, preference_loss
from jaxrlhf.algorithms.reward import called, reward_loss, with_columns, with_weights
from jaxrlhf.algorithms.reward_update import RoundContext
from jaxrlhf.algorithms.rounds import PREFERENCE, reward_update_named
from jaxrlhf.formatting import format_duration
from jaxrlhf.pipeline.stages.policy import initial_state
from jaxrlhf.plan.compile import program_key
from jaxrlhf.plan.counts import counts_of
from jaxrlhf.plan.devices import device_of_kind
from jaxrlhf.plan.memory import USABLE, gib, room
from jaxrlhf.plan.phases import phases_of
from jaxrlhf.plan.plan import planner_of
from jaxrlhf.plugins import plugin
from jaxrlhf.preflight.models import compiled, layout, same, widened
from jaxrlhf.preflight.screen import GREEN, RED, YELLOW, Found
from jaxrlhf.preflight.subject import Subject, local
from jaxrlhf.steps.pair import make_pair_step
from jaxrlhf.steps.ppo import make_ppo_step
from jaxrlhf.steps.state import init_state

# An "optimizer" whose state becomes the gradient, and which moves nothing.
RECORD = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
)


def traced(subject: Subject) -> Found:
    """Every program of the recipe traced with its own shapes, a model of one layer standing for deeper ones."""
    config = local(subject.config)
    planner = planner_of(config, counts_of(config, rows=1000, valid_rows=100), subject.mesh)
    phases = phases_of(replace(planner, subjects=planner.subjects.at_depth(1)))
    for phase in {program_key(phase): phase for phase in phases}.values():
        getattr(phase.function, "trace", phase.function.lower)(*phase.arguments)
    return Found(GREEN, f"{len(phases)} programs: {', '.join(dict.fromkeys(phase.stage for phase in phases))}")


def gradient(make: Any, batch: Any, params: Any, *rest: Any, loss: str, controller: Any = None) -> Found:
    """The step's gradient on a few rows: finite, and the same with more padding and other ids under it, and in microbatches.

    `make(accumulate=…)` gives the step, with an optimizer that records.
    """
    n = len(batch.row_mask_B)
    state = replace(init_state(params, RECORD), controller=controller or {})
    (new, metrics), (other, its) = (
        compiled(make(accumulate=parts), state, rows, *rest)(state, rows, *rest)
        for parts, rows in ((2 - n % 2, batch), (1, widened(batch)))
    )
    value, norm = float(metrics[loss]), float(optax.tree.norm(new.opt_state))
    figure = f"loss {value:.4g}, gradient {norm:.3g} on {n} rows"
    if not np.isfinite([value, norm]).all():
        return Found(RED, figure, "not finite: look at the loss for 0/0, log 0 and NaN under a mask")
    if norm == 0:
        return Found(RED, figure, "nothing would be learned: look at the loss and its masks")
    apart = float(optax.tree.norm(jax.tree.map(jnp.subtract, other.opt_state, new.opt_state))) / norm
    ways = {"padding and microbatches": (np.array([value, 0.0]), np.array([float(its[loss]), apart]))}
    return same(ways, figure, "a loss must use masks and row_mask_B, and divide by total")


def reward(subject: Subject) -> Found | None:
    """The gradient of the recipe's pair loss on a new reward model."""
    if not subject.method.needs_reward:
        return None
    loss = reward_loss(subject.config.reward, plugin)
    table = with_columns(subject.few_pairs.tokens, loss, name=called(subject.config.reward), updated=False)
    return gradient(partial(make_pair_step, subject.reward.model, loss, RECORD), table, subject.reward.params, loss="loss/pair")


def policy(subject: Subject) -> Found | None:
    """The gradient of the recipe's policy update: PPO or RLOO on a sampled rollout, DPO or WPO on pairs."""
    config, method, (trainable, frozen) = subject.config, subject.method, subject.split
    if method.policy_update in PREFERENCE:
        loss, table = preference_loss(config.dpo, method.policy_update, plugin), subject.few_pairs.tokens
        anything = np.linspace(-9, -8, len(table.index_B), dtype=np.float32)  # for log-probs of the reference
        table = replace(table, columns={**table.columns, **dict.fromkeys(REFERENCE, anything)})
        table = with_columns(table, loss, name=f"dpo.loss {config.dpo.loss!r}", updated=False)
        make = partial(make_pair_step, subject.policy.model, loss, RECORD)
        return gradient(make, table, trainable, *(() if frozen is None else (frozen,)), loss="loss/pair")
    assert subject.sampled is not None
    rollout, _, section = subject.sampled
    critic = subject.reward if POLICY_UPDATES[method.policy_update].critic else None
    parts = loss_parts(subject.policy.model, critic and critic.model, section, policy_loss_of(config.ppo, plugin))
    state = initial_state(trainable, critic, RECORD, config.ppo.kl_coef)
    make = partial(make_ppo_step, parts, RECORD, num_ppo_epochs=1, num_mini_batches=1)
    rest = (subject.key, *(() if frozen is None else ({"policy": frozen},)))
    return gradient(make, rollout, state.params, *rest, loss="loss/ppo", controller=state.controller)


def update(subject: Subject) -> Found | None:
    """The user's own reward update on a few pairs, and on the same pairs in another order: what it says of a pair must go with the pair."""
    name = subject.method.reward_update or ""
    if ":" not in name:
        return None
    pairs, loss = subject.few_pairs, reward_loss(subject.config.reward, plugin)
    said: list[dict[str, list[float]]] = []  # pair id → its weight and its columns
    with tempfile.TemporaryDirectory() as scratch:
        for turn in (0, 1):
            context = RoundContext(
                2, subject.policy, subject.policy, subject.reward, subject.key, Path(tempfile.mkdtemp(dir=scratch)), subject.config,
                Path(scratch) / "columns", "preflight", "preflight-sft", subject.mesh, prompts=lambda: subject.prompts[0],
            )  # fmt: skip
            given = pairs.select(np.roll(np.arange(len(pairs.rows)), turn))
            chosen, weights_N = reward_update_named(name, plugin)(context, given)
            table = with_columns(with_weights(chosen.tokens, weights_N), loss, name=called(subject.config.reward), updated=True)
            if fault := layout(table):
                return Found(RED, f"the update gives tokens of which {fault}", "prompts are padded on the left, responses on the right")
            figures = (table.weights_B, *table.columns.values())
            said.append({row.id: [float(np.sum(values[i])) for values in figures] for i, row in enumerate(chosen.rows)})
    first, again = said
    moved = [id for id in first.keys() & again.keys() if not np.allclose(first[id], again[id], rtol=1e-4, atol=1e-4)]
    if moved:
        figure = f"when the pairs change places, {len(moved)} of {len(first)} have other weights or columns"
        return Found(RED, figure, "stale: what is precomputed must be joined by pair id, not by row")
    return Found(GREEN, f"{len(first)} of {len(pairs.rows)} pairs kept, the same in another order")


def cost(subject: Subject) -> Found:
    """The largest phase against a device's memory, counted by formula as `jaxrlhf plan` does, and how long the run computes."""
    found, device = subject.plan, device_of_kind(jax.devices()[0].device_kind)
    largest = max(found.phases, key=lambda one: one.total)
    have = room(device) if device else USABLE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / found.devices
    flops = sum(one.program.flops * (one.phase.calls or 0) for one in found.phases)
    took = f", about {format_duration(found.run_seconds(device)[0])} by {device.name}'s figures" if device else ""
    figure = f"{largest.phase.title} needs {gib(largest.total)} of {gib(have)} GiB, predicted; {flops / 1e12:,.2g} TFLOP in all{took}"
    if largest.total <= have:
        return Found(GREEN, figure)
    return Found(YELLOW if largest.total - largest.parts["activations"] < have else RED, figure, "jaxrlhf plan names settings that help")
