"""Build the config of a command line: CONFIG.yaml with the overrides --section.key VALUE; and what commands without one take of it."""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxrlhf.config import Config, DataConfig
from jaxrlhf.config.checks import contradictions
from jaxrlhf.config.text import parse
from jaxrlhf.recipe import ConfigError, load_config


def config_of(command: str, path: str, overrides: list[str]) -> Config:
    """The config at `path` with the overrides of the command line. Raises ConfigError, with a line for each fault."""
    config = load_config(path)
    if overrides:
        config = _overridden(config, overrides, f"jaxrlhf {command} {path}")
        faults = [*contradictions(config), *_overruled(config, overrides)]
        if command == "sweep" and any(word.partition("=")[0] == "--seed" for word in overrides):
            faults.append("--seed would do nothing in a sweep: use --seeds, and --sft_seed for the seed of the text and of SFT.")
        if faults:
            raise ConfigError("\n".join(faults))
    return config


def _overridden(config: Config, overrides: list[str], prog: str) -> Config:
    import tyro  # a third of a second, which a recipe without overrides does without

    # `row` is a dict, which tyro cannot parse by key; its columns are checked with the method.
    row, rest, words = dict(config.row), [], iter(overrides)
    for word in words:
        if word.startswith("--row."):
            column, given, value = word.removeprefix("--row.").partition("=")
            value = value if given else next(words, "")
            row[column.replace("-", "_")] = parse(value.encode("utf-8", "surrogateescape"), f"--row.{column}")
        else:
            rest.append(word)
    # tyro takes underscores, as in the YAML, and hyphens.
    return tyro.cli(Config, default=dataclasses.replace(config, row=row), args=rest, prog=prog, config=(tyro.conf.FlagConversionOff,))


def _overruled(config: Config, overrides: list[str]) -> Iterator[str]:
    """Faults for overrides of keys that an arm sets itself, where they would do nothing."""
    given = [word[2:].partition("=")[0].replace("-", "_") for word in overrides if word.startswith("--")]
    for key in given:
        arms = [name for name, own in config.arms.items() if any(key == k or key.startswith(f"{k}.") for k in own)]
        if arms:
            several = len(arms) > 1
            yield (
                f"--{key} would do nothing: {'arms' if several else 'arm'} {', '.join(arms)} {'set' if several else 'sets'} {key} already; "
                f"change it in the recipe, under arms, or run a copy of the recipe without arms."
            )


def add_reading_arguments(parser: argparse._ActionsContainer) -> None:
    """What `data.implicit_prompt` and `data.template_date` are in a config."""
    rules, default = ("assistant", "common_prefix"), DataConfig.implicit_prompt
    parser.add_argument("--implicit_prompt", choices=rules, default=default, help="how text pairs without a prompt are cut")
    parser.add_argument("--template_date", default=DataConfig.template_date, help="for chat templates that ask (default: %(default)s)")


def reading_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Those options, as keywords of the readers; taken out of `settings`."""
    return {name: settings.pop(name) for name in ("implicit_prompt", "template_date")}
