"""What a program needs, counted from shapes: no compiler is asked."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxrlhf import sharding
from jaxrlhf.plan.formulas.activations import forward, sizes, training
from jaxrlhf.plan.formulas.products import products
from jaxrlhf.plan.formulas.traffic import moved, sent
from jaxrlhf.plan.planner import Phase, Program, Read
from jaxrlhf.plan.shapes import bytes_of_rows, bytes_on_device

__all__ = ["counted", "temporaries"]


def counted(phase: Phase, mesh: Any) -> Program:
    """The figures of a phase by formula, on one device of `mesh`. Code is not counted: it is megabytes."""
    axes = sharding.axis_sizes(mesh)
    reads = [(one, sizes(one, axes["tensor"])) for one in phase.reads]
    first, rows, *rest = phase.arguments
    learned = float(bytes_on_device(phase.learned, mesh))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(phase.learned))
    each = max(sum(one.learns for one in phase.reads), 1)
    return Program(
        arguments=bytes_on_device((first, *rest), mesh) + bytes_of_rows(rows, mesh),
        fresh=bytes_of_rows(phase.results, mesh),
        temp=temporaries(phase, phase.reads, mesh),
        code=0.0,
        flops=sum(products(one) for one, _ in reads) / axes["tensor"],
        traffic=sum(moved(one, size, learned / each) for one, size in reads),
        sent=sum(sent(one, size, axes, whole / each) for one, size in reads),
    )


def temporaries(phase: Phase, reads: Sequence[Read], mesh: Any) -> float:
    """Bytes at the peak of the phase, beside arguments and results, if it read `reads`: its own, or with other settings. Passes without
    gradients that do not need each other are taken to run side by side."""
    tensor = sharding.axis_sizes(mesh)["tensor"]
    if phase.learned is None:
        return sum(forward(one, tensor) for one in reads)
    return training(reads, bytes_on_device(phase.learned, mesh), tensor)
