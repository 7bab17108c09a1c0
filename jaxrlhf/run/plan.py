"""What a run would need, without running it and without its weights: what `jaxrlhf plan` does."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxrlhf import sharding
from jaxrlhf.algorithms.rounds import SECTIONS_READ
from jaxrlhf.config import Config
from jaxrlhf.recipe import arms, to_yaml
from jaxrlhf.run.devices import Device, device_named, device_of_kind, own_device
from jaxrlhf.run.plan_compile import Program, compile_all
from jaxrlhf.run.plan_counts import Counts, counts_of
from jaxrlhf.run.plan_memory import Planned, planned
from jaxrlhf.run.plan_models import subjects_of
from jaxrlhf.run.plan_phases import Phase, Planner
from jaxrlhf.run.plan_shapes import bytes_on_device
from jaxrlhf.run.run import check_shards


@dataclass(frozen=True)
class Plan:
    """A config's phases with their figures, on one of `devices` equal devices. `compiler`: the platform that programs were compiled for."""

    config: Config
    counts: Counts
    mesh: Any
    devices: int
    compiler: str
    models: dict[str, tuple[int, int]]  # name → (parameters, bytes on one device)
    phases: list[Planned]
    notes: list[str]

    def dtype(self, one: Planned) -> str:
        """Of the phase's computation."""
        return self.config.gold.dtype if one.phase.name == "gold scores" else self.config.model.dtype

    def seconds(self, one: Planned, device: Device) -> float:
        """Predicted seconds of one call."""
        return max(one.seconds(device, self.dtype(one)).values())

    def run_seconds(self, device: Device) -> tuple[float, list[str]]:
        """(seconds of all calls of the run, phases whose number of calls is not known and not in it)."""
        known = [one for one in self.phases if one.phase.calls is not None]
        unknown = [one.phase.title for one in self.phases if one.phase.calls is None]
        return sum(self.seconds(one, device) * (one.phase.calls or 0) for one in known), unknown


def plan(
    config: Config,
    *,
    rows: int | None = None,
    valid_rows: int | None = None,
    exact: bool = False,
    devices: Sequence[Any] | None = None,
    known: dict[Any, Program] | None = None,
    report: Callable[[Phase, Program], Any] = lambda phase, program: None,
) -> Plan:
    """Compile every program of a run for `devices` (default: those of this process) and read what it needs.

    `rows` and `valid_rows` are those of data.train and of what is held out, where the config does not say. Training steps of more than
    8 layers are compiled with 2 and 4 and extrapolated, unless `exact`. `known` keeps programs for other configs on the same devices.
    `report(phase, program)` is called as programs are compiled. Raises ValueError and FileNotFoundError where the config cannot work or a
    model's shape is not known.
    """
    counts = counts_of(config, rows=rows, valid_rows=valid_rows)
    updates = {one.reward_update for one in counts.rounds if one.reward_update is not None}
    uses_encoder = any("encoder" in SECTIONS_READ.get(name, ()) for name in updates)
    subjects = subjects_of(config, uses_encoder=uses_encoder)
    mesh = sharding.mesh_of(config.mesh) if devices is None else sharding.make_mesh(*_axes(config), devices=devices)
    check_batches(config, counts, mesh)
    planner = Planner(config, subjects, counts, mesh)
    phases = planner.phases()

    def shallow(layers: int) -> list[Phase]:
        return dataclasses.replace(planner, subjects=subjects.at_depth(layers)).phases()

    programs = compile_all(phases, shallow, mesh, {} if known is None else known, exact=exact, report=report)
    every = jax.devices() if devices is None else devices
    models = {}
    for one in phases:
        for name, tree in one.held.items():
            if name != "optimizer":
                models.setdefault(name, (sum(leaf.size for leaf in jax.tree.leaves(tree)), bytes_on_device(tree, mesh)))
    return Plan(
        config, counts, mesh, len(every), every[0].platform, models,
        [planned(one, program, mesh) for one, program in zip(phases, programs, strict=True)],
        [*notes_of(config, updates, every[0].platform), *([subjects.encoder_note] if subjects.encoder_note else [])],
    )  # fmt: skip


def _axes(config: Config) -> tuple[int, int, int]:
    return config.mesh.data, config.mesh.fsdp, config.mesh.tensor


