"""Recipes that nobody can mean, or that YAML reads as something else: one line that names the place and a way out, at once."""

import dataclasses
import math
import time
import typing

import pytest

from jaxrlhf.commands.recipe_arguments import config_of
from jaxrlhf.config import Config
from jaxrlhf.config.names import name_fault, run_name_fault
from jaxrlhf.config.text import parse
from jaxrlhf.recipe import MARK, ConfigError, arms, from_mapping, load_config, to_mapping, to_yaml

TASK = {"pairs": {"source": "sample"}, "gold": {"kind": "toy"}}
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("ppo: {}\nseed: 1\nppo: {}\n", "r.yaml, line 3: the key 'ppo' stands in line 1 already"),
        ("ppo:\n  gamma: 1\n  lam: 1\n  gamma: 0.5\n", "line 4: the key 'gamma' stands in line 2 already"),
        ("seed: 1".encode("utf-16"), "line 1: this is UTF-16; save the file as UTF-8."),
        ("a: 1\nname: café".encode("latin-1"), "line 2: this is another encoding (byte 0xe9); save the file as UTF-8."),
        ("a: " + "[" * 90_000, "line 1: exceeded maximum nesting depth."),
        ("[{" * 1000, "line 1: "),
        ("a: " + "[" * 40 + "]" * 40, "line 1: this is nested too deep; 30 levels are read."),
        ("- " * 40_000, "line 1: this is nested too deep"),
        (BOMB, "line 5: with its aliases this has more than 20,000 values"),
        ("a: &a [*a]", "line 1: a value contains itself"),
        ("x: 1\nb: \x00", "line 2: the character U+0000 has no place in YAML"),
        ("a:\n\tb: 1", "line 2: found character that cannot start any token; indent with spaces, not tabs."),
        ("a: 1\n---\nb: 2\n", "line 2: but found another document; keep one of the documents."),
        ("seed: 1\n1: 2", "line 2: the key '1' is not text"),
        ("yes: 1", "line 1: the key 'yes' is not text"),
        ("? [a]\n: 1", "line 1: the key "),
        ("a: !!python/object/apply:os.system [ls]", "line 1: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not read"),
        ("a: !!int x", "line 1: the tag "),
        ("k" * 300 + ": 1", "line 1: the key 'kkkkkkkkkkkkkkkkkkkk'… has 300 characters"),
        ("a: 1\n" * 50_000, "has 250,000 bytes, and at most 100,000 are read"),
        ("seed: " + "9" * 5000, "seed is '999"),
        ("ppo: {batch_size: 0x10}", "ppo.batch_size is '0x10'"),
        ("ppo: {batch_size: 1:30}", "ppo.batch_size is '1:30'"),
        ("ppo: {batch_size: yes}", "ppo.batch_size is True; it must be a number."),
        ("ppo: {learning_rate: true}", "ppo.learning_rate is True; it must be a number."),
        ("".join(f"k{n}: 1\n" for n in range(9000)), "and 8980 more faults."),
        ('"a\\e[31mb": 1', "unknown key 'a\\x1b[31mb'"),
        ('data: {rename: {"a\\nb": [1]}}', "'data.rename.a\\nb' is [1]"),
        ('name: "a\\0b"', "name is 'a\\x00b'"),
        ('data: {train: "a\\0b"}', "data.train is 'a\\x00b'; no name and no text"),
    ],
)  # fmt: skip
def test_one_line_that_names_the_place_at_once(tmp_path, content, said):
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.process_time()
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert time.process_time() - started < 2
    line = next(line for line in str(error.value).splitlines() if said in line)
    assert line.isprintable() and len(line) < 500 and len(str(error.value).splitlines()) <= 21


