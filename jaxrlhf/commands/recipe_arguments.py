"""The recipe of a command line: CONFIG.yaml, and --section.key VALUE for what is to be otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import yaml

from jaxrlhf.config import Config
from jaxrlhf.config.checks import contradictions
from jaxrlhf.recipe import ConfigError, load_config


def config_of(command: str, path: str, overrides: list[str]) -> Config:
    """The recipe at `path` with what the command line overrides. Raises ConfigError, with a line for each contradiction."""
    config = load_config(path)
    if overrides:
        config = _overridden(config, overrides, f"jaxrlhf {command} {path}")
        faults = [*contradictions(config), *_overruled(config, overrides)]
        if command == "sweep" and any(word.partition("=")[0] == "--seed" for word in overrides):
            faults.append("--seed would do nothing: --seeds gives the seeds, and --sft_seed that of the text and of SFT.")
        if faults:
            raise ConfigError("\n".join(faults))
    return config


def _overridden(config: Config, overrides: list[str], prog: str) -> Config:
    import tyro  # a third of a second, which a recipe without overrides does without

    # `row` has no keys of its own: what it holds is checked with the method it changes.
    row, rest, words = dict(config.row), [], iter(overrides)
    for word in words:
        if word.startswith("--row."):
            column, given, value = word.removeprefix("--row.").partition("=")
            row[column.replace("-", "_")] = yaml.safe_load(value if given else next(words, ""))
        else:
            rest.append(word)
    config, overrides = dataclasses.replace(config, row=row), rest
    # Keys are written as in the YAML; tyro takes underscores and hyphens alike.
    return tyro.cli(Config, default=config, args=overrides, prog=prog, config=(tyro.conf.FlagConversionOff,))


def _overruled(config: Config, overrides: list[str]) -> Iterator[str]:
    """The given keys that an arm sets itself: the arm's value would win, and the one given here would do nothing."""
    given = [word[2:].partition("=")[0].replace("-", "_") for word in overrides if word.startswith("--")]
    for key in given:
        arms = [name for name, own in config.arms.items() if any(key == k or key.startswith(f"{k}.") for k in own)]
        if arms:
            several = len(arms) > 1
            yield (
                f"--{key} would do nothing: {'arms' if several else 'arm'} {', '.join(arms)} {'set' if several else 'sets'} {key} already; "
                f"change it in the recipe, under arms, or run a copy of the recipe without arms."
            )
