"""What one GPU does with the shapes of our recipes: peaks, PPO update, sampler, scores, reward step, attention, encoder.

    OUT=FOLDER python benchmarks/accelerator.py [--budget 220] [--only update,sampler]     (`accelerator.sh` beside it does all of it)
    SMOKE=1 python benchmarks/accelerator.py --budget 600                                  tiny shapes, on any machine

Every figure is one JSON line of FOLDER/accelerator.jsonl as soon as it is known, so that a run that is cut loses nothing. Stages come in
the order of their worth, each with the seconds that it may take; one begins only where most of them are left. Programs are compiled before
they run: one that the compiler says does not fit is reported and not started. Weights are small numbers from a hash: time
does not depend on them.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf.algorithms.policy_updates import ppo_trainer
from jaxrlhf.config import PPOConfig
from jaxrlhf.losses import PAIR_LOSSES
from jaxrlhf.models.encoder import BertConfig, build_bert
from jaxrlhf.models.families import config_from_hf, config_from_shape
from jaxrlhf.models.hub.published import KNOWN
from jaxrlhf.models.model import build_model
from jaxrlhf.models.transformer import attend, attention_bias
from jaxrlhf.plugins import plugin
from jaxrlhf.rollouts.generate import sampler as compiled_sampler
from jaxrlhf.steps.pair import make_pair_step
from jaxrlhf.steps.state import init_state
from jaxrlhf.types import Completion, PairBatch, PromptBatch, Rollout

SMOKE = bool(os.environ.get("SMOKE"))
PYTHIA, QWEN = "EleutherAI/pythia-1b", "Qwen/Qwen2.5-1.5B"
BORN = time.time()
PEAK = {"bf16": math.inf, "copy": math.inf}  # TFLOP/s and GB/s, measured by the first stage


def say(**figure: Any) -> None:
    line = json.dumps({"t": round(time.time() - BORN, 1), **figure})
    with open(Path(os.environ.get("OUT", "accelerator_out")) / "accelerator.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def seconds(call: Callable[..., Any], *args: Any, repeats: int = 5, cap: float = 12.0) -> float:
    """The least of a few runs, until `cap` seconds are over; the first one warms up and does not count."""
    jax.block_until_ready(call(*args))
    taken: list[float] = []
    stop = time.time() + cap
    while len(taken) < repeats and (not taken or time.time() < stop):
        start = time.perf_counter()
        jax.block_until_ready(call(*args))
        taken.append(time.perf_counter() - start)
    return min(taken)


def in_turn(step: Callable[[Any], Any], state: Any, repeats: int = 3) -> list[float]:
    """Seconds of each run of a step that donates its state."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        state = jax.block_until_ready(step(state))
        taken.append(time.perf_counter() - start)
    return taken


def compiled(name: str, program: Any, *args: Any, **info: Any) -> Any | None:
    """The program, or None where the compiler says that it does not fit this device."""
    start = time.time()
    lowered = (program if hasattr(program, "lower") else jax.jit(program)).lower(*args)
    traced = time.time()
    made = lowered.compile()
    m = made.memory_analysis()
    need = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    room = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    gib = {"arguments_gib": m.argument_size_in_bytes, "temporaries_gib": m.temp_size_in_bytes, "needs_gib": need, "of_gib": room}
    compile_s = round(time.time() - traced, 1)
    say(program=name, trace_s=round(traced - start, 1), compile_s=compile_s, **{k: round(v / 2**30, 2) for k, v in gib.items()}, **info)
    return made if not room or need < room else None


@functools.cache
def _filler(shape: tuple[int, ...], dtype: Any) -> Callable[[Any], Any]:
    if not jnp.issubdtype(dtype, jnp.floating):
        return jax.jit(lambda salt: jnp.zeros(shape, dtype))

    def fill(salt):  # a hash of the position: a random key for each of some 600 arrays takes minutes to compile
        x = jax.lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(2654435761) + salt * jnp.uint32(40503)
        x = (x ^ (x >> 15)) * jnp.uint32(2246822519)
        return (((x ^ (x >> 13)).astype(jnp.float32) * 2.0**-32 - 0.5) * 0.07).astype(dtype).reshape(shape)

    return jax.jit(fill)