def test_numbers_are_decimal_and_dates_are_text():
    text = b"\xef\xbb\xbfa: 010\nb: 1_000\nc: -5\nd: 3.5\ne: .5\nf: 1.0e-3\ng: 2024-02-31\nh: [on, ~]\ni: 1e-3\n"
    text += b"x: &x {y: 1}\nz: {<<: *x, y: 2}\n"
    assert parse(text, "r") == {
        "a": "010", "b": 1000, "c": -5, "d": 3.5, "e": 0.5, "f": 1e-3, "g": "2024-02-31", "h": [True, None], "i": "1e-3", "x": {"y": 1},
        "z": {"y": 2},
    }  # fmt: skip
    assert from_mapping(TASK | {"ppo": {"batch_size": "016", "learning_rate": "1e-3"}}).ppo.batch_size == 16
    assert math.isnan(parse(b".nan", "r")) and parse(b"", "r") is None and parse(to_yaml(Config()).encode(), "r") == to_mapping(Config())
    assert to_yaml(Config()).startswith(MARK)


def numbers(cls: type = Config, prefix: str = "") -> typing.Iterator[tuple[str, bool]]:
    """(key, is it a float) of every number of the config."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from numbers(typing.cast(type, kind), f"{prefix}{field.name}.")
        elif {int, float} & {kind, *typing.get_args(kind)}:
            yield f"{prefix}{field.name}", float in (kind, *typing.get_args(kind))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2**64, -(2**64)], ids=str)
def test_no_number_is_nan_or_infinite_or_over_64_bits(value):
    passed = []
    found = list(numbers())
    for key, real in found:
        if real and isinstance(value, int):
            continue
        raw: dict = {name: dict(section) for name, section in TASK.items()}
        inner, *names = raw, *key.split(".")
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        inner[names[-1]] = value
        try:
            from_mapping(raw)
            passed.append(key)
        except ConfigError as error:
            assert names[-1] in str(error), (key, str(error))
    assert len(found) > 100 and passed == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--ppo.learning-rate", "nan"], "ppo.learning_rate is nan; it must be a finite number."),
        (["--weights.eta=inf"], "weights.eta is inf"),
        (["--ppo.batch-size", "9" * 20], "it must be below 2**63."),
        (["--name", ".."], "name is '..', which begins with a dot"),
        (["--row.ensemble", "[[["], "--row.ensemble is not YAML: line 2"),
        (["--row.ensemble", "{a: 1, a: 2}"], "--row.ensemble, line 1: the key 'a' stands in line 1 already"),
        (["--data.train", "a\udcffb"], "data.train is 'a\\udcffb'"),
    ],
)
def test_the_command_line_is_checked_in_the_same_way(overrides, said):
    with pytest.raises(ConfigError) as error:
        config_of("run", "quickstart.yaml", overrides)
    assert said in str(error.value)


NAMES = {
    "": "is empty", "  ": "is empty", ".": "begins with a dot", "..": "begins with a dot", ".stages": "begins with a dot",
    "a/b": "separator", "a\\b": "separator", "/": "separator", "a\nb": "cannot be shown", "a\x00": "cannot be shown",
    "a\u2028b": "cannot be shown", "\ud800": "cannot be shown", "é" * 128: "has 256 bytes", "stages": "file of every run",
    "Config.yaml": "file of every run", "metrics.jsonl": "file of every run",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_what_is_no_name(name):
    assert NAMES[name] in (name_fault(name) or "")
    inside = name if "/" not in name else f"x/{name}/.."
    with pytest.raises(ConfigError, match="name is "):
        from_mapping(TASK | {"name": inside})
    with pytest.raises(ConfigError, match=r"arms\..*; an arm's name is that of its folder"):
        arms(from_mapping(TASK | {"arms": {name: {}}}))


def test_names_of_all_languages_and_runs_in_runs():
    for name in ("exp1", "a b", "模型-1", "é" * 127, "🙂", "a..b", "ﬁne", "seed-0", "x.stages"):
        assert name_fault(name) is None and from_mapping(TASK | {"name": name}).name == name
    assert run_name_fault("run/seed-0/arm") is None  # as config.yaml of an arm has it, which loads again
    for name in ("/etc", "a//b", "a/", "a/../b", "a/stages", "a/.stages/b"):
        assert run_name_fault(name) is not None, name


def test_an_arm_lies_in_its_recipe_s_folder():
    for key in ("name", "output", "store", "arms"):
        with pytest.raises(ConfigError, match=rf"arms\.a sets {key}, which is one for all arms"):
            arms(from_mapping(TASK | {"arms": {"a": {key: "elsewhere"}}}))
