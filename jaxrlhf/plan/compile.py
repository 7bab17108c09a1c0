"""Compiled programs and what they need, read from the compiler: memory, products of matrices, traffic, exchanges between devices."""

import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import jax

from jaxrlhf import sharding
from jaxrlhf.plan import hlo
from jaxrlhf.plan.hlo.text import read
from jaxrlhf.plan.planner import Phase, Program

DEPTHS = (2, 4)  # layers that are compiled where a deeper model is extrapolated
DEEP = 8  # beyond so many layers
# On CPUs only the plan of buffers is of interest, and that is made before LLVM: its optimisations are left out. The barriers that
# model.remat sets stay, as with the compilers of accelerators: without them a CPU's merges what is computed again with what it repeats.
ON_CPU: dict[str, str | bool | int | float] = {"xla_backend_optimization_level": 0, "xla_disable_hlo_passes": "cse_barrier_expander"}


def compiled(phase: Phase, mesh: Any) -> Program:
    """Compile the phase as it is, for the devices of `mesh`."""
    start = time.perf_counter()
    lowered = phase.function.lower(*on_devices(phase.arguments, mesh))
    program = lowered.compile(compiler_options=ON_CPU if _platform(mesh) == "cpu" else None)
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    text = read(program.as_text())
    exchanged = hlo.collectives(text, unknown_trips=phase.loop)
    return Program(
        arguments=memory.argument_size_in_bytes,
        fresh=max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        temp=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=hlo.matmul_flops(text, unknown_trips=phase.loop),
        traffic=hlo.bytes_accessed(text, unknown_trips=phase.loop),
        sent=sum(one.sent * (one.times or 0) for one in exchanged),
        seconds=seconds,
    )


def on_devices(arguments: tuple[Any, ...], mesh: Any) -> tuple[Any, ...]:
    """Arguments that say where they live, for one device that is not the default one; over several, `lower` places them itself."""
    return sharding.template(arguments, mesh) if len(_devices(mesh)) == 1 else arguments


def _devices(mesh: Any) -> set[Any]:
    return sharding.template(jax.ShapeDtypeStruct((), bool), mesh).sharding.device_set


def _platform(mesh: Any) -> str:
    return next(iter(_devices(mesh))).platform


def extrapolated(layers: int, depths: Sequence[int], programs: Sequence[Program]) -> Program:
    """The program at `layers` from two shallower ones, every figure taken to grow by the same amount a layer."""
    (low, high), (below, above) = depths, programs

    def line(name: str) -> float:
        first, second = getattr(below, name), getattr(above, name)
        return max(second + (second - first) / (high - low) * (layers - high), 0.0)

    values = {one.name: line(one.name) for one in fields(Program) if one.name != "layers"}
    return replace(Program(**values, layers=tuple(depths)), seconds=below.seconds + above.seconds)


def compile_all(
    phases: Sequence[Phase],
    shallow: Callable[[int], Sequence[Phase]],
    mesh: Any,
    known: dict[Any, Program],
    *,
    exact: bool,
    report: Callable[[Phase, Program], Any],
) -> list[Program]:
    """The programs of all phases; equal ones are compiled once, and what is `known` is not compiled again. `shallow(n)` gives the same
    phases with n layers.

    The training steps of a decoder of more than DEEP layers are compiled at DEPTHS and extrapolated, unless `exact`: what they keep for
    the backward pass grows by the layer. Passes keep nothing, and compile faster: they are compiled whole. `report` is called with every
    program that was compiled.
    """
    deep = [one.layers > DEEP and one.learned is not None and not exact for one in phases]
    by_depth = {depth: shallow(depth) for depth in DEPTHS} if any(deep) else {}
    found = []
    for number, phase in enumerate(phases):
        key = program_key(phase)
        if key not in known:
            if deep[number]:
                parts = [compiled(by_depth[depth][number], mesh) for depth in DEPTHS]
                known[key] = extrapolated(phase.layers, DEPTHS, parts)
            else:
                known[key] = compiled(phase, mesh)
            report(phase, known[key])
        found.append(known[key])
    return found


def program_key(phase: Phase) -> Any:
    """Equal for phases that run one compiled program."""
    leaves, tree = jax.tree.flatten(phase.arguments)
    return phase.function, phase.loop, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
