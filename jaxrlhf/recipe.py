"""Read a YAML recipe into a config and write one back. A wrong recipe is refused here, with the nearest known name."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from jaxrlhf.config import Config
from jaxrlhf.config.checks import contradictions, truths_as_numbers
from jaxrlhf.config.names import name_fault
from jaxrlhf.config.text import ConfigError, parse

MARK = "# Written by jaxrlhf; a run of this name writes it anew.\n"  # the first line of a config.yaml of ours
MOST_FAULTS = 20  # that are spelled out
OF_ALL_ARMS = ("name", "output", "store", "arms")  # keys of the recipe that say where its arms are


def load_config(path: str | Path) -> Config:
    """The config of a YAML file; the package's own recipes are found by their file name."""
    return from_mapping(read_yaml(path), where=str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    found = find_recipe(path)
    raw = parse(found.read_bytes(), str(found))
    if raw is None:
        raise ConfigError(f"{found} is empty; a recipe is a mapping of sections (jaxrlhf run configs/quickstart.yaml shows one).")
    if not isinstance(raw, dict):
        raise ConfigError(f"{found} holds a {type(raw).__name__}; a recipe is a mapping of sections.")
    return raw


def recipe_folder() -> Path:
    """configs/ of the checkout, or its copy inside an installed package."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_recipe(path: str | Path) -> Path:
    """`path`, or the package's recipe of that file name."""
    path = Path(path)
    if path.is_file():
        return path
    packaged = recipe_folder() / path.name
    if packaged.is_file():
        return packaged
    known = sorted(p.name for p in recipe_folder().glob("*.yaml"))
    near = difflib.get_close_matches(path.name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else f" Packaged recipes: {', '.join(known)}."
    raise ConfigError(f"no recipe at {path}.{hint}")


def from_mapping(raw: Mapping[str, Any], *, where: str = "config") -> Config:
    """The config of a mapping. Raises ConfigError with every unknown key, wrong type and impossible combination."""
    try:
        config = _adapter().validate_python(dict(raw))
    except ValidationError as error:
        found = _distinct(error)
        more = [f"{where}: and {len(found) - MOST_FAULTS} more faults."] if len(found) > MOST_FAULTS else []
        raise ConfigError("\n".join([*(f"{where}: {_explain(fault)}" for fault in found[:MOST_FAULTS]), *more])) from None
    faults = [*truths_as_numbers(raw, config), *contradictions(config)]
    if faults:
        raise ConfigError("\n".join(f"{where}: {fault}" for fault in faults))
    return config


@cache
def _adapter() -> TypeAdapter[Config]:
    """Made once: that takes longer than a hundred recipes."""
    return TypeAdapter(Config)


def _distinct(error: ValidationError) -> list[Any]:
    """The first fault of each key: pydantic reports one for every member of a union."""
    faults: dict[tuple, Any] = {}
    for fault in error.errors(include_url=False, include_context=False):
        place = tuple(part for part in fault["loc"] if _is_field(part))
        faults.setdefault(place, fault)
    return [{**fault, "loc": place} for place, fault in faults.items()]


def _is_field(part: Any) -> bool:
    """pydantic appends the names of a union's members to the location; no key of ours looks like them."""
    return not (isinstance(part, str) and (part.startswith(("literal[", "tuple[")) or part in ("float", "int", "str", "none", "bool")))


def _explain(fault: Any) -> str:
    place = ".".join(map(str, fault["loc"]))
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown_key(place)
    value, place = fault["input"], place if place.isprintable() else repr(place)
    return f"{place} is {value!r:.200}: {fault['msg']}." if not isinstance(value, dict) else f"{place}: {fault['msg']}."


def unknown_key(key: str) -> str:
    """The message for an unknown key, with the nearest key in its section, else anywhere."""
    known = list(all_keys())
    section, _, name = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if near:
        best = f"{section}.{near[0]}" if section else near[0]
        return f"unknown key {key!r}; did you mean {best!r}?"
    others = [k for k in known if k != section]
    similar = [k for k in others if k.rpartition(".")[2] == name] or difflib.get_close_matches(key, others, n=1, cutoff=0.7)
    if similar:
        return f"unknown key {key!r}; did you mean {similar[0]!r}?"
    return f"unknown key {key!r}; {section or 'the top level'} has {', '.join(siblings) or 'no such section'}."


def all_keys(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the config, dotted."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, kind = f"{prefix}{field.name}", hints[field.name]
        yield key
        if dataclasses.is_dataclass(kind):
            yield from all_keys(typing.cast(type, kind), f"{key}.")


def to_mapping(config: Config) -> dict[str, Any]:
    """All keys, with plain Python values; `from_mapping` returns the same config."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def to_yaml(config: Config) -> str:
    """config.yaml of a run: a recipe that loads again as it is."""
    return MARK + _dump(to_mapping(config))


def _dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def as_written(content: bytes) -> bool:
    """Whether a config.yaml is as a run of some version wrote it. Comments, or a layout of somebody's own, would be lost in a new one."""
    try:
        raw = parse(content, "config.yaml")
        return isinstance(raw, dict) and raw.keys() >= set(OF_ALL_ARMS) and content.decode().removeprefix(MARK) == _dump(raw)
    except (ConfigError, UnicodeDecodeError):
        return False


def override(raw: Mapping[str, Any], overrides: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """`raw` with dotted keys replaced. Raises ConfigError for an unknown key."""
    known = set(all_keys())
    result = _plain(dict(raw))
    for key, value in overrides.items():
        if key not in known:
            raise ConfigError(f"{where}: {unknown_key(key)}")
        *sections, name = key.split(".")
        inner = result
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return result


def arms(config: Config) -> dict[str, Config]:
    """The runs of a config: itself, or for each arm the config with that arm's overrides, checked like any other.

    All lie in one folder and share one store: an arm that sets its place or its name would be in no table, and is refused.
    """
    if not config.arms:
        return {config.name: config}
    base, found = to_mapping(config) | {"arms": {}}, {}
    for name, changes in config.arms.items():
        where = f"arms.{name}" if name.isprintable() else f"arms.{name!r}"
        if (fault := name_fault(name)) is not None:
            raise ConfigError(f"{where}: {name!r} {fault}; an arm's name is that of its folder.")
        if own := sorted(changes.keys() & set(OF_ALL_ARMS)):
            raise ConfigError(f"{where} sets {own[0]}, which is one for all arms: take it out, or make it a recipe of its own.")
        found[name] = from_mapping(override(base, changes, where=where) | {"name": f"{config.name}/{name}"}, where=where)
    return found
