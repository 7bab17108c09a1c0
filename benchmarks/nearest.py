"""How long does the search for the nearest generations take, against the matrix product that it cannot do without?

    python benchmarks/nearest.py                    # 160,000 responses × 384 dimensions × 2,000 generations, k = 1 and 8
    python benchmarks/nearest.py --responses 20000 --repeats 3
    python benchmarks/nearest.py --profile          # where the time of one block goes

The responses are a memory-mapped file, as the embeddings of a run are. "bare matmul" is the same blocks through one compiled matrix
product whose result is thrown away; the runs are taken in turn, so that a slow minute hits all alike, and ratios are of each round's own
pair. Every search runs once more in a process of its own for its peak memory, in all and less what the process had before.
5,000 × 5,000 are compared with numpy at the end.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.offline import nearest


def unit(rows: int, width: int, seed: int) -> np.ndarray:
    """Random unit vectors around a few hundred centres: a sentence encoder's vectors lie in clusters, not evenly on the sphere."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(300, width)).astype(np.float32)
    x = centres[rng.integers(300, size=rows)] + rng.standard_normal((rows, width), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def write_inputs(folder: Path, args: argparse.Namespace) -> None:
    stored = np.lib.format.open_memmap(folder / "responses.npy", "w+", np.float32, (args.responses, args.width))
    for start in range(0, args.responses, 20_000):
        count = min(20_000, args.responses - start)
        stored[start : start + count] = unit(count, args.width, 100 + start)
    stored.flush()
    np.save(folder / "generations.npy", unit(args.generations, args.width, 1))


def read_inputs(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    return np.load(folder / "responses.npy", mmap_mode="r"), np.load(folder / "generations.npy")


def bare_matmul(responses: np.ndarray, generations: np.ndarray, block: int) -> Callable[[], None]:
    """The product alone, block after block; the result of a block is dropped when the next is there."""
    product = jax.jit(lambda x, g: jnp.matmul(x, g, precision=jax.lax.Precision.HIGHEST))
    transposed = jnp.asarray(np.ascontiguousarray(generations.T))

    def run() -> None:
        last = None
        for start in range(0, len(responses), block):
            now = product(jnp.asarray(responses[start : start + block]), transposed)
            if last is not None:
                last.block_until_ready()
            last = now
        jax.block_until_ready(last)

    return run


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Wall-clock of every repeat, after one of each that does not count."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def peak_mib() -> float:
    """Peak resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says is inherited from the parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def memory_of(folder: Path, k: int, block: int) -> dict[str, float]:
    """Peak MiB of a process that searches once: in all, above what it had before (jax loaded, inputs mapped), and of the inputs."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import nearest; nearest.measure({str(folder)!r}, {k}, {block})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: str, k: int, block: int) -> None:
    responses, generations = read_inputs(Path(folder))
    jax.block_until_ready(jnp.zeros(1))
    before = peak_mib()
    nearest.nearest_similarity(responses, generations, k=k, block=block)
    inputs = (responses.nbytes + generations.nbytes) / 2**20
    print(json.dumps({"peak_mib": peak_mib(), "above_start_mib": peak_mib() - before, "inputs_mib": inputs}))


def against_numpy(rows: int, width: int) -> dict[str, float]:
    """Largest difference from a float64 brute force on rows × rows."""
    x, g = unit(rows, width, 2), unit(rows, width, 3)
    exact = np.sort(x.astype(np.float64) @ g.T.astype(np.float64), axis=1)
    found = {k: nearest.nearest_similarity(x, g, k=k) for k in (1, 8)}
    return {f"k={k}": float(np.abs(found[k] - exact[:, -k:].mean(axis=1)).max()) for k in found}


def profile(responses: np.ndarray, generations: np.ndarray, block: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of the parts of one block."""
    x, g = jnp.asarray(responses[:block]), jnp.asarray(generations)
    matmul = jax.jit(lambda x, g: jnp.matmul(x, g.T, precision=jax.lax.Precision.HIGHEST))
    scores = matmul(x, g)
    parts: dict[str, Callable[[], object]] = {
        "copy of a block from the file": lambda: np.array(responses[:block]),
        "matmul": lambda: matmul(x, g),
    }
    for k in (1, 8):
        chosen, plain = jax.jit(nearest.top_k, static_argnums=1), jax.jit(lambda s, k=k: jax.lax.top_k(s, k)[0])
        parts[f"top_k by groups, k={k}"] = lambda chosen=chosen, k=k: chosen(scores, k)
        parts[f"lax.top_k, k={k}"] = lambda plain=plain: plain(scores)
    waited = {name: lambda run=run: jax.block_until_ready(run()) for name, run in parts.items()}
    return {name: 1e3 * statistics.median(t) for name, t in interleaved(waited, repeats).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"responses": 160_000, "generations": 2_000, "width": 384, "block": nearest.BLOCK, "repeats": 5, "brute": 5_000}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--profile", action="store_true", help="the parts of one block only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, args)
        responses, generations = read_inputs(folder)
        facts = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **vars(args)}
        if args.profile:
            print(json.dumps(facts | {"block_ms": profile(responses, generations, args.block, 4 * args.repeats)}, indent=1))
            return
        runs: dict[str, Callable[[], object]] = {"bare matmul": bare_matmul(responses, generations, args.block)}
        for k in (1, 8):
            runs[f"k={k}"] = lambda k=k: nearest.nearest_similarity(responses, generations, k=k, block=args.block)
        times = interleaved(runs, args.repeats)
        ratios = {n: [t / bare for t, bare in zip(times[n], times["bare matmul"], strict=True)] for n in times if n != "bare matmul"}
        flops = 2 * args.responses * args.generations * args.width
        print(json.dumps(facts | {
            "seconds": {n: {"median": statistics.median(t), "min": min(t)} for n, t in times.items()},
            "ratio_to_bare": {n: {"median": statistics.median(r), "max": max(r)} for n, r in ratios.items()},
            "gflops": {n: flops / min(t) / 1e9 for n, t in times.items()},
            "memory": {f"k={k}": memory_of(folder, k, args.block) for k in (1, 8)},
            "difference_from_numpy": against_numpy(args.brute, args.width),
        }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
