"""The programs of training: SFT, reward models, PPO and RLOO, DPO and WPO."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jaxrlhf.algorithms.policy_updates import POLICY_UPDATES
from jaxrlhf.algorithms.ppo import as_compiled, passes_of
from jaxrlhf.algorithms.preference import REFERENCE, needs_reference, preference_loss
from jaxrlhf.algorithms.reward import pair_trainer, reward_loss
from jaxrlhf.algorithms.rounds import Round
from jaxrlhf.algorithms.training import sft_trainer
from jaxrlhf.pipeline.stages.ensemble import spread_of
from jaxrlhf.plan.models import KEY
from jaxrlhf.plan.passes import logprobs_phase, sample_phase, scoring_phase
from jaxrlhf.plan.planner import Phase, Planner, Read
from jaxrlhf.plan.shapes import BIAS, NUMBER, bools, bytes_on_device, floats, ints, pairs, texts
from jaxrlhf.plugins import plugin
from jaxrlhf.steps.state import joined
from jaxrlhf.types import Completion, PromptBatch, Rollout


def sft_phase(planner: Planner) -> Phase:
    section, (L, T, _) = planner.config.sft, planner.lengths
    steps = planner.counts.sft_steps
    optimizer, step = sft_trainer(planner.models[0], section, max(steps or 1, 1), planner.mesh)
    state = planner.state(planner.policy, optimizer)
    batch = texts(section.batch_size, L, T)
    held = {"policy": state.params, "optimizer": state.opt_state}
    knobs = ("sft.gradient_accumulation_steps", "sft.batch_size", "model.remat", "mesh.fsdp")
    tokens = section.batch_size * (L + T)
    width = L + T - 1  # the last token predicts nothing
    reads = (of_step(planner, section, "lm", section.batch_size, width, width if section.loss_on == "all" else T),)
    arguments = (state, batch)
    return Phase("SFT", "step", step, arguments, held, batch, steps, tokens, planner.layers, knobs, learned=state.params, reads=reads)


def reward_phases(planner: Planner, fits: int) -> Iterator[Phase]:
    """The step, and the pass that scores references and held-out pairs while the training state is still there."""
    section, (L, T, _), steps = planner.config.reward, planner.lengths, planner.counts.reward_steps
    members = section.ensemble_size if planner.counts.rounds[0].ensemble else 1
    loss = reward_loss(section, plugin)
    model, params = planner.models[1], planner.scalar
    optimizer, step = pair_trainer(model, loss, section, max(steps or 1, 1), planner.mesh)
    state = planner.state(params, optimizer)
    held = {"reward": state.params, "optimizer": state.opt_state}
    batch = pairs(section.batch_size, L, planner.pairs_width(), loss.columns)
    calls = None if steps is None else steps * fits * members
    knobs = ("reward.gradient_accumulation_steps", "reward.batch_size", "model.remat", "mesh.fsdp")
    tokens = 2 * section.batch_size * (L + planner.pairs_width())
    width = planner.pairs_width()
    reads = (of_step(planner, section, "scalar", 2 * section.batch_size, L + width, width),)
    arguments = (state, batch)
    yield Phase("reward", "step", step, arguments, held, batch, calls, tokens, planner.layers, knobs, learned=state.params, reads=reads)
    calls = planner.counts.passes(planner.counts.reference_rows, section.eval_batch_size, 1)
    calls = None if calls is None else calls * fits * members
    yield scoring_phase(
        planner, "reward", "scores of references", params, T, section.eval_batch_size, held, calls, "reward.eval_batch_size"
    )


def rollout_phases(planner: Planner, round: Round, moved: bool, times: int, suffix: str) -> Iterator[Phase]:
    """Sample, score and update of PPO or RLOO; state and frozen models are there throughout."""
    config, section, way = planner.config, planner.config.ppo, POLICY_UPDATES[round.policy_update]
    L, _, T = planner.lengths
    B, (policy, scalar) = section.batch_size, planner.models
    spread_coef = spread_of(round.ensemble, config)
    trainer = way.trainer(
        policy, scalar, as_compiled(section), plugin, eos_ids=planner.subjects.eos_ids, pad_id=planner.subjects.pad_id,
        vocab_size=planner.subjects.vocab_size, spread_coef=spread_coef, mesh=planner.mesh,
    )  # fmt: skip
    trainable, rest = planner.split_params
    params, controller = {"policy": trainable}, {"kl_coef": NUMBER}
    if way.critic:
        params, controller = params | {"critic": planner.scalar}, controller | {"value_bias": NUMBER}
    members = 1 if spread_coef is None else config.reward.ensemble_size
    reward, bias = (planner.scalar, BIAS) if spread_coef is None else ((planner.scalar,) * members, (BIAS,) * members)
    frozen = {"reference": planner.policy, "reward": reward} | ({"sft": planner.policy} if moved else {})
    state = planner.state(params, trainer.optimizer, controller)
    base = None if rest is None else {"policy": rest}
    models, shown = joined(state.params, base), {"reference": "reference", "reward": "reward", "sft": "π_SFT"}
    others = {shown[name]: tree for name, tree in frozen.items()}
    if rest is not None and round.reference == round.policy_start:
        del others["reference"]  # the base under the adapters is the reference
    held = {**models, "optimizer": state.opt_state}
    reading = held | others
    if config.model.offload_frozen:  # on the device in their turn: the largest counts
        name = max(others, key=lambda one: bytes_on_device(others[one], planner.mesh))
        reading = held | {f"{name} in its turn": others[name]}
    else:
        held = reading
    calls, tokens, layers = planner.counts.ppo_updates * times, B * T, planner.layers
    knobs = ("ppo.generation_batch_size", "model.offload_frozen", "mesh.fsdp")  # another ppo.batch_size would be another training
    how = {"top_k": section.top_k, "top_p": section.top_p, "passes": passes_of(section)}
    yield replace(sample_phase(planner, "policy", f"sample{suffix}", B, L, T, held, calls, knobs, **how), held=held)
    prompts = PromptBatch(ints(B, L), bools(B, L), bools(B), ints(B))
    batch = (prompts, Completion(ints(B, T), bools(B, T), floats(B, T)))
    knobs = ("ppo.forward_batch_size", "model.offload_frozen", "mesh.fsdp")
    arguments = ({**models, **frozen}, batch, controller, bias)
    score = Phase("policy", f"score{suffix}", trainer.score, arguments, reading, batch, calls, tokens, layers, knobs)
    rollout = Rollout(
        prompts.prompt_BL, prompts.prompt_mask_BL, ints(B, T), bools(B, T), bools(B, T), floats(B, T), floats(B, T), floats(B, T),
        floats(B, T), floats(B, T), floats(B), bools(B),
    )  # fmt: skip
    yield replace(score, results=rollout, reads=tuple(score_reads(planner, way.critic, members, moved)))
    knobs = ("ppo.gradient_accumulation_steps", "model.remat", "lora.r", "model.offload_frozen", "mesh.fsdp")
    arguments = (state, rollout, KEY, *(() if base is None else (base,)))
    update = Phase(
        "policy", f"update{suffix}", trainer.update, arguments, held, rollout, calls, tokens, layers, knobs, learned=state.params
    )
    yield replace(update, reads=tuple(update_reads(planner, way.critic)))


def score_reads(planner: Planner, critic: bool, members: int, moved: bool) -> Iterator[Read]:
    """What `rollouts.score` reads, a few rows at a time: reference, π_SFT, critic, reward; the policy unless the sampler told its own."""
    section, (L, _, T) = planner.config.ppo, planner.lengths
    rows = min(section.forward_batch_size or section.batch_size, section.batch_size)
    times = section.batch_size // rows
    for _ in range((section.old_logp == "score") + 1 + moved):
        yield planner.read("lm", rows, L + T - 1, T, times=times)
    if critic:
        yield planner.read("scalar", rows, L + T, T + 1, times=times)
    for _ in range(members):
        yield planner.read("scalar", rows, L + T, T, times=times)


def update_reads(planner: Planner, critic: bool) -> Iterator[Read]:
    """What an update reads of every minibatch of every epoch."""
    section, (L, _, T) = planner.config.ppo, planner.lengths
    rows, updates = section.batch_size // section.num_mini_batches, section.num_ppo_epochs * section.num_mini_batches
    yield of_step(planner, section, "lm", rows, L + T - 1, T, updates, adapters=planner.config.lora.r)
    if critic:
        yield of_step(planner, section, "scalar", rows, L + T, T + 1, updates)


def of_step(planner: Planner, section: Any, head: str, rows: int, width: int, outputs: int, updates: int = 1, *, adapters: int = 0) -> Read:
    """What optimizer steps on `rows` rows each read of every microbatch."""
    parts = section.gradient_accumulation_steps
    how = {"learns": True, "clips": section.max_grad_norm is not None, "adapters": adapters}
    return planner.read(head, rows // parts, width, outputs, times=updates * parts, updates=updates, **how)


def preference_phases(planner: Planner, round: Round, moved: bool, times: int, suffix: str) -> Iterator[Phase]:
    """Log-probs of the reference, and the steps of DPO or WPO."""
    section, (L, _, _), steps, width = planner.config.dpo, planner.lengths, planner.counts.dpo_steps, planner.pairs_width()
    loss = preference_loss(section, round.policy_update, plugin)
    if needs_reference(loss):
        held = {"policy": planner.policy} | ({"reference": planner.policy} if round.reference != round.policy_start else {})
        calls = planner.counts.passes(planner.counts.pairs, section.eval_batch_size, 2 * times)
        name = f"log-probs of pairs{suffix}"
        yield logprobs_phase(planner, "policy", name, section.eval_batch_size, width, 1.0, held, calls, "dpo.eval_batch_size")
    optimizer, step = pair_trainer(planner.models[0], loss, section, max(steps or 1, 1), planner.mesh)
    trainable, frozen = planner.split_params
    state = planner.state(trainable, optimizer)
    columns = (*loss.columns, *(REFERENCE if needs_reference(loss) else ()))
    batch = pairs(section.batch_size, L, width, tuple(dict.fromkeys(columns)))
    held = {"policy": joined(state.params, frozen), "optimizer": state.opt_state}
    arguments = (state, batch, *(() if frozen is None else (frozen,)))
    knobs = ("dpo.gradient_accumulation_steps", "dpo.batch_size", "model.remat", "lora.r", "mesh.fsdp")
    calls, tokens = None if steps is None else steps * times, 2 * section.batch_size * (L + width)
    reads = (of_step(planner, section, "lm", 2 * section.batch_size, L + width - 1, width, adapters=planner.config.lora.r),)
    step_of = Phase("policy", f"step{suffix}", step, arguments, held, batch, calls, tokens, planner.layers, knobs, learned=state.params)
    yield replace(step_of, reads=reads)
