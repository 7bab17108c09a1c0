"""How fast is the sampler? Tokens a second, compile time, and what share of the machine's matmul and memory speed that is.

    python benchmarks/generate.py                   # the shape of the peer comparison
    python benchmarks/generate.py --batch 256 --response 256 --dtype bfloat16 --repeats 10

Random GPT-NeoX weights, no EOS, so that every row makes every token. The two speeds that bound it are measured on the spot:
a square float32 or bfloat16 matmul, and a pass over an array too big for any cache. The bounds count what must happen and
no more: matmul FLOPs of prefill and decode; parameters read once a decode step and the live part of the KV cache. A small
model stays in the CPU's cache and can beat the memory bound. On a machine that does other work only ratios mean anything.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models import build_model, config_from_shape
from jaxrlhf.rollouts.generate import generate


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Wall-clock of every repeat, after one of each that does not count; taken in turn, so that a slow minute hits all alike."""
    for run in runs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return times


def work(args: argparse.Namespace, matrices: int, embedding: int) -> tuple[float, float]:
    """(matmul FLOPs, bytes) of one call. `matrices`: parameters in matmuls less the output head; `embedding`: those of the head."""
    B, L, T = args.batch, args.query, args.response
    width = jnp.dtype(args.dtype).itemsize
    tokens = B * (L + T - 1)  # the last token is never fed back
    attended = B * sum(range(1, L + T))  # pairs of query and key, were no row padded
    flops = 2 * matrices * tokens + 2 * embedding * B * T + 4 * args.layers * args.hidden * attended
    cache = sum(2 * args.layers * B * (L + t) * args.hidden * width for t in range(1, T))
    return flops, T * 4 * (matrices + embedding) + cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 256, "layers": 4, "heads": 4, "vocab": 1024, "batch": 32, "query": 64, "response": 48, "repeats": 20}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    args = parser.parse_args()

    shape = {"family": "gpt_neox", "hidden_size": args.hidden, "num_layers": args.layers, "num_heads": args.heads}
    model = build_model(config_from_shape(shape, args.vocab, max_positions=args.query + args.response)[0], dtype=args.dtype)
    params = model.init(jax.random.key(0))
    prompts = np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.query), dtype=np.int32)
    mask = np.ones(prompts.shape, bool)
    key = jax.random.key(1)

    def sampler(temperature: float = 1.0, response: int = args.response) -> object:
        return generate(
            model, params, prompts, mask, key, max_new_tokens=response, eos_ids=(),
            temperature=temperature, top_k=args.top_k, top_p=args.top_p,
        )  # fmt: skip

    start = time.perf_counter()
    jax.block_until_ready(sampler())
    first = time.perf_counter() - start
    side = 2048 if jax.default_backend() == "cpu" else 8192
    square, wide = jnp.ones((side, side), args.dtype), jnp.ones(64 * 2**20, jnp.float32)  # 256 MiB
    matmul, double = jax.jit(jnp.matmul), jax.jit(lambda x: x * 2)
    times = interleaved(
        {
            "sample": sampler,
            "greedy": lambda: sampler(0.0),
            "prefill and one token": lambda: sampler(1.0, 1),
            "matmul": lambda: matmul(square, square),
            "read and write 256 MiB": lambda: double(wide),
        },
        args.repeats,
    )
    matrices = sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1) - 2 * args.vocab * args.hidden
    flops, moved = work(args, matrices, args.vocab * args.hidden)
    flops_bound = flops / (2 * side**3 / min(times["matmul"]))
    memory_bound = moved / (2 * wide.nbytes / min(times["read and write 256 MiB"]))
    tokens = args.batch * args.response
    median, least = statistics.median(times["sample"]), min(times["sample"])
    result = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, **vars(args),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "first_call_s": first, "compile_s": first - median,
        "seconds": {name: {"median": statistics.median(t), "min": min(t)} for name, t in times.items()},
        "tokens_per_s": {"median": tokens / median, "best": tokens / least},
        "bound_s": {"matmul": flops_bound, "memory": memory_bound},
        "share_of_bound": {"matmul": flops_bound / least, "memory": memory_bound / least},
    }  # fmt: skip
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
