"""What each phase of a plan holds in memory by part, how long it takes on a device, what does not fit and what would help."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from jaxrlhf import sharding
from jaxrlhf.config import Config
from jaxrlhf.plan.devices import Device
from jaxrlhf.plan.formulas import temporaries
from jaxrlhf.plan.planner import Phase, Program
from jaxrlhf.plan.shapes import bytes_of_rows, bytes_on_device

# Assumptions of every prediction, printed with it.
USABLE = 0.92  # share of a device's memory: the rest is the runtime's, and lost between buffers
OF_PEAK = 0.40  # share of the published peak that products of matrices reach
OF_BANDWIDTH = 0.70  # share of the published bandwidths, of memory and between devices
GIB = 2**30


@dataclass(frozen=True)
class Planned:
    """One phase on one device: `parts` are bytes by name, `activations` those of the temporaries that shrink with fewer rows at once.

    `program` is what the formulas say, or a compiler where one was asked; `counted` then what the formulas say.
    """

    phase: Phase
    program: Program
    parts: dict[str, float]
    counted: Program | None = None

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def seconds(self, device: Device, dtype: str) -> dict[str, float]:
        """A call's time if nothing but the products, the memory, or the exchanges took any: the slowest of them is the prediction."""
        link = self.program.sent / (1e9 * device.link * OF_BANDWIDTH) if device.link else 0.0
        return {
            "compute": self.program.flops / (device.peak(dtype) * OF_PEAK),
            "memory": self.program.traffic / (1e9 * device.bandwidth * OF_BANDWIDTH),
            "exchange": link,
        }


def planned(phase: Phase, program: Program, mesh: Any, counted: Program | None = None) -> Planned:
    """The phase's memory by part: trees that are held, rows, results, gradients and other temporaries."""
    parts: dict[str, float] = {name: bytes_on_device(tree, mesh) for name, tree in phase.held.items()}
    gradients = 0.0 if phase.learned is None else min(bytes_on_device(phase.learned, mesh), program.temp)
    parts |= {"batch": bytes_of_rows(phase.rows, mesh) + program.fresh}
    parts |= {"gradients": gradients} if gradients else {}
    return Planned(phase, program, parts | {"activations": program.temp - gradients, "code": program.code}, counted)


def room(device: Device) -> float:
    return USABLE * device.memory * GIB


@dataclass(frozen=True)
class Advice:
    """A setting that makes a phase smaller, and by how many bytes."""

    setting: str
    saves: float
    why: str


def advice(one: Planned, device: Device, config: Config, mesh: Any) -> list[Advice]:
    """What helps a phase that does not fit, the largest saving first. Estimates from formulas and the size of the parts, not compiled."""
    return sorted(_advice(one, room(device), config, mesh), key=lambda a: -a.saves)


def _advice(one: Planned, limit: float, config: Config, mesh: Any) -> Iterator[Advice]:
    for knob in one.phase.knobs:
        if knob.endswith(("gradient_accumulation_steps", "batch_size")):
            yield from _smaller(one, limit, knob, config, mesh)
        elif knob == "model.remat" and config.model.remat == "none":
            again = [replace(read, remat="full") for read in one.phase.reads]
            share = temporaries(one.phase, again, mesh) / temporaries(one.phase, one.phase.reads, mesh)
            if share < 1:
                yield Advice("model.remat full", one.program.temp * (1 - share), "keeps the layers' inputs and one layer")
        elif knob == "mesh.fsdp":
            yield from _cut(one, config, mesh)
        elif knob == "lora.r" and not config.lora.r:
            learning = [one.parts.get(name, 0.0) for name in ("policy", "critic")]  # a critic goes on learning in full
            saved = sum(one.parts.get(name, 0.0) for name in ("optimizer", "gradients")) * learning[0] / sum(learning)
            yield Advice("lora.r 16", saved, "the policy's optimizer and gradients are of the adapters alone")
        elif knob == "model.offload_frozen" and not config.model.offload_frozen:
            frozen = [one.parts.get(name, 0.0) for name in ("reference", "reward", "π_SFT")]
            saved = sum(frozen) - (max(frozen) if one.phase.name.startswith("score") else 0.0)  # which reads them, one after the other
            if saved:
                yield Advice("model.offload_frozen true", saved, "frozen models wait in the host's memory")


def _smaller(one: Planned, limit: float, knob: str, config: Config, mesh: Any) -> Iterator[Advice]:
    """Fewer rows at once. Temporaries are taken to shrink in proportion, which those of a row alone do not quite."""
    section, _, name = knob.partition(".")
    own = getattr(config, section)
    value, batch = getattr(own, name), own.batch_size if hasattr(own, "batch_size") else 0
    shrinks = one.parts["activations"] + (0 if one.phase.learned is not None else one.parts["batch"])
    rest = one.total - shrinks
    wanted = math.inf if rest >= limit else shrinks / (limit - rest)
    factor = 2 ** max(math.ceil(math.log2(wanted)), 1) if math.isfinite(wanted) else None
    if name == "gradient_accumulation_steps":
        most = max(batch // sharding.data_shards(mesh) // value, 1)
        factor = most if factor is None else min(factor, most)
        if factor > 1:
            yield Advice(
                f"{knob} {value * factor}", shrinks * (1 - 1 / factor), f"now {value}: microbatches of fewer rows, the same result"
            )
        return
    if name == "batch_size" and one.phase.learned is not None:
        return  # another batch is another training; accumulation keeps it
    now = value or batch
    most = max(now // sharding.data_shards(mesh), 1)
    factor = most if factor is None else min(factor, most)
    if factor > 1:
        yield Advice(f"{knob} {now // factor}", shrinks * (1 - 1 / factor), f"now {value or f'all {batch}'}: fewer rows at once")


def _cut(one: Planned, config: Config, mesh: Any) -> Iterator[Advice]:
    """Parameters that every device holds whole could be cut over the data axis' devices."""
    copies = sharding.data_shards(mesh) // max(config.mesh.fsdp, 1) if config.mesh.fsdp > 0 else 1
    if copies > 1:
        trees = sum(one.parts[name] for name in one.phase.held) + one.parts.get("gradients", 0.0)
        yield Advice("mesh.data 1, mesh.fsdp -1", trees * (1 - 1 / copies), f"parameters and optimizer are cut over {copies} devices")


def gib(size: float) -> str:
    return f"{size / GIB:.3g}" if size < 0.0995 * GIB else f"{size / GIB:.1f}"
