"""Which mutants a module has: Cosmic Ray's operators, three more for arguments, and nothing in strings and annotations."""

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

Place = tuple[int, int]  # line from 1, column in characters


class _Children(Operator):
    """An operator that changes the list of a node's children. `places` are those it changes, as (start, stop)."""

    def mutation_positions(self, node):
        return [(node.children[start].start_pos, node.children[stop - 1].end_pos) for start, stop in self.places(node)]

    def mutate(self, node, index):
        node.children = self.changed(list(node.children), *self.places(node)[index])
        return node

    @classmethod
    def examples(cls):
        return ()

    def places(self, node) -> list[tuple[int, int]]:
        raise NotImplementedError

    def changed(self, children: list, start: int, stop: int) -> list:
        """Without them and the comma behind, or before where they are the last."""
        behind = stop < len(children) and children[stop].get_code().strip() == ","
        return children[: start if behind or children[start - 1].get_code().strip() != "," else start - 1] + children[stop + behind :]


class DropArgument(_Children):
    """f(a, b=c) → f(a); **options too. What has a default is left to it."""

    def places(self, node):
        if node.type == "arglist" or (node.type == "trailer" and node.children[0].value == "("):
            return [(i, i + 1) for i, child in enumerate(node.children) if _is_named(child)]
        return []


def _is_named(node) -> bool:
    if node.type != "argument":
        return False
    first, second = (child.get_code().strip() for child in node.children[:2])
    return first == "**" or second == "="


class SwapArguments(_Children):
    """f(a, b) → f(b, a), of neighbours without a name; not where both are one."""

    COMMUTATIVE = ("maximum", "minimum", "max", "min", "logaddexp", "swapaxes")

    def places(self, node):
        if node.type != "arglist" or _called(node) in self.COMMUTATIVE:
            return []
        return [(i, i + 3) for i in range(0, len(node.children) - 2, 2) if all(node.children[j].type != "argument" for j in (i, i + 2))]

    def changed(self, children, start, stop):
        return children[:start] + children[start:stop][::-1] + children[stop:]


def _called(arguments) -> str:
    before = arguments.parent.get_previous_sibling()
    return "" if before is None else before.get_code().strip(" .")


class DropEntry(_Children):
    """{"a": x, "b": y} → {"a": x}."""

    def places(self, node):
        if node.type != "dictorsetmaker":
            return []
        return [(start, stop) for start, stop in _entries(node) if {"**", ":"} & set(_codes(node)[start:stop])]


def _codes(node) -> list[str]:
    return [child.get_code().strip() for child in node.children]


def _entries(node) -> list[tuple[int, int]]:
    """[start, stop) of what lies between the commas."""
    commas = [i for i, code in enumerate(_codes(node)) if code == ","]
    return [(a + 1, b) for a, b in zip([-1, *commas], [*commas, len(node.children)], strict=True) if b > a + 1]


OURS = {operator.__name__: operator for operator in (DropArgument, SwapArguments, DropEntry)}


class Mutant(NamedTuple):
    """One change of one file. `was` and `becomes` are the lines that differ, stripped. `id` changes with the file, `draw` with them."""

    module: str  # below jaxrlhf/
    operator: str
    line: int
    was: str
    becomes: str
    source: str
    id: str
    draw: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.operator}\n    - {self.was}\n    + {self.becomes}".replace("\\n", "\n      ")


def mutants_of(module: str, source: str, operators: Sequence[str], seed: int) -> Iterator[Mutant]:
    """All changes that compile and differ, each once. `draw` is uniform in the mutants and stays as it is while its lines do."""
    skipped, tree = _skipped(source), get_ast(source)
    compared = {_span(source, node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare)}  # not a < b is a >= b
    seen, repeated = {ast.dump(ast.parse(source))}, Counter()
    for name in operators:
        operator = OURS[name]() if name in OURS else get_operator(f"core/{name}")()
        for node, index, (start, stop) in _places(tree, operator):
            if any(a <= start and stop <= b for a, b in skipped) or (name == "AddNot" and (start, stop) in compared):
                continue
            changed = _changed(source, node, operator, index)
            try:
                dump = ast.dump(ast.parse(changed))
            except SyntaxError:
                continue
            if dump in seen:
                continue
            seen.add(dump)
            was, becomes = _differing(source, changed)
            facts = (module, name, was, becomes)
            repeated[facts] += 1
            draw, unique = (_hash(*facts, repeated[facts], more) for more in (seed, _hash(source)))
            yield Mutant(module, name, start[0], was, becomes, changed, unique, draw)


def _places(tree, operator: Operator) -> list[tuple]:
    """(node, which of its mutations, where); not the * and / among parameters, which Cosmic Ray takes for a product."""
    nodes = (node for node in ast_nodes(tree) if node.type != "operator" or node.parent.type not in ("parameters", "param"))
    return [(node, index, place) for node in nodes for index, place in enumerate(operator.mutation_positions(node))]


def _changed(source: str, node, operator: Operator, index: int) -> str:
    """What Cosmic Ray's `mutate_code` makes, which parses the file anew for each mutant: some hundred times slower."""
    parent, node.parent = node.parent, None  # or the copy would be one of the whole tree
    copied = copy.deepcopy(node)
    node.parent = copied.parent = parent
    code = operator.mutate(copied, index).get_code()
    start, stop = (_offset(source, place) for place in (node.get_start_pos_of_prefix(), node.end_pos))
    return source[:start] + code + source[stop:]


def _offset(source: str, place: Place) -> int:
    return sum(map(len, source.splitlines(keepends=True)[: place[0] - 1])) + place[1]


def _differing(source: str, changed: str) -> tuple[str, str]:
    """The lines that differ on either side, from the first to the last."""
    sides = [[line.strip() for line in text.splitlines()] for text in (source, changed)]
    for end in (0, -1):
        while all(sides) and sides[0][end] == sides[1][end]:
            for side in sides:
                side.pop(end)
    return "\n".join(sides[0]), "\n".join(sides[1])


def _skipped(source: str) -> list[tuple[Place, Place]]:
    """Where annotations and strings lie, f-strings with all that is in them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        parts = [getattr(node, name, None) for name in ("annotation", "returns")]
        parts += [node] if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)) else []
        found += [_span(source, part) for part in parts if part is not None]
    return found


def _span(source: str, node) -> tuple[Place, Place]:
    """`ast` counts columns in bytes."""
    lines = source.splitlines()
    places = ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
    start, stop = ((line, len(lines[line - 1].encode()[:column].decode())) for line, column in places)
    return start, stop


def _hash(*facts) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
