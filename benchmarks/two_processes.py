"""Two processes of four simulated devices against one of eight, and with one of them killed in the middle of PPO.

    python benchmarks/two_processes.py FOLDER

Small models, the built-in task. Prints how far metrics and parameters of two processes are from those of one; how long after a real
SIGKILL of process 1, and of process 0, the other one ended by itself (the launcher's grace is longer than jax's heartbeat); and whether
the same command then ends with the same bits as a run that nobody touched.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

RECIPE: dict[str, Any] = {
    "name": "two",
    "rounds": 2,
    "method": "ocrm",
    "data": {"num_demonstrations": 96, "num_prompts": 48, "limits": {"max_prompt_length": 17, "max_response_length": 8}},
    "model": {"shape": {"family": "llama", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}},
    "pairs": {"source": "sample", "num_pairs": 40, "num_valid": 20, "batch_size": 32},
    "gold": {"kind": "toy"},
    "sft": {"batch_size": 32, "learning_rate": 1e-2, "lr_scheduler_type": "constant"},
    "reward": {"batch_size": 32, "learning_rate": 1e-3, "num_reference_rows": 32, "eval_batch_size": 32},
    "ppo": {"total_episodes": 160, "batch_size": 16, "num_ppo_epochs": 1, "response_length": 8, "learning_rate": 3e-3},
    "weights": {"alpha": 0.0, "eta": "ess", "ess_target": 0.5, "batch_size": 32},
    "evaluation": {"num_prompts": 20, "batch_size": 32},
    "checkpoint": {"every": 1},
    "log": {"tensorboard": False},
}
CLI = [sys.executable, "-m", "jaxrlhf.cli"]
EIGHT = "import sys, jax; jax.config.update('jax_num_cpu_devices', 8); from jaxrlhf.cli import main; sys.exit(main())"
ALONE = [sys.executable, "-c", EIGHT]
GROUP = [*CLI, "launch", "--processes", "2", "--devices_per_process", "4", "--grace", "90"]


def recipe_in(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"output": str(folder)}))
    return str(path)


def finished(words: list[str], folder: Path) -> Path:
    done = subprocess.run([*words, "run", recipe_in(folder)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{folder}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    return folder / "two"


def killed(folder: Path, number: int) -> None:
    """Process `number` dies as its policy's fourth step is logged; what follows is printed."""
    with open(folder.with_suffix(".log"), "w+") as log:
        launcher = subprocess.Popen([*GROUP, "run", recipe_in(folder)], stdout=log, stderr=log)
        metrics, mark = folder / "two" / "metrics.jsonl", '"policy", "round": 1, "step": 4'
        while not metrics.exists() or mark not in metrics.read_text():
            if launcher.poll() is not None:
                sys.exit(f"the run ended before it could be killed; see {log.name}")
            time.sleep(0.05)
        os.kill(children_of(launcher.pid)[number], 9)
        started = time.monotonic()
        status = launcher.wait()
        log.seek(0)
        said = [line for line in log.read().splitlines() if line.startswith("jaxrlhf: process")]
    print(f"process {number} killed: all ended {time.monotonic() - started:.1f} s later, exit status {status}")
    print("".join(f"    {line}\n" for line in said), end="")


def children_of(pid: int) -> list[int]:
    """The processes that `pid` has started, in order."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def figures(folder: Path) -> dict[tuple[Any, ...], float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {
        (line["stage"], line["round"], line["step"], name): value
        for line in lines
        for name, value in line.items()
        if "/" in name and not name.startswith("time/")
    }


def compared(what: str, first: Path, second: Path) -> None:
    a, b = figures(first), figures(second)
    assert a.keys() == b.keys(), f"{what}: the runs logged different steps"
    off = max((abs(a[place] - b[place]) / max(1.0, abs(a[place])), place) for place in a)
    equal, most = True, 0.0
    for path in sorted(first.glob("stages/*/model.safetensors")):
        x, y = load_file(path), load_file(second / path.relative_to(first))
        equal &= all((x[name] == y[name]).all() for name in x)
        most = max(most, *(float(np.abs(x[name] - y[name]).max()) for name in x))
    print(f"{what}: {len(a)} metrics, furthest {off[0]:.1e} at {re.sub(r'[()]', '', str(off[1]))}")
    print(f"    parameters of all stages: {'the same bits' if equal else f'furthest {most:.1e}'}")


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    started = time.monotonic()
    alone, whole = finished(ALONE, folder / "alone"), finished(GROUP, folder / "whole")
    compared("two processes of four devices against one of eight", alone, whole)
    for number in (1, 0):
        part = folder / f"killed-{number}"
        killed(part, number)
        compared(f"process {number} killed and resumed, against untouched", whole, finished(GROUP, part))
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
