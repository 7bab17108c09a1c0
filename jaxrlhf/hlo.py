"""What a compiled program does, read from its text: what the devices send each other, and the products of matrices.

    text = text_of(step.lower(state, batch).compile())
    for sent in collectives(text): print(sent.kind, sent.bytes, sent.times)
    matmul_flops(text)

`compiled.cost_analysis()` counts the body of a loop once; here everything is multiplied by how often it runs. The text is optimised HLO
as CPU, GPU and TPU print it (https://openxla.org/xla/operation_semantics), of one device's program: shapes are what one device holds.
A loop whose number of rounds cannot be read has `trips` None; what it runs has `times` None, unless the caller says how often
(`unknown_trips`). Of a conditional only the branch with the most to count is counted, and what is found there has `branch` True.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from jaxrlhf.hlo_text import Computation, Instruction, Program, Shape, read, trips

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast", "ragged-all-to-all")
_DOTS = ("dot", "scaled-dot", "ragged-dot")
_MATMUL_CALL = re.compile(r"gemm|matmul", re.IGNORECASE)
# What moves no data, or whose data is counted in what it calls.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id",
         "replica-id", "opt-barrier")  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where an instruction stands and how often it runs: None inside a loop of unknown length."""

    computation: Computation
    line: Instruction
    times: int | None
    branch: bool  # inside a conditional
    fused: bool  # inside a fusion: its operands and results are in no memory


@dataclass(frozen=True)
class Loop:
    name: str
    trips: int | None
    times: int | None  # how often the loop is entered


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


@dataclass(frozen=True)
class Matmul:
    """A product of matrices (or a convolution): FLOPs of one execution, a multiplication and an addition counted as two."""

    flops: int
    operands: tuple[Shape, ...]
    result: Shape
    times: int | None
    branch: bool
    name: str
    source: str


def text_of(compiled: Any) -> str:
    """The text of what `jax.jit(f).lower(…).compile()` gives. Raises ValueError where the backend has none."""
    text = compiled.as_text()
    if not text:
        raise ValueError("this backend gives no text of its compiled programs; nothing can be counted.")
    return text


def collectives(text: str | Program, *, unknown_trips: int | None = None) -> list[Collective]:
    """Every exchange of the program in the order of its text, with how often it runs."""
    program = _program(text)

    def weight(where: Computation, line: Instruction) -> float:
        return _collective(program, where, line).bytes if line.base in KINDS else 0

    found = [place for place in _walk(program, weight, unknown_trips) if place.line.base in KINDS]
    return [_collective(program, place.computation, place.line, place.times, place.branch) for place in found]


def matmuls(text: str | Program, *, unknown_trips: int | None = None) -> list[Matmul]:
    """Every product of matrices and convolution: `dot`, `convolution`, and calls of a library where their shapes tell the product."""
    program = _program(text)
    found = []
    for place in _walk(program, lambda where, line: _flops(where, line) or 0, unknown_trips):
        flops = _flops(place.computation, place.line)
        if flops is not None:
            operands = place.computation.operand_shapes(place.line)[:2]
            line = place.line
            found.append(Matmul(flops, operands, line.shapes[0], place.times, place.branch, line.name, _source(line)))
    return found


def matmul_flops(text: str | Program, *, unknown_trips: int = 1) -> int:
    """FLOPs of all products of matrices on one device; a loop of unknown length counts as `unknown_trips` rounds."""
    return sum(one.flops * (one.times or 0) for one in matmuls(text, unknown_trips=unknown_trips))


def unread_calls(text: str | Program) -> dict[str, int]:
    """Calls of libraries and hand-written kernels that may hold products of matrices which `matmuls` cannot see: target → places."""
    found: dict[str, int] = {}
    for place in _walk(_program(text), lambda where, line: 1, 1):
        target = _target(place.line)
        if (
            target
            and _flops(place.computation, place.line) is None
            and re.search(r"gemm|matmul|fmha|conv|triton|attention|mosaic|tpu", target)
        ):
            found[target] = found.get(target, 0) + 1
    return found


def loops(text: str | Program, *, unknown_trips: int | None = None) -> list[Loop]:
    """Every while loop that runs, the outer before the inner; `trips` None where the number of rounds cannot be read."""
    program = _program(text)
    places = _walk(program, lambda where, line: 1, unknown_trips)
    return [Loop(p.line.name, trips(program, p.computation, p.line), p.times) for p in places if p.line.opcode == "while"]