def filled(shapes: Any, seed: int = 0) -> Any:
    """Arrays on the device with a standard deviation of .02, for a tree of shapes."""
    leaves, kind = jax.tree.flatten(shapes)
    return jax.tree.unflatten(
        kind, [_filler(leaf.shape, jnp.dtype(leaf.dtype))(jnp.uint32(1000 * seed + n)) for n, leaf in enumerate(leaves)]
    )


def tflop(function: Callable[..., Any], *args: Any) -> float:
    """TFLOP of matrix products in the traced program, loops times their length."""

    def inside(value: Any) -> list[Any]:
        found = [getattr(v, "jaxpr", v) for v in (value if isinstance(value, list | tuple) else [value])]
        return [v for v in found if hasattr(v, "eqns")]

    def count(jaxpr: Any) -> int:
        total = 0
        for e in jaxpr.eqns:
            if e.primitive.name == "dot_general":
                (contracted, _), _ = e.params["dimension_numbers"]
                total += 2 * math.prod(e.invars[0].aval.shape[i] for i in contracted) * math.prod(e.outvars[0].aval.shape)
            times = e.params["length"] if e.primitive.name == "scan" else 1
            total += times * sum(count(j) for value in e.params.values() for j in inside(value))
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr) / 1e12


def against_peak(work: float, taken: float) -> dict[str, float]:
    return {"tflop": round(work, 2), "tflop_s": round(work / taken, 1), "of_matmul_peak": round(work / taken / PEAK["bf16"], 3)}


# --- stages


def peaks() -> None:
    device, n = jax.devices()[0], 512 if SMOKE else 8192
    key = jax.random.key(0, impl="threefry2x32")
    square = jax.random.normal(key, (n, n), jnp.bfloat16)

    def rate(precision: Any, dtype: Any) -> float:
        a = square.astype(dtype)
        return 2 * n**3 / seconds(jax.jit(lambda a: jnp.matmul(a, a, precision=precision)), a) / 1e12

    PEAK["bf16"] = rate(None, jnp.bfloat16)
    long = jnp.ones(2 ** (22 if SMOKE else 29), jnp.bfloat16)
    PEAK["copy"] = 2 * long.nbytes / seconds(jax.jit(lambda x: x + 1), long) / 1e9
    host = np.ones(2 ** (20 if SMOKE else 28), np.float32)
    one, add = jnp.ones(()), jax.jit(lambda x: x + 1)
    say(
        device=device.device_kind,
        jax=jax.__version__,
        bf16_tflop_s=round(PEAK["bf16"], 1),
        f32_default_tflop_s=round(rate(None, jnp.float32), 1),
        f32_highest_tflop_s=round(rate(jax.lax.Precision.HIGHEST, jnp.float32), 1),
        copy_gb_s=round(PEAK["copy"], 1),
        host_to_device_gb_s=round(host.nbytes / seconds(lambda: jax.device_put(host)) / 1e9, 1),
        launch_us=round(seconds(add, one, repeats=50) * 1e6, 1),
    )


