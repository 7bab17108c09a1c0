"""What one instruction computes and moves."""

import math
import re
from itertools import product

from jaxrlhf.plan.hlo.text import Computation, Instruction, Program
from jaxrlhf.plan.hlo.walk import call_target

_DOTS = ("dot", "scaled-dot", "ragged-dot")
_MATMUL_CALL = re.compile(r"gemm|matmul", re.IGNORECASE)
# What moves no data, or whose data is counted in what it calls.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id",
         "replica-id", "opt-barrier")  # fmt: skip


def flops_of(where: Computation, line: Instruction) -> int | None:
    """FLOPs of a product of matrices; None for anything else, and for a call whose product cannot be told."""
    if line.base in _DOTS:
        return 2 * line.shapes[0].size * _contracted(where, line, r"lhs_contracting_dims=\{([\d,]*)\}")
    if line.base == "convolution":
        return _convolution(where, line)
    if _MATMUL_CALL.search(call_target(line)):
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


def bytes_moved(program: Program, where: Computation, line: Instruction) -> int:
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