def bytes_accessed(text: str | Program, *, unknown_trips: int = 1) -> int:
    """Bytes that the operations of one device read and write in memory, loops multiplied in: an estimate for prediction.

    Every operation outside a fusion, and every fusion as a whole, reads its operands and writes its result once. What is read through a
    slice or gather counts as the slice; an update in place counts as what is written. Caches are not modelled.
    """
    program = _program(text)

    def moved(where: Computation, line: Instruction) -> int:
        return 0 if line.opcode in _FREE or line.opcode.endswith(("-done", "-update")) else _moved(program, where, line)

    places = _walk(program, moved, unknown_trips)
    return sum(moved(place.computation, place.line) * (place.times or 0) for place in places if not place.fused)


def _program(text: str | Program) -> Program:
    return read(text) if isinstance(text, str) else text


def _walk(program: Program, weight: Callable[[Computation, Instruction], float], unknown_trips: int | None) -> Iterator[Place]:
    """Every instruction that runs. Of a conditional the branch with the largest sum of `weight` × times is taken."""

    def visit(where: Computation, times: int | None, branch: bool, fused: bool) -> Iterator[Place]:
        for line in where.instructions.values():
            yield Place(where, line, times, branch, fused)
            for called, rounds in _calls(program, where, line, unknown_trips):
                inner = None if rounds is None or times is None else times * rounds
                yield from visit(called, inner, branch, fused or line.base == "fusion")
            if line.opcode == "conditional":
                branches = [program.computations[name] for name in _branches(line)]
                yield from visit(max(branches, key=total), times, True, fused)

    def total(branch: Computation) -> float:
        return sum(weight(p.computation, p.line) * (1 if p.times is None else p.times) for p in visit(branch, 1, True, False))

    return visit(program.entry, 1, False, False)


def _branches(line: Instruction) -> list[str]:
    return line.called("branch_computations", "true_computation", "false_computation")


def _calls(program: Program, where: Computation, line: Instruction, unknown_trips: int | None) -> list[tuple[Computation, int | None]]:
    """The computations an instruction runs, and how often. What a reduction applies to two numbers is not followed."""
    if line.opcode == "while":
        rounds = trips(program, where, line)
        rounds = unknown_trips if rounds is None else rounds
        names = [(line.called("condition"), None if rounds is None else rounds + 1), (line.called("body"), rounds)]
        return [(program.computations[name], count) for found, count in names for name in found]
    keys = {"fusion": ("calls",), "call": ("to_apply", "calls"), "async": ("calls",), "custom-call": ("called_computations", "calls")}
    return [(program.computations[n], 1) for n in line.called(*keys.get(line.base, ())) if n in program.computations]


def _source(line: Instruction) -> str:
    match = re.search(r'op_name="([^"]*)"', line.attributes)
    return match[1] if match else ""


def _target(line: Instruction) -> str:
    match = re.search(r'custom_call_target="([^"]*)"', line.attributes) if line.base == "custom-call" else None
    return match[1] if match else ""


def _collective(program: Program, where: Computation, line: Instruction, times: int | None = 1, branch: bool = False) -> Collective:
    results = line.shapes
    if line.opcode != line.base:
        # The start's own result also holds operands and counters; what is there when it is done is the result.
        done = (i for i in where.instructions.values() if i.opcode == f"{line.base}-done" and i.operands == (line.name,))
        results = next((i.shapes for i in done), where.operand_shapes(line) if line.base == "all-reduce" else results)
    size = _group_size(line, program.devices)
    return Collective(line.base, where.operand_shapes(line), results, size, times, branch, line.name, _source(line))


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


def _flops(where: Computation, line: Instruction) -> int | None:
    """FLOPs of a product of matrices; None for anything else, and for a call whose product cannot be told."""
    if line.base in _DOTS:
        return 2 * line.shapes[0].size * _contracted(where, line, r"lhs_contracting_dims=\{([\d,]*)\}")
    if line.base == "convolution":
        return _convolution(where, line)
    if _MATMUL_CALL.search(_target(line)):
        operands = where.operand_shapes(line)
        if len(operands) < 2 or not line.shapes:
            return None
        if "lhs_contracting_dimensions" in line.attributes:
            contracted = _contracted(where, line, r"lhs_contracting_dimensions\W+?\[([^\]]*)\]")
            return 2 * line.shapes[0].size * contracted
        # The batch [b,m,k]·[b,k,n] → [b,m,n], or [b,m,k]·[k,n] → [b,m,n]: |lhs|·|rhs| / |result| = b·k², or k².
        batch = math.prod(operands[1].dims[:-2])
        squared, rest = divmod(operands[0].size * operands[1].size, max(line.shapes[0].size * batch, 1))
        inner = math.isqrt(squared)
        return None if rest or inner * inner != squared else 2 * line.shapes[0].size * inner
    return None


