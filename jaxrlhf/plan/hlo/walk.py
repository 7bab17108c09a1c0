"""Walk the instructions of a compiled program, with how often each runs."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxrlhf.plan.hlo.text import Computation, Instruction, Program, read, trips


@dataclass(frozen=True)
class Place:
    """Where an instruction stands and how often it runs: None inside a loop of unknown length."""

    computation: Computation
    line: Instruction
    times: int | None
    branch: bool  # inside a conditional
    fused: bool  # inside a fusion: its operands and results are in no memory


def program_of(text: str | Program) -> Program:
    return read(text) if isinstance(text, str) else text


def walk(program: Program, weight: Callable[[Computation, Instruction], float], unknown_trips: int | None) -> Iterator[Place]:
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


def source_of_line(line: Instruction) -> str:
    match = re.search(r'op_name="([^"]*)"', line.attributes)
    return match[1] if match else ""


def call_target(line: Instruction) -> str:
    match = re.search(r'custom_call_target="([^"]*)"', line.attributes) if line.base == "custom-call" else None
    return match[1] if match else ""
