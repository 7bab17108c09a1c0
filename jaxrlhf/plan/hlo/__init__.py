"""What a compiled program does, read from its text: what the devices send each other, and the products of matrices.

    text = step.lower(state, batch).compile().as_text()
    for sent in collectives(text): print(sent.kind, sent.bytes, sent.times)
    matmul_flops(text)

`compiled.cost_analysis()` counts the body of a loop once; here everything is multiplied by how often it runs. The text is optimised HLO
as CPU, GPU and TPU print it (https://openxla.org/xla/operation_semantics), of one device's program: shapes are what one device holds.
Of a loop whose number of rounds cannot be read, what it runs has `times` None, unless the caller says how often
(`unknown_trips`). Of a conditional only the branch with the most to count is counted, and what is found there has `branch` True.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from jaxrlhf.plan.hlo.costs import FREE, bytes_moved, flops_of
from jaxrlhf.plan.hlo.text import Computation, Instruction, Program, Shape
from jaxrlhf.plan.hlo.walk import program_of, source_of_line, walk

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast", "ragged-all-to-all")


@dataclass(frozen=True)
class Collective:
    """One exchange between devices; an asynchronous pair is one."""

    kind: str  # one of KINDS
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    group_size: int | None  # devices that take part together; for a permutation the pairs (sender, receiver)
    times: int | None
    branch: bool
    name: str
    source: str  # the operation in the Python program, where the text says it

    @property
    def bytes(self) -> int:
        """Size of what is exchanged, once: the whole array that a device brings or ends with, whichever is larger.

        all-reduce: the operand (= the result). reduce-scatter, all-to-all: the operand. all-gather: the result. A permutation or a
        broadcast: the operand.
        """
        return max(sum(shape.bytes for shape in shapes) for shapes in (self.operands, self.results))

    @property
    def sent(self) -> float:
        """Bytes that a device sends for it in a ring of n: 2(n − 1)/n · bytes for an all-reduce, all of a permutation or a broadcast,
        (n − 1)/n · bytes for the others. A group of unknown size counts as an endless one."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes) if self.group_size != 0 else 0.0
        share = 1.0 if self.group_size is None else (self.group_size - 1) / max(self.group_size, 1)
        return (2 if self.kind == "all-reduce" else 1) * max(share, 0.0) * self.bytes

    @property
    def total(self) -> int | None:
        """`bytes` of all its executions."""
        return None if self.times is None else self.bytes * self.times


class Matmul(NamedTuple):
    """A product of matrices (or a convolution): FLOPs of one execution, a multiplication and an addition counted as two."""

    flops: int
    times: int | None
    branch: bool


def collectives(text: str | Program, *, unknown_trips: int | None = None) -> list[Collective]:
    """Every exchange of the program in the order of its text, with how often it runs."""
    program = program_of(text)

    def weight(where: Computation, line: Instruction) -> float:
        return _collective(program, where, line).bytes if line.base in KINDS else 0

    found = [place for place in walk(program, weight, unknown_trips) if place.line.base in KINDS]
    return [_collective(program, place.computation, place.line, place.times, place.branch) for place in found]


def matmuls(text: str | Program, *, unknown_trips: int | None = None) -> list[Matmul]:
    """Every product of matrices and convolution: `dot`, `convolution`, and calls of a library where their shapes tell the product."""
    places = walk(program_of(text), lambda where, line: flops_of(where, line) or 0, unknown_trips)
    counted = ((flops_of(place.computation, place.line), place) for place in places)
    return [Matmul(flops, place.times, place.branch) for flops, place in counted if flops is not None]


def matmul_flops(text: str | Program, *, unknown_trips: int = 1) -> int:
    """FLOPs of all products of matrices on one device; a loop of unknown length counts as `unknown_trips` rounds."""
    return sum(one.flops * (one.times or 0) for one in matmuls(text, unknown_trips=unknown_trips))


def bytes_accessed(text: str | Program, *, unknown_trips: int = 1) -> int:
    """Bytes that the operations of one device read and write in memory, loops multiplied in: an estimate for prediction.

    Every operation outside a fusion, and every fusion as a whole, reads its operands and writes its result once. What is read through a
    slice or gather counts as the slice; an update in place counts as what is written. Caches are not modelled.
    """
    program = program_of(text)

    def moved(where: Computation, line: Instruction) -> int:
        return 0 if line.opcode in FREE or line.opcode.endswith(("-done", "-update")) else bytes_moved(program, where, line)

    places = walk(program, moved, unknown_trips)
    return sum(moved(place.computation, place.line) * (place.times or 0) for place in places if not place.fused)


def _collective(program: Program, where: Computation, line: Instruction, times: int | None = 1, branch: bool = False) -> Collective:
    results = line.shapes
    if line.opcode != line.base:
        # The start's own result also holds operands and counters; what is there when it is done is the result.
        done = (i for i in where.instructions.values() if i.opcode == f"{line.base}-done" and i.operands == (line.name,))
        results = next((i.shapes for i in done), where.operand_shapes(line) if line.base == "all-reduce" else results)
    size = _group_size(line, program.devices)
    return Collective(line.base, where.operand_shapes(line), results, size, times, branch, line.name, source_of_line(line))


def _group_size(line: Instruction, devices: int) -> int | None:
    """Devices of one group; pairs of a permutation; None for a form not known.

    Groups are {{0,1},{2,3}}, or [groups,size]<=[…], or {} for all, or axes mesh['a'=2,'b'=4], device_ids=(…) {'b'}, of which a part is
    'b':(before)size.
    """
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line.attributes)
    if pairs:
        return pairs[1].count("{")
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", line.attributes)
    if axes:
        sizes = dict(re.findall(r"('[^']*')=(\d+)", axes[1]))
        return math.prod(int(part or sizes[name]) for name, part in re.findall(r"('[^']*')(?::\(\d+\)(\d+))?", axes[2]))
    listed = re.search(r"replica_groups=(?:\{(\{[\d,]*\})?|\[\d+,(\d+)\]<=)", line.attributes)
    if listed is None:
        return None
    if listed[2]:
        return int(listed[2])
    return len(re.findall(r"\d+", listed[1])) if listed[1] else devices