def _contracted(where: Computation, line: Instruction, pattern: str) -> int:
    match = re.search(pattern, line.attributes)
    axes = re.findall(r"\d+", match[1]) if match else []
    lhs = where.operand_shapes(line)[0]
    return math.prod(lhs.dims[int(axis)] for axis in axes)


def _convolution(where: Computation, line: Instruction) -> int:
    """Two for every pair of an input and a kernel element that meet; where the kernel lies over padding nothing is counted.

    TPU prints products of matrices as convolutions, batch axes as spatial axes whose kernel meets one input a position.
    """
    kernel, result = where.operand_shapes(line)[1], line.shapes[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    groups = re.search(r"batch_group_count=(\d+)", line.attributes)
    assert labels is not None, f"convolution {line.name} has no dim_labels"
    lhs_labels, kernel_labels, result_labels = labels.groups()
    image = where.operand_shapes(line)[0]
    window = re.search(r"window=\{([^}]*)\}", line.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window and window[1] else {}
    meets = 1
    for axis in range(sum(label.isdigit() for label in kernel_labels)):
        at = str(axis)
        sizes = (image.dims[lhs_labels.index(at)], kernel.dims[kernel_labels.index(at)], result.dims[result_labels.index(at)])
        option = {name: text.split("x")[axis] for name, text in fields.items() if len(text.split("x")) > axis}
        meets *= _meetings(*sizes, option)
    features = kernel.dims[kernel_labels.index("i")] * kernel.dims[kernel_labels.index("o")]
    rows = image.dims[lhs_labels.index("b")] // (int(groups[1]) if groups else 1)
    return 2 * meets * features * rows


def _meetings(size: int, kernel: int, result: int, option: dict[str, str]) -> int:
    """Along one axis: pairs (position of the result, element of the kernel) that lie on an element of the input."""
    stride, spread, gap = (int(option.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(option.get("pad", "0_0").split("_")[0])
    count = 0
    for position, element in product(range(result), range(kernel)):
        at = position * stride + element * gap - before
        count += at >= 0 and at % spread == 0 and at // spread < size
    return count


def _moved(program: Program, where: Computation, line: Instruction) -> int:
    """Bytes one instruction reads and writes."""
    written = sum(shape.bytes for shape in line.shapes)
    operands = [where.instructions[name] for name in line.operands if name in where.instructions]
    if line.base in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if line.base == "dynamic-update-slice":
        return 2 * sum(shape.bytes for shape in operands[1].shapes)
    inner = program.computations.get((line.called("calls") or [""])[0]) if line.base == "fusion" else None
    if inner is None:
        return written + sum(shape.bytes for one in operands for shape in one.shapes)
    return _written(inner, inner.root) + sum(_read(inner, number, one) for number, one in enumerate(operands))


def _written(inner: Computation, line: Instruction) -> int:
    """What a fusion writes: of an update in place, the update."""
    if line.opcode == "tuple":
        return sum(_written(inner, inner.instructions[name]) for name in line.operands)
    if line.opcode == "bitcast" and line.operands[0] in inner.instructions:
        return _written(inner, inner.instructions[line.operands[0]])
    if line.opcode == "dynamic-update-slice":
        return sum(shape.bytes for shape in inner.instructions[line.operands[1]].shapes)
    return sum(shape.bytes for shape in line.shapes)


def _read(inner: Computation, number: int, operand: Instruction) -> int:
    """What a fusion reads of one operand: its slices, where it is only sliced; nothing, where it is only updated in place."""
    whole = sum(shape.bytes for shape in operand.shapes)
    parameter = inner.parameter(number)
    uses = [] if parameter is None else [i for i in inner.instructions.values() if parameter.name in i.operands]
    if not uses:
        return whole
    total = 0
    for use in uses:
        if use.operands[0] != parameter.name or use.opcode not in ("dynamic-slice", "slice", "gather", "dynamic-update-slice"):  # type: ignore[union-attr]
            return whole
        total += 0 if use.opcode == "dynamic-update-slice" else sum(shape.bytes for shape in use.shapes)
    return min(total, whole)