def attention() -> None:
    """Ours beside what JAX has, forward and with its gradient; a quarter of each row is padding."""
    cases = {
        "pythia-1b 16x564, 8 heads of 256": (16, 564, 8, 8, 256),
        "qwen-1.5b 8x1536, 12/2 heads of 128": (8, 1536, 12, 2, 128),
        "pythia-410m 16x564, 16 heads of 64": (16, 564, 16, 16, 64),
    }
    for case, (B, S, H, K, D) in {"tiny": (2, 64, 4, 2, 16)}.items() if SMOKE else cases.items():
        q, k, v = (filled(jax.ShapeDtypeStruct((B, S, heads, D), jnp.bfloat16), n) for n, heads in enumerate((H, K, K)))
        pad_B = jnp.arange(B, dtype=jnp.int32) * (S // 2) // B
        bias = attention_bias(jnp.arange(S)[None] >= pad_B[:, None], jnp.arange(S))
        turned, lengths, allowed = (lambda x: x.transpose(0, 2, 1, 3)), jnp.int32(S) - pad_B, (bias == 0)[:, None]
        fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        ways = {
            "ours": lambda q, k, v, t=turned, b=bias: t(attend(t(q), t(k), t(v), b)),
            "cudnn, causal and lengths (left-aligned rows)": functools.partial(
                fused, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths
            ),
            "cudnn, boolean mask": functools.partial(fused, mask=allowed),
            "jax.nn, boolean mask": functools.partial(jax.nn.dot_product_attention, mask=allowed, implementation="xla"),
        }
        work = 4 * B * H * S * S * D / 1e12
        for name, way in ways.items():
            try:
                backward = jax.jit(lambda q, k, v, way=way: jax.vjp(way, q, k, v)[1](q))
                there, back = seconds(jax.jit(way), q, k, v), seconds(backward, q, k, v)
            except Exception as error:
                say(attention=case, way=name, failed=repr(error)[:300])
                continue
            speeds = {"forward_tflop_s": round(work / there, 1), "with_gradient_tflop_s": round(3.5 * work / back, 1)}
            say(attention=case, way=name, forward_ms=round(there * 1e3, 3), with_gradient_ms=round(back * 1e3, 3), **speeds)


def models(name: str, remat: str = "none") -> tuple[Any, Any, Any]:
    """(config, policy, scalar model) in bfloat16."""
    if SMOKE:
        shape = {
            "family": "gpt_neox" if "pythia" in name else "qwen2",
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 4,
        }
        config, _ = config_from_shape(shape, 512, max_positions=256)
    else:
        config = config_from_hf(KNOWN[name])
    policy, scalar = (build_model(config, head=head, dtype="bfloat16", remat=remat) for head in ("lm", "scalar"))
    return config, policy, scalar


def shapes_of(model: Any) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0))


def left_padded(B: int, L: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ids and the mask of rows of three quarters of L on average."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.normal(0.75 * L, L * 0.15, B), 8, L).astype(int)
    return draw.integers(2, vocabulary, (B, L), dtype=np.int32), np.arange(L)[None] >= L - lengths[:, None]


def sample(name: str, B: int, L: int, T: int) -> None:
    if SMOKE:
        B, L, T = 4, 32, 8
    config, policy, _ = models(name)
    shapes = shapes_of(policy)
    tokens, mask = left_padded(B, L, config.vocab_size)
    weights = filled(shapes)
    # The cache is an output here, so that it is made.
    prefill = compiled(f"prefill {name}", lambda w, t, m: policy.prefill(w, t, m, length=L + T), weights, tokens, mask)
    if prefill is None:
        return
    first = seconds(prefill, weights, tokens, mask, repeats=3)
    work = tflop(lambda w, t, m: policy.prefill(w, t, m, length=L + T), shapes, tokens, mask)
    say(measure="prefill", model=name, rows=B, seconds=round(first, 4), **against_peak(work, first))
    how = {"max_new_tokens": T, "eos_ids": (), "pad_id": 0, "greedy": False, "top_k": 0, "top_p": 1.0, "vocab_size": None, "passes": 1}
    args = (weights, (tokens, mask, np.arange(B, dtype=np.int32)), jax.random.key(0, impl="threefry2x32"), np.float32(1.0))
    made = compiled(f"sampler {name}", compiled_sampler(policy, None, **how), *args, rows=B)
    if made is None:
        return
    whole = seconds(made, *args, repeats=3)
    token = max(whole - first, 1e-9) / max(T - 1, 1)
    cache = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * B * (L + T)
    least = (cache + 2 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))) / 1e9  # bfloat16 weights and the cache, once
    say(
        measure="sampler",
        model=name,
        rows=B,
        new_tokens=T,
        seconds=round(whole, 4),
        s_per_token=round(token, 5),
        tokens_s=round(B * T / whole),
        least_gb_per_token=round(least, 2),
        of_copy=round(least / token / PEAK["copy"], 3),
    )


