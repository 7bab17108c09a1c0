"""What does it take to load and save a model of a billion parameters over eight devices? Memory, time, and every bit compared.

    python benchmarks/load_big.py --folder /somewhere/with/9GB           # Pythia-1B's shape on (1, 8, 1) fake CPU devices
    python benchmarks/load_big.py --folder … --mesh 1 1 8
    python benchmarks/load_big.py --folder … --mesh 2 4 1 --layers 4     # a smaller one

Writes random float32 weights as safetensors, loads them in a fresh process, saves them again there, and compares the two folders tensor
by tensor. Memory is anonymous memory (RssAnon of /proc/self/status, so Linux only), sampled by a thread every 2 ms: on CPU devices the
parameters themselves are part of it, pages of mapped files are not. `over_start` is what came on top of the process with its libraries
and devices. The files are deleted at the end. Exit status 1 where a tensor differs, or the peak of loading is not below 1.3 × the bytes
that the devices hold (those of the parameters, once for each copy on the data axis).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
from safetensors import safe_open

from jaxrlhf.models import build_model, config_from_hf, load, save
from jaxrlhf.models.hub.safetensors import Tensor, shards_of, tensor_files, write_json, write_shards
from jaxrlhf.models.hub.tensor_names import layout, leaf

LIMIT = 1.3
CONFIG = {
    "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 16,
    "num_attention_heads": 8, "intermediate_size": 8192, "max_position_embeddings": 2048, "hidden_act": "gelu", "rotary_pct": 0.25,
    "rotary_emb_base": 10000, "use_parallel_residual": True, "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


class Memory:
    """Anonymous memory of this process in bytes, and its highest value since `reset`."""

    def __init__(self):
        self.peak, self.file_peak = 0, 0
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> tuple[int, int]:
        """(RssAnon, RssFile)."""
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return int(lines["RssAnon"].split()[0]) * 1024, int(lines["RssFile"].split()[0]) * 1024

    def reset(self) -> int:
        self.peak, self.file_peak = self.now()
        return self.peak

    def _watch(self) -> None:
        while True:
            anon, file = self.now()
            self.peak, self.file_peak = max(self.peak, anon), max(self.file_peak, file)
            time.sleep(0.002)


def write_model(folder: Path, layers: int) -> None:
    """A folder of random weights, made and written one tensor at a time."""
    hf = {**CONFIG, "num_hidden_layers": layers}
    config = config_from_hf(hf)
    shapes = jax.eval_shape(build_model(config).init, jax.random.key(0))
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    write_json(hf, folder / "config.json")
    tensors = []
    for entry in layout(config, "lm"):
        shape = entry.shape([leaf(shapes, path).shape for path in entry.paths])
        tensors.append(Tensor(entry.name, shape, np.dtype(np.float32), lambda shape=shape: random.standard_normal(shape, np.float32)))
    write_shards(shards_of(tensors), folder)


def plain_read(path: Path, *, cold: bool) -> float:
    """Seconds to read a file from end to end into one buffer; `cold`: after asking the system to forget its pages."""
    if cold:
        forget(path)
    buffer = bytearray(2**24)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def forget(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load_and_save(source: Path, copy: Path, data: int, fsdp: int, tensor: int) -> dict:
    """In a fresh process: what loading and saving cost."""
    from jaxrlhf import sharding

    jax.config.update("jax_num_cpu_devices", data * fsdp * tensor)
    mesh = sharding.make_mesh(data, fsdp, tensor)
    jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices()[-1]))
    memory = Memory()
    before = memory.reset()
    start, cpu = time.perf_counter(), time.process_time()
    loaded = load(source, mesh=mesh)
    jax.block_until_ready(loaded.params)
    load_s, load_cpu_s = time.perf_counter() - start, time.process_time() - cpu
    after, load_peak, file_peak = memory.now()[0], memory.peak, memory.file_peak
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(loaded.params) for shard in leaf.addressable_shards)
    memory.reset()
    start, cpu = time.perf_counter(), time.process_time()
    save(loaded, copy)
    save_s, save_cpu_s = time.perf_counter() - start, time.process_time() - cpu
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    return {
        "parameters": size // 4, "bytes": size, "bytes_held_by_devices": held, "largest_leaf_bytes": largest, "start_bytes": before,
        "load": {"seconds": load_s, "cpu_seconds": load_cpu_s, "mb_per_s": size / load_s / 1e6,
                 "peak_bytes": load_peak, "peak_over_held": load_peak / held, "over_start": (load_peak - before) / held,
                 "after_over_held": after / held, "mapped_peak_bytes": file_peak},
        "save": {"seconds": save_s, "cpu_seconds": save_cpu_s, "mb_per_s": size / save_s / 1e6,
                 "peak_over_held": memory.peak / held, "extra_bytes": memory.peak - after, "left_over_bytes": memory.now()[0] - after},
    }  # fmt: skip


def differences(a: Path, b: Path) -> list[str]:
    """Tensors of two folders that differ in name, dtype, shape or bits."""
    left, right = tensor_files(a), tensor_files(b)
    wrong = sorted(left.keys() ^ right.keys())
    for name in left.keys() & right.keys():
        with safe_open(left[name], framework="np") as one, safe_open(right[name], framework="np") as two:
            x, y = one.get_slice(name), two.get_slice(name)
            same = (x.get_dtype(), x.get_shape()) == (y.get_dtype(), y.get_shape())
            count = x.get_shape()[0]
            pieces = [slice(n, min(n + 4096, count)) for n in range(0, count, 4096)]
            if not same or any(x[piece].tobytes() != y[piece].tobytes() for piece in pieces):
                wrong.append(name)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a folder for the files, made and deleted")
    parser.add_argument("--mesh", type=int, nargs=3, default=[1, 8, 1], metavar=("DATA", "FSDP", "TENSOR"))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--cold", action="store_true", help="load with the file out of the page cache")
    parser.add_argument("--phase", choices=["all", "load"], default="all", help=argparse.SUPPRESS)
    args = parser.parse_args()
    source, copy = args.folder / "source", args.folder / "copy"
    if args.phase == "load":
        print(json.dumps(load_and_save(source, copy, *args.mesh)))
        return
    try:
        write_model(source, args.layers)
        file = source / "model.safetensors"
        cold_s, warm_s = plain_read(file, cold=True), plain_read(file, cold=False)
        if args.cold:
            forget(file)
        command = [sys.executable, __file__, "--folder", str(args.folder), "--mesh", *map(str, args.mesh), "--phase", "load"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = {"mesh": args.mesh, "cold": args.cold, "jax": jax.__version__, **json.loads(done.stdout.splitlines()[-1])}
        result["plain_read_mb_per_s"] = {"cold": result["bytes"] / cold_s / 1e6, "warm": result["bytes"] / warm_s / 1e6}
        result["tensors"], result["differ"] = len(tensor_files(source)), differences(source, copy)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    print(json.dumps(result, indent=1))
    if result["differ"] or result["load"]["peak_over_held"] >= LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