def check_batches(config: Config, counts: Counts, mesh: Any) -> None:
    """ValueError where a training batch does not divide over the devices, as the run refuses it."""
    used = {"sft"} | ({"reward"} if any(one.fits_reward for one in counts.rounds) else set())
    used |= {"dpo" if one.policy_update in ("dpo", "wpo") else "ppo" for one in counts.rounds}
    check_shards(config, sorted(used), sharding.data_shards(mesh))


def notes_of(config: Config, updates: set[str], platform: str) -> list[str]:
    """What the figures do not hold."""
    notes = []
    if platform == "cpu" and "bfloat16" in (config.model.dtype, config.gold.dtype):
        notes.append("compiled for CPUs, which compute bfloat16 in float32: activations and GB moved are larger here than elsewhere.")
    if platform == "cpu" and config.model.remat != "none":
        notes.append(f"model.remat {config.model.remat} is planned as accelerators compile it; a run on this CPU saves nothing by it.")
    own = [name for name in updates if ":" in name]
    if own:
        notes.append(f"what the reward update {own[0]} computes is not known and not in the plan.")
    if config.model.offload_frozen:
        notes.append("model.offload_frozen: the temporaries of `score` are those of a program that reads all models at once.")
    if config.refit.when != "round" and updates:
        notes.append(f"refit.when is {config.refit.when!r}: a refit is counted in every round after the first.")
    return notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `jaxrlhf plan`, keys of the config apart."""
    parser.add_argument("--devices", type=int, help="plan for so many devices, made up on this machine's CPU; default: those there are")
    parser.add_argument("--device", help="whose published memory, peak and bandwidth to take: h100, or several, h100,h200,v5p")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of a device of your own, or another amount")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="its peak of dense matrix products in model.dtype")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="its memory's bandwidth")
    parser.add_argument("--rows", type=int, help="rows of data.train, for the number of steps; nothing is read")
    parser.add_argument("--valid_rows", type=int, help="rows held out, for the evaluations")
    parser.add_argument(
        "--exact", action="store_true", help="compile the training steps of deep models whole; default: 2 and 4 layers, extrapolated"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    parser.add_argument("--figure", metavar="FILE", help="draw memory by part, a bar a phase (png, svg, pdf)")


def start_devices(count: int | None) -> None:
    """Make up `count` CPU devices, before anything else touches a device; None: leave things as they are.

    What is compiled here is not run, and the time it takes is part of what is told: it is neither read from a cache nor kept in one.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    if count is None:
        return
    if count < 1:
        raise ValueError(f"--devices {count} must be at least 1.")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def main(options: argparse.Namespace, config: Config) -> int:
    """Plan every arm of the config, print it, and write what was asked for. `start_devices` has been called."""
    from jaxrlhf.run.plan_table import as_json, check_figure, draw, show

    devices = devices_of(options)
    for name in ("rows", "valid_rows"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 1.")
    if options.figure:
        check_figure(options.figure)
    if options.json and not Path(options.json).parent.is_dir():
        raise ValueError(f"--json {options.json}: there is no folder {Path(options.json).parent}; make it first.")
    plans, known = {}, {}
    print(to_yaml(config))
    for name, one in arms(config).items():
        print(f"planning {name}: {len(jax.devices())} × {jax.devices()[0].device_kind}", file=sys.stderr)
        plans[name] = plan(one, rows=options.rows, valid_rows=options.valid_rows, exact=options.exact, known=known, report=progress)
        show(plans[name], name, devices)
    if options.json:
        Path(options.json).write_text(json.dumps({name: as_json(one, devices) for name, one in plans.items()}, indent=1) + "\n")
    if options.figure:
        draw(plans, devices, Path(options.figure))
    return 0


def devices_of(options: argparse.Namespace) -> list[Device]:
    """The devices to judge by: those named, else the one that is here; none where that is a CPU and nothing is stated of it."""
    stated = (options.memory, options.peak, options.bandwidth)
    if options.device:
        return [own_device(*stated, device_named(name.strip())) for name in options.device.split(",")]
    here = device_of_kind(jax.devices()[0].device_kind)
    return [] if here is None and stated == (None, None, None) else [own_device(*stated, here)]


def progress(phase: Phase, program: Program) -> None:
    """Say what was compiled and how long that took."""
    depths = f" at {' and '.join(map(str, program.layers))} layers" if program.layers else ""
    print(f"  compiled {phase.title}{depths}: {program.seconds:.1f} s", file=sys.stderr, flush=True)
