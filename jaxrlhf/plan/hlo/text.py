"""The text of a compiled program as computations and instructions, and how often its loops run. The rest of this folder counts with it."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_SHAPE = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
_HEADER = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)\s*(\(.*)?\{\s*$")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclass(frozen=True)
class Shape:
    """One array as a device holds it: "f32" and its dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        width = 8 if self.dtype == "pred" else int(bits[1]) if bits else 0  # token, opaque: nothing
        return -(-self.size * width // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line. `shapes` are the arrays of its result, a tuple's in order; `operands` are names in the same computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str  # what follows the operands, as printed
    argument: str  # what stands between the brackets: a parameter's number, a constant's value
    root: bool

    @cached_property
    def base(self) -> str:
        """The opcode without "-start": an asynchronous pair is its start."""
        return self.opcode.removesuffix("-start")

    def called(self, *keys: str) -> list[str]:
        """The computations that the attributes `keys` name."""
        found = [re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes) for key in keys]
        return [name for match in found if match for name in re.findall(r"[\w.\-]+", match[1])]


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]  # by name, in the order printed

    @cached_property
    def root(self) -> Instruction:
        return next((line for line in self.instructions.values() if line.root), list(self.instructions.values())[-1])

    def operand_shapes(self, line: Instruction) -> tuple[Shape, ...]:
        return tuple(shape for name in line.operands if name in self.instructions for shape in self.instructions[name].shapes)

    def parameter(self, number: int) -> Instruction | None:
        return next((i for i in self.instructions.values() if i.opcode == "parameter" and i.argument == str(number)), None)


@dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    entry: Computation
    devices: int  # replicas × partitions


def read(text: str) -> Program:
    """The computations of a program. Raises ValueError where the text has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, name, lines = None, None, {}
    for raw in text.splitlines():
        if name is None:
            header = None if raw.startswith("HloModule") or " = " in raw else _HEADER.match(_COMMENT.sub("", raw))
            if header:
                name, lines = header[2], {}
                entry = name if header[1] else entry
        elif raw.lstrip().startswith("}"):
            computations[name] = Computation(name, lines)
            name = None
        elif (line := _instruction(raw)) is not None:
            lines[line.name] = line
    if entry is None or entry not in computations:
        raise ValueError("the text has no ENTRY computation; pass `compiled.as_text()` of a compiled program.")
    head = text.split("\n\n", 1)[0]
    counts = [re.search(rf"\b{key}=(\d+)", head) for key in ("replica_count", "num_partitions")]
    return Program(computations, computations[entry], math.prod(int(match[1]) for match in counts if match))


def _instruction(raw: str) -> Instruction | None:
    start = re.match(r"\s*(ROOT\s+)?%?([\w.\-]+) = ", raw)
    if start is None:
        return None
    rest = _COMMENT.sub("", raw[start.end() :])
    end = _closing(rest, 0) if rest.startswith("(") else 0
    match = re.compile(r"\s*(?:[a-z]\w*\[[^\]]*\](?:\{[^}]*\})?\s+)?([a-z][\w\-]*)\(").match(rest, end)
    if match is None:
        return None
    close = _closing(rest, match.end() - 1)
    argument = rest[match.end() : close - 1]
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(argument) if part.strip())
    return Instruction(start[2], match[1], _shapes(rest[: match.start(1)]), operands, rest[close:], argument.strip(), bool(start[1]))


def _shapes(printed: str) -> tuple[Shape, ...]:
    printed = re.sub(r"\{[^}]*\}", "", printed)  # layouts
    return tuple(Shape(dtype, tuple(int(n) for n in re.findall(r"\d+", dims))) for dtype, dims in _SHAPE.findall(printed))


def _closing(text: str, start: int) -> int:
    """The position after the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if depth == 0:
            return position + 1
    return len(text)


def _split(text: str) -> Iterator[str]:
    """The parts between the commas that stand in no bracket."""
    depth, start = 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            yield text[start:position]
            start = position + 1
    yield text[start:]


def trips(program: Program, where: Computation, line: Instruction) -> int | None:
    """Rounds of a while loop: what the compiler wrote down, else counted from `i = a; i < b; i += c` with constants."""
    known = re.search(r"known_trip_count\W+n\W+(\d+)", line.attributes)
    if known:
        return int(known[1])
    condition, body = (program.computations.get(name) for name in (*line.called("condition"), *line.called("body")))
    if condition is None or body is None or len(line.operands) != 1:
        return None
    test = _inlined(program, condition, condition.root)
    direction = re.search(r"direction=(LT|LE|GT|GE|NE)", test[0].attributes)
    if test[0].opcode != "compare" or direction is None:
        return None
    index, bound = _tuple_index(condition, test[1][0]), _constant(condition, test[1][1])
    first = where.instructions.get(line.operands[0])
    if index is None or bound is None or first is None or first.opcode != "tuple" or body.root.opcode != "tuple":
        return None
    start = _constant(where, where.instructions.get(first.operands[index]))
    update = body.instructions.get(body.root.operands[index])
    step, terms = _inlined(program, body, update) if update else (None, [])
    if start is None or step is None or step.opcode not in ("add", "subtract") or _tuple_index(body, terms[0]) != index:
        return None
    by = _constant(body, terms[1])
    if not by:
        return None
    return _rounds(start, bound, by if step.opcode == "add" else -by, direction[1])


def _rounds(start: int, bound: int, by: int, direction: str) -> int | None:
    if direction == "NE":
        return (bound - start) // by if (bound - start) % by == 0 and (bound - start) // by >= 0 else None
    if (by > 0) != (direction in ("LT", "LE")):
        return None
    span = (bound - start) * (1 if by > 0 else -1) + (direction in ("LE", "GE"))
    return max(-(-span // abs(by)), 0)


def _inlined(program: Program, where: Computation, line: Instruction) -> tuple[Instruction, list[Instruction | None]]:
    """The instruction behind a fusion of a single operation, and its operands as `where` knows them (or constants of the fusion)."""
    if line.opcode != "fusion":
        return line, [where.instructions.get(name) for name in line.operands]
    inner = program.computations[line.called("calls")[0]]
    operands: list[Instruction | None] = []
    for name in inner.root.operands:
        operand = inner.instructions.get(name)
        if operand is not None and operand.opcode == "parameter":
            operand = where.instructions.get(line.operands[int(operand.argument)])
        operands.append(operand)
    return inner.root, operands


def _constant(where: Computation, line: Instruction | None) -> int | None:
    while line is not None and line.opcode in ("copy", "bitcast"):
        line = where.instructions.get(line.operands[0])
    return int(line.argument) if line is not None and line.opcode == "constant" and re.fullmatch(r"-?\d+", line.argument) else None


def _tuple_index(where: Computation, line: Instruction | None) -> int | None:
    while line is not None and line.opcode in ("copy", "bitcast"):
        line = where.instructions.get(line.operands[0])
    if line is None or line.opcode != "get-tuple-element":
        return None
    return int(re.search(r"index=(\d+)", line.attributes)[1])  # type: ignore[index]
