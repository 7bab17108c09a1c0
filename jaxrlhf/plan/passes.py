"""The programs that learn nothing: sampling, scores, log-probs, sentence vectors."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax

from jaxrlhf import sharding
from jaxrlhf.models.encoder import BertConfig, build_bert
from jaxrlhf.models.transformer import DecoderConfig
from jaxrlhf.offline.logprobs import logp_pass
from jaxrlhf.pipeline.inputs import gold_limits
from jaxrlhf.plan.models import KEY, gold_model
from jaxrlhf.plan.planner import Phase, Planner
from jaxrlhf.plan.shapes import NUMBER, bools, floats, ints, texts
from jaxrlhf.rollouts.generate import sampler
from jaxrlhf.scorers.reward_model import score_pass
from jaxrlhf.types import Params


def scoring_phase(
    planner: Planner, stage: str, name: str, params: Params, width: int, batch_size: int, held: dict[str, Any], calls: int | None, knob: str
) -> Phase:
    """The scalar head on (prompt, response of `width`)."""
    L, rows = planner.lengths[0], sharding.rows_at_once(batch_size, batch_size, planner.mesh)
    batch = texts(rows, L, width)
    sides = (batch.prompt_BL, batch.prompt_mask_BL, batch.response_BT, batch.response_mask_BT)
    function, reads = score_pass(planner.models[1], planner.mesh), (planner.read("scalar", rows, L + width, width),)
    return Phase(
        stage, name, function, (params, sides, NUMBER), held, sides, calls, rows * (L + width), planner.layers, (knob, "mesh.fsdp"),
        reads=reads, results=floats(rows),
    )  # fmt: skip


def sampling_phases(
    planner: Planner,
    stage: str,
    batch_size: int,
    held: dict[str, Any],
    prompts: int | None,
    *,
    samples: int = 2,
    new_tokens: int | None = None,
    name: str = "sample",
    **how: Any,
) -> Iterator[Phase]:
    """Responses of the policy to so many prompts; gold is in memory where it will score them."""
    L, rows = planner.lengths[0], sharding.rows_at_once(batch_size if prompts is None else prompts, batch_size, planner.mesh)
    calls = planner.counts.passes(prompts, rows, samples)
    knobs = (f"{how.pop('knob', stage)}.batch_size", "mesh.fsdp")
    yield sample_phase(planner, stage, name, rows, L, new_tokens or planner.lengths[2], held | planner.gold_held, calls, knobs, **how)


def sample_phase(
    planner: Planner,
    stage: str,
    name: str,
    rows: int,
    L: int,
    T: int,
    held: dict[str, Any],
    calls: int | None,
    knobs: tuple[str, ...],
    *,
    greedy: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
    passes: int = 1,
) -> Phase:
    model, subjects = planner.models[0], planner.subjects
    function = sampler(
        model, planner.mesh, max_new_tokens=T, eos_ids=subjects.eos_ids, pad_id=subjects.pad_id, greedy=greedy, top_k=top_k, top_p=top_p,
        vocab_size=subjects.vocab_size, passes=passes,
    )  # fmt: skip
    batch = (ints(rows, L), bools(rows, L), ints(rows))
    arguments = (held["policy"], batch, KEY, NUMBER)
    # The first token comes from the prompt's own pass.
    return Phase(
        stage, name, function, arguments, held, batch, calls, rows * T, planner.layers, knobs, loop=max(T - 1, 1),
        reads=(planner.read("lm", rows // passes, L, 1, times=passes, decoded=T),),
        results=(ints(rows, T), bools(rows, T), floats(rows, T)),
    )  # fmt: skip


def gold_phases(planner: Planner, stage: str, held: dict[str, Any], prompts: int | None, *, samples: int = 2) -> Iterator[Phase]:
    """The gold model on what was sampled, with its own lengths and batches."""
    gold, section = planner.subjects.gold, planner.config.gold
    if gold is None:
        return
    limits, rows = gold_limits(planner.config, gold), sharding.rows_at_once(section.batch_size, section.batch_size, planner.mesh)
    L, T = limits.max_prompt_length, limits.max_response_length
    batch = texts(rows, L, T)
    sides = (batch.prompt_BL, batch.prompt_mask_BL, batch.response_BT, batch.response_mask_BT)
    model = gold_model(planner.config, gold, planner.mesh)
    held = held | planner.gold_held
    read = replace(planner.read("scalar", rows, L + T, T), model=gold, dtype=section.dtype)
    calls = planner.counts.passes(prompts, rows, samples)
    yield Phase(
        stage, "gold scores", score_pass(model, planner.mesh), (held["gold"], sides, NUMBER), held, sides, calls, rows * (L + T),
        gold.num_layers, ("gold.batch_size", "mesh.fsdp"), reads=(read,), results=floats(rows),
    )  # fmt: skip


def logprobs_phase(
    planner: Planner,
    stage: str,
    name: str,
    batch_size: int,
    width: int,
    temperature: float,
    held: dict[str, Any],
    calls: int | None,
    knob: str,
) -> Phase:
    L, rows = planner.lengths[0], sharding.rows_at_once(batch_size, batch_size, planner.mesh)
    batch = texts(rows, L, width)
    function = logp_pass(planner.models[0], temperature, planner.mesh)
    knobs, reads = (knob, "mesh.fsdp"), (planner.read("lm", rows, L + width - 1, width),)
    return Phase(
        stage, name, function, (held["policy"], batch), held, batch, calls, rows * (L + width), planner.layers, knobs,
        reads=reads, results=floats(rows),
    )  # fmt: skip


def encoder_phase(planner: Planner, held: dict[str, Any], updates: int) -> Phase:
    """The Flax encoder on a batch of the longest texts."""
    encoder, rows = planner.subjects.encoder, planner.config.encoder.batch_size
    assert encoder is not None
    rows, width = sharding.rows_at_once(rows, rows, planner.mesh), planner.config.encoder.max_length or encoder.max_length
    bert = build_bert(encoder)
    params, batch = jax.eval_shape(bert.init, KEY), (ints(rows, width), bools(rows, width))
    calls = planner.counts.passes(planner.counts.pairs, rows, 2 + updates)
    held = held | {"encoder": params}
    function = sharding.rows(lambda p, b: bert.encode(p, *b), planner.mesh)
    reads = (replace(planner.read("none", rows, width, width), model=as_decoder(encoder), dtype="float32"),)
    return Phase(
        "update", "sentence vectors", function, (params, batch), held, batch, calls, rows * width, 0, ("encoder.batch_size",),
        reads=reads, results=floats(rows, encoder.hidden_size),
    )  # fmt: skip


def as_decoder(encoder: BertConfig) -> DecoderConfig:
    """A decoder of the same sizes: what its layers compute is what the formulas count."""
    e, head_dim = encoder, encoder.hidden_size // encoder.num_heads
    sizes = (e.vocab_size, e.hidden_size, e.num_layers, e.num_heads, e.num_heads, head_dim, e.intermediate_size, e.max_positions)
    return DecoderConfig("gpt2", *sizes, positions="learned")
