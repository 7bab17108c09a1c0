"""Every field of the config is read by someone, every section refuses what it does not know, and YAML brings all of it back."""

import ast
import dataclasses
import typing
from pathlib import Path

import pytest

from jaxrlhf import config as sections
from jaxrlhf.config import Config
from jaxrlhf.recipe import ConfigError, all_keys, from_mapping, to_mapping, to_yaml

PACKAGE = Path(__file__).parents[2] / "jaxrlhf"
CLASSES = [c for c in vars(sections).values() if dataclasses.is_dataclass(c)]


def read_names() -> set[str]:
    """Every attribute that is read anywhere in the package but in the sections of config/."""
    trees = (ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py") if path.parent.name != "config" or path.name == "checks.py")
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load))
    return {node.attr for node in nodes}


def test_every_field_is_read_somewhere():
    """An option that does nothing is a lie. Shapes and the thresholds of a refit are read as a mapping, key by key."""
    read = read_names()
    by_key = "".join((PACKAGE / path).read_text() for path in ("models/families.py", "pipeline/stages/refit.py"))
    unread = {
        f"{c.__name__}.{field.name}"
        for c in CLASSES
        for field in dataclasses.fields(c)
        if field.name not in read and f'"{field.name}"' not in by_key
    }
    assert unread == set()


@pytest.mark.parametrize("section", CLASSES, ids=lambda c: c.__name__)
def test_every_section_forbids_unknown_keys(section):
    assert section.__pydantic_config__["extra"] == "forbid"
    assert section.__dataclass_params__.frozen
    path = next((key for key in ["", *all_keys()] if section_of(key) is section), None)
    if path is None:  # a base class of sections
        assert section in (sections.OptimizerConfig, sections.SupervisedConfig)
        return
    raw: dict = {"pairs": {"source": "sample"}, "gold": {"kind": "toy"}}
    inner = raw
    for name in filter(None, path.split(".")):
        inner = inner.setdefault(name, {})
    inner["no_such_key"] = 1
    with pytest.raises(ConfigError, match=r"unknown key '.*no_such_key'"):
        from_mapping(raw)


def section_of(key: str) -> type:
    kind: typing.Any = Config
    for name in filter(None, key.split(".")):
        kind = typing.get_type_hints(kind)[name]
    return kind


def test_yaml_round_trip_of_every_kind_of_value(tmp_path):
    raw = {
        "name": "trip", "arms": {"a": {"method": "ppo", "ppo.kl_coef": 0.5}}, "pairs": {"source": "sample"}, "gold": {"kind": "toy"},
        "ppo": {"learning_rate": "3e-6", "missing_eos_score": -1, "critic_learning_rate": None},
        "weights": {"eta": "ess", "ess_target": 0.2},
        "data": {"rename": {"query": "prompt"}}, "model": {"shape": {"family": "qwen2", "num_kv_heads": 2}}, "sft": {"max_steps": 0},
    }  # fmt: skip
    config = from_mapping(raw)
    assert config.ppo.learning_rate == 3e-6 and config.ppo.missing_eos_score == -1.0 and config.weights.eta == "ess"
    import yaml

    assert from_mapping(yaml.safe_load(to_yaml(config))) == config
    assert from_mapping(to_mapping(config)) == config


def test_defaults_are_those_of_the_papers():
    ppo, weights = Config().ppo, Config().weights
    assert (ppo.kl_coef, ppo.cliprange, ppo.vf_coef, ppo.gamma, ppo.lam, ppo.num_ppo_epochs, ppo.batch_size, ppo.temperature) == (
        0.05, 0.2, 0.1, 1.0, 0.95, 4, 512, 0.7,
    )  # fmt: skip
    assert (weights.alpha, weights.eta, weights.normalize, weights.temperature) == (0.1, 0.001, "none", 1.0)
    assert (ppo.learning_rate, ppo.adam_epsilon, ppo.weight_decay, ppo.max_grad_norm) == (3e-6, 1e-5, 0.01, None)
