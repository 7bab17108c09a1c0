"""What a run would need, without running it and without its weights: what `jaxrlhf plan` does."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxrlhf import sharding
from jaxrlhf.algorithms.rounds import SECTIONS_READ
from jaxrlhf.config import Config
from jaxrlhf.pipeline.checks import check_shards
from jaxrlhf.plan.compile import compile_all
from jaxrlhf.plan.counts import Counts, counts_of
from jaxrlhf.plan.devices import Device
from jaxrlhf.plan.formulas import counted
from jaxrlhf.plan.memory import Planned, planned
from jaxrlhf.plan.models import planned_models
from jaxrlhf.plan.phases import phases_of
from jaxrlhf.plan.planner import Phase, Planner, Program
from jaxrlhf.plan.shapes import bytes_on_device


@dataclass(frozen=True)
class Plan:
    """A config's phases with their figures, on one of `devices` equal devices. `compiler`: the platform that programs were compiled for;
    None: nothing was compiled, and the figures are the formulas'."""

    config: Config
    counts: Counts
    mesh: Any
    devices: int
    compiler: str | None
    models: dict[str, tuple[int, int]]  # name → (parameters, bytes on one device)
    phases: list[Planned]
    notes: list[str]

    def dtype(self, one: Planned) -> str:
        """Of the phase's products, as `Device.peak` takes it; those of a gold model in float32 are exact."""
        model, gold = self.config.model, one.phase.name == "gold scores"
        dtype = self.config.gold.dtype if gold else model.dtype
        return "exact float32" if dtype == "float32" and (gold or model.matmul_precision == "highest") else dtype

    def seconds(self, one: Planned, device: Device) -> float:
        """Predicted seconds of one call."""
        return max(one.seconds(device, self.dtype(one)).values())

    def run_seconds(self, device: Device) -> tuple[float, list[str]]:
        """(seconds of all calls of the run, phases whose number of calls is not known and not in it)."""
        known = [one for one in self.phases if one.phase.calls is not None]
        unknown = [one.phase.title for one in self.phases if one.phase.calls is None]
        return sum(self.seconds(one, device) * (one.phase.calls or 0) for one in known), unknown


def planner_of(config: Config, counts: Counts, mesh: Any) -> Planner:
    """What the phases of the config are made from, their batches checked."""
    updates = {one.reward_update for one in counts.rounds if one.reward_update is not None}
    uses_encoder = any("encoder" in SECTIONS_READ.get(name, ()) for name in updates)
    subjects = planned_models(config, uses_encoder=uses_encoder)
    check_batches(config, counts, mesh)
    return Planner(config, subjects, counts, mesh)


def plan(
    config: Config,
    *,
    rows: int | None = None,
    valid_rows: int | None = None,
    compiles: bool = False,
    exact: bool = False,
    devices: Sequence[Any] | None = None,
    known: dict[Any, Program] | None = None,
    report: Callable[[Phase, Program], Any] = lambda phase, program: None,
) -> Plan:
    """Count what every program of a run needs on `devices` (default: those of this process), and compile them where `compiles` says so.

    `rows` and `valid_rows` are those of data.train and of what is held out, where the config does not say. Training steps of more than
    8 layers are compiled with 2 and 4 and extrapolated, unless `exact`. `known` keeps programs for other configs on the same devices.
    `report(phase, program)` is called as programs are compiled. Raises ValueError and FileNotFoundError where the config cannot work or a
    model's shape is not known.
    """
    counts = counts_of(config, rows=rows, valid_rows=valid_rows)
    mesh = sharding.mesh_of(config.mesh) if devices is None else sharding.make_mesh(*_axes(config), devices=devices)
    planner = planner_of(config, counts, mesh)
    subjects, phases = planner.subjects, phases_of(planner)

    formulas = [counted(one, mesh) for one in phases]
    programs, beside = formulas, [None] * len(phases)
    if compiles:

        def shallow(layers: int) -> list[Phase]:
            return phases_of(dataclasses.replace(planner, subjects=subjects.at_depth(layers)))

        programs, beside = compile_all(phases, shallow, mesh, {} if known is None else known, exact=exact, report=report), formulas
    found = [planned(one, program, mesh, formula) for one, program, formula in zip(phases, programs, beside, strict=True)]
    every = jax.devices() if devices is None else devices
    models = {}
    for one in phases:
        for name, tree in one.held.items():
            if name != "optimizer" and name not in models:
                models[name] = (sum(leaf.size for leaf in jax.tree.leaves(tree)), bytes_on_device(tree, mesh))
    compiler = every[0].platform if compiles else None
    updates = {one.reward_update for one in counts.rounds if one.reward_update is not None}
    notes = [*notes_of(config, updates, compiler), *([subjects.encoder_note] if subjects.encoder_note else [])]
    return Plan(config, counts, mesh, len(every), compiler, models, found, notes)


def _axes(config: Config) -> tuple[int, int, int]:
    return config.mesh.data, config.mesh.fsdp, config.mesh.tensor


def check_batches(config: Config, counts: Counts, mesh: Any) -> None:
    """ValueError where a training batch does not divide over the devices, as the run refuses it."""
    used = {"sft"} | ({"reward"} if any(one.fits_reward for one in counts.rounds) else set())
    used |= {"dpo" if one.policy_update in ("dpo", "wpo") else "ppo" for one in counts.rounds}
    check_shards(config, sorted(used), sharding.data_shards(mesh))


def notes_of(config: Config, updates: set[str], compiler: str | None) -> list[str]:
    """What the figures do not hold."""
    notes = []
    if compiler is None:
        notes.append(
            "counted by formula, nothing was compiled: activations are those that XLA keeps when it compiles for CPUs, and accelerators "
            "fuse more and keep fewer. --compile adds what a compiler says."
        )
    if compiler == "cpu" and "bfloat16" in (config.model.dtype, config.gold.dtype):
        notes.append("compiled for CPUs, which compute bfloat16 in float32: activations and GB moved are larger here than elsewhere.")
    if compiler == "cpu" and config.model.remat != "none":
        notes.append(f"model.remat {config.model.remat} is planned as accelerators compile it; a run on this CPU saves nothing by it.")
    own = [name for name in updates if ":" in name]
    if own:
        notes.append(f"what the reward update {own[0]} computes is not known and not in the plan.")
    if config.model.offload_frozen:
        notes.append("model.offload_frozen: the temporaries of `score` are those of a program that reads all models at once.")
    if config.refit.when != "round" and updates:
        notes.append(f"refit.when is {config.refit.when!r}: a refit is counted in every round after the first.")
    return notes