def ppo_parts(rows: int, micro: int, remat: str = "none", L: int = 512, T: int = 53) -> tuple[Any, ...]:
    """(trainer, shapes of policy and critic, prompts, responses, sizes) of one optimizer step over `rows` rows, `micro` at a time."""
    if SMOKE:
        L, T, rows, micro = 32, 8, 4, 2
    config, policy, scalar = models(PYTHIA, remat)
    tokens, mask = left_padded(rows, L, config.vocab_size)
    settings = PPOConfig(
        batch_size=rows,
        total_episodes=100 * rows,
        num_ppo_epochs=1,
        response_length=T,
        gradient_accumulation_steps=rows // micro,
        forward_batch_size=micro,
        old_logp="sampler",
    )
    trainer = ppo_trainer(policy, scalar, settings, plugin, eos_ids=(0,), pad_id=0, vocab_size=None)
    prompts = PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.ones(rows, bool), jnp.arange(rows, dtype=jnp.int32))
    return trainer, shapes_of(policy), shapes_of(scalar), prompts, (rows, micro, T)


CONTROLLER = {"kl_coef": np.float32(0.05), "value_bias": np.float32(0)}


def score() -> None:
    trainer, policy, scalar, prompts, (rows, micro, T) = ppo_parts(128, 64)
    weights = {"policy": filled(policy), "critic": filled(scalar, 1)}
    weights |= {"reference": weights["policy"], "reward": weights["critic"]}
    done = Completion(jnp.ones((rows, T), jnp.int32), jnp.ones((rows, T), bool), jnp.full((rows, T), -1.0))
    args = (weights, (prompts, done), CONTROLLER, 0.0)
    program = compiled("score", trainer.score, *args, rows=rows, micro=micro)
    if program is not None:
        taken = seconds(program, *args, repeats=3)
        say(
            measure="score (reference, critic, reward)",
            rows=rows,
            seconds=round(taken, 4),
            **against_peak(tflop(trainer.score, *args), taken),
        )


def update(rows: int, micro: int, remat: str = "none") -> None:
    trainer, policy, scalar, prompts, (rows, micro, T) = ppo_parts(rows, micro, remat)
    state = jax.eval_shape(lambda w: init_state(w, trainer.optimizer, CONTROLLER), {"policy": policy, "critic": scalar})
    zero, on, key = jnp.zeros((rows, T)), jnp.ones((rows, T), bool), jax.random.key(0, impl="threefry2x32")
    rollout = Rollout(
        prompt_BL=prompts.prompt_BL,
        prompt_mask_BL=prompts.prompt_mask_BL,
        tokens_BT=jnp.ones((rows, T), jnp.int32),
        mask_BT=on,
        value_mask_BT=on,
        logp_BT=zero - 8,
        reference_logp_BT=zero - 8,
        values_BT=zero,
        advantages_BT=zero + 0.1,
        returns_BT=zero,
        scores_B=jnp.zeros(rows),
        row_mask_B=jnp.ones(rows, bool),
    )
    program = compiled(f"update, remat {remat}", trainer.update, state, rollout, key, rows=rows, micro=micro)
    if program is None:
        return
    held = filled(state)
    held = held.__class__(step=held.step, params=held.params, opt_state=jax.tree.map(jnp.abs, held.opt_state), controller=CONTROLLER)
    taken = min(in_turn(lambda s: program(s, rollout, key)[0], held))
    work = tflop(trainer.update, state, rollout, key)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    size = {"rows": rows, "micro": micro, "remat": remat, "peak_gib": round(peak, 1)}
    say(
        measure="update",
        seconds=round(taken, 4),
        update_of_512_rows_4_epochs_s=round(taken * 2048 / rows, 1),
        **size,
        **against_peak(work, taken),
    )


