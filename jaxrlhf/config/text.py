"""Read YAML that a user wrote: what cannot be meant is refused, with its line, before anything walks through it."""

import re
from typing import Any

import yaml

MOST_BYTES, MOST_VALUES, DEEPEST, LONGEST_KEY = 100_000, 20_000, 30, 200


class ConfigError(ValueError):
    """A recipe that cannot be run; a line for each fault: the key, its value, the rule, the way out."""


_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where PyYAML has it: fifty times as fast


class _Loader(_Parser):
    """YAML 1.1 without its surprises: a number is decimal (010 is not 8, 1:30 is not 90), and a date is text."""


_OWN = {
    "int": re.compile(r"[-+]?(0|[1-9][0-9_]{0,30})$"),
    "float": re.compile(r"([-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*\.[0-9_]*)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in found if not tag.endswith((":int", ":float", ":timestamp"))]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _rule in _OWN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _rule, list("-+0123456789."))


def parse(content: bytes, where: str) -> Any:
    """The value of a YAML document in UTF-8. ConfigError of one line with the line of the fault: no YAML, several documents, a key that is
    there twice or is no word, a tag, aliases or brackets that nobody writes."""
    try:
        text, depth = _decoded(content, where), 0
        for event in yaml.parse(text, Loader=_Loader):  # one by one: what is nested too deep would end the process
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ConfigError(f"{where}, line {event.start_mark.line + 1}: this is nested too deep; {DEEPEST} levels are read.")
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, loader, where, {})
        return loader.construct_document(node)
    except yaml.reader.ReaderError as error:
        line = content[: len(str(content, "utf-8-sig")[: error.position].encode())].count(b"\n") + 1
        raise ConfigError(f"{where}, line {line}: the character U+{error.character:04X} has no place in YAML; take it out.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = f"{error.problem or error.context}".replace("\n", " ")
        several = "; keep one of the documents" if "single document" in f"{error.context}" else ""
        tab = "; indent with spaces, not tabs" if "start any token" in problem and b"\t" in content else ""
        raise ConfigError(f"{where} is not YAML: line {mark.line + 1 if mark else '?'}: {problem}{several}{tab}.") from None


def _decoded(content: bytes, where: str) -> str:
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{where} has {len(content):,} bytes, and at most {MOST_BYTES:,} are read; is it a recipe?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        other = "UTF-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else f"another encoding (byte 0x{content[error.start]:02x})"
        raise ConfigError(f"{where}, line {line}: this is {other}; save the file as UTF-8.") from None


def _check(node: yaml.Node, loader: _Loader, where: str, seen: dict[int, int]) -> int:
    """The number of values in `node`, aliases spelled out. ConfigError for what `parse` refuses; `seen`: id of a node → its number."""
    here = f"{where}, line {node.start_mark.line + 1}"
    if seen.get(id(node)) == 0:
        raise ConfigError(f"{here}: a value contains itself; an alias (*name) must stand outside of what it names.")
    if id(node) in seen:
        return seen[id(node)]
    plain = (not node.style, bool(node.style)) if isinstance(node, yaml.ScalarNode) else (True, False)
    if node.tag != loader.resolve(type(node), node.value, plain):
        raise ConfigError(f"{here}: the tag {node.tag[:60]!r} is not read; write the value without `!`.")
    if isinstance(node, yaml.MappingNode):
        _check_keys([key for key, _ in node.value], where)
    inner = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else node.value
    seen[id(node)], count = 0, 1
    for value in inner if isinstance(node, yaml.CollectionNode) else ():
        count += _check(value, loader, where, seen)
        if count > MOST_VALUES:
            raise ConfigError(f"{here}: with its aliases this has more than {MOST_VALUES:,} values; is it a recipe?")
    seen[id(node)] = count
    return count


def _check_keys(keys: list[yaml.Node], where: str) -> None:
    lines: dict[str, int] = {}
    for key in keys:
        line = key.start_mark.line + 1
        if not key.tag.endswith((":str", ":merge")):
            raise ConfigError(f"{where}, line {line}: the key {str(key.value)[:60]!r} is not text; name a setting, or quote it.")
        if len(key.value) > LONGEST_KEY:
            raise ConfigError(f"{where}, line {line}: the key {key.value[:20]!r}… has {len(key.value)} characters; no setting has.")
        if key.value in lines:
            raise ConfigError(
                f"{where}, line {line}: the key {key.value!r} stands in line {lines[key.value]} already; YAML takes the last, keep one."
            )
        lines[key.value] = line