def reward(L: int = 512, T: int = 53, micro: int = 16, count: int = 2) -> None:
    if SMOKE:
        L, T, micro, count = 32, 8, 4, 2
    config, _, scalar = models(PYTHIA)
    pairs, optimizer = micro * count, optax.adamw(1e-6)
    tokens, mask = left_padded(pairs, L, config.vocab_size)
    answer, on = jnp.ones((pairs, T), jnp.int32), jnp.ones((pairs, T), bool)
    batch = PairBatch(
        prompt_BL=jnp.asarray(tokens),
        prompt_mask_BL=jnp.asarray(mask),
        chosen_BT=answer,
        chosen_mask_BT=on,
        rejected_BT=answer + 1,
        rejected_mask_BT=on,
        weights_B=jnp.ones(pairs),
        row_mask_B=jnp.ones(pairs, bool),
        index_B=jnp.arange(pairs, dtype=jnp.int32),
        columns={},
    )
    state = jax.eval_shape(lambda w: init_state(w, optimizer), shapes_of(scalar))
    step = jax.jit(make_pair_step(scalar, PAIR_LOSSES["bradley_terry"], optimizer, accumulate=count), donate_argnums=(0,))
    program = compiled("reward step", step, state, batch, pairs=pairs)
    if program is None:
        return
    held = filled(state)
    held = held.__class__(step=held.step, params=held.params, opt_state=jax.tree.map(jnp.abs, held.opt_state), controller=held.controller)
    taken = min(in_turn(lambda s: program(s, batch)[0], held))
    say(
        measure="reward step",
        pairs=pairs,
        seconds=round(taken, 4),
        pairs_s=round(pairs / taken, 1),
        **against_peak(tflop(step, state, batch), taken),
    )


def embed() -> None:
    B, T = (4, 16) if SMOKE else (1024, 64)
    ids, on = jnp.ones((B, T), jnp.int32), jnp.ones((B, T), bool)
    for dtype in ("float32", "bfloat16"):
        encoder = build_bert(BertConfig("bert", 30522, 384, 6, 12, 1536, 512, 2), dtype=dtype)
        weights = filled(jax.eval_shape(encoder.init, jax.random.key(0)))
        taken = seconds(jax.jit(encoder.encode), weights, ids, on)
        say(
            measure=f"embed, MiniLM in {dtype}",
            tokens_a_text=T,
            texts_s=round(B / taken),
            **against_peak(tflop(encoder.encode, weights, ids, on), taken),
        )


def stages() -> list[tuple[str, int, Callable[[], None]]]:
    """(name, seconds it may take, call) in the order of their worth."""
    big = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0) > 100 * 2**30  # an H200
    return [
        ("peaks", 15, peaks),
        ("update", 90, lambda: update(64, 16 if big else 8)),
        ("sampler", 45, lambda: sample(PYTHIA, 512 if big else 256, 512, 53)),
        ("score", 30, score),
        ("reward", 45, reward),
        ("attention", 70, attention),
        ("embed", 20, embed),
        ("sampler of 64", 45, lambda: sample(QWEN, 64, 512, 106)),
        ("update, remat dots", 80, lambda: update(64, 32 if big else 16, "dots")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=220, help="seconds in all")
    parser.add_argument("--only", help="stages, with commas between; peaks always come first")
    options = parser.parse_args()
    Path(os.environ.get("OUT", "accelerator_out")).mkdir(parents=True, exist_ok=True)
    chosen = options.only and {"peaks", *options.only.split(",")}
    if chosen and (unknown := chosen - {name for name, _, _ in stages()}):
        sys.exit(f"--only {', '.join(sorted(unknown))}: not a stage; there are {', '.join(name for name, _, _ in stages())}.")
    for name, cap, call in stages():
        left = options.budget - (time.time() - BORN)
        if chosen and name not in chosen:
            continue
        if left < 0.6 * cap:
            say(skipped=name, left_s=round(left))
            continue
        start = time.time()
        try:
            call()
        except Exception as error:
            say(stage=name, failed=repr(error)[:600], where=traceback.format_exc()[-400:])
        jax.clear_caches()
        say(stage=name, seconds=round(time.time() - start, 1))


if __name__ == "__main__":
    main()
