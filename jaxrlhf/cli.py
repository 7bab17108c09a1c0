"""The command line: parses and prints, nothing else."""

from __future__ import annotations

import argparse
import ast
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrlhf import distributed
from jaxrlhf.distributed import cluster, watchdog
from jaxrlhf.distributed.cluster import check_alone

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would tell every user that torch is missing

USAGE = """\
jaxrlhf run CONFIG.yaml [--section.key value …]     all stages of a run, and its table
jaxrlhf sweep CONFIG.yaml --seeds 5 [--…]           every arm at the seeds 0 to 4 (3,5,9: at these), and one table of all
jaxrlhf sft | reward | ppo CONFIG.yaml [--…]        the stages up to that one (of round 1)
jaxrlhf plan CONFIG.yaml [--devices 8] [--device h100] [--…]   memory and time of every phase, nothing run or fetched
jaxrlhf embed | nearest DATA --output FOLDER        vectors of preference pairs; the pairs nearest to a policy's text
jaxrlhf generate FOLDER [PROMPT …] [--file F]       sample from a policy
jaxrlhf evaluate A [B] --gold … | --judge MODEL     policies, stored responses or references against each other
jaxrlhf report RUN [RUN …] [--serve]                one page: table, figures, samples; --serve keeps it fresh
jaxrlhf launch --processes 2 run CONFIG.yaml [--…]  several processes on this machine, one run
jaxrlhf run CONFIG.yaml --help                      every key of the config
"""


HELP = ("-h", "--help")
# Commands with options of their own: jaxrlhf/run/NAME.py.
TOOLS = {"embed": "embed", "nearest": "nearest", "evaluate": "compare", "report": "report"}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 1 with one clear message on standard error, or 2 for a command that cannot be parsed."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in HELP:
        print(USAGE, end="")
        return 0 if argv else 2
    commands = dict.fromkeys(("run", "sft", "reward", "ppo"), _run)
    commands |= {"sweep": _sweep, "plan": _plan, "launch": _launch, "generate": _generate} | dict.fromkeys(TOOLS, _tool)
    if argv[0] not in commands:
        print(f"jaxrlhf: no command {argv[0]!r}.\n{USAGE}", end="", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # the checkpoint library narrates every save
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `module:attribute` names a file beside the config, last: it shadows nothing installed
    try:
        if commands[argv[0]] is not _run:
            check_alone(argv[0])
        return commands[argv[0]](argv[0], argv[1:])
    except KeyboardInterrupt:
        message = "stopped; the same command goes on from the last finished stage, or from a checkpoint inside one."
        print(f"\n{message}", file=sys.stderr)
        distributed.abort(130, message)
        return 130
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    """The exit status after an error, said plainly; one that is not written for users is raised again, with its traceback."""
    if (cause := distributed.failure_elsewhere(error)) is not None:
        print(f"jaxrlhf: {cause}", file=sys.stderr)
        distributed.abort(watchdog.STATUS_OF_OTHERS)
    if os.environ.get("JAXRLHF_TRACEBACK") or not _is_plain(error):
        if distributed.is_grouped():
            traceback.print_exception(error)
            distributed.abort(1, f"{type(error).__name__}: {error}")
        raise error
    message = str(error.args[0] if isinstance(error, KeyError) else error)  # str() would quote a KeyError's
    print(f"jaxrlhf: {message}", file=sys.stderr)
    for note in getattr(error, "__notes__", []):
        if "JAX_TRACEBACK_FILTERING" not in note:  # jax's, about a traceback that is not shown
            print(f"  {note}", file=sys.stderr)
    distributed.abort(1, message)
    return 1


def _is_plain(error: Exception) -> bool:
    """Errors whose message is written for users: the system's, a missing module of another package, and what our `raise` statements say.

    Anything else is a fault of ours or of the user's own code, and keeps its traceback.
    """
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith("jaxrlhf")
    return isinstance(error, OSError) or type(error).__module__.startswith("jaxrlhf.") or _raised_here(error)


def _raised_here(error: Exception) -> bool:
    """Whether a `raise` statement of the package raised it, rather than an operation that failed (`int("x")` is no message of ours)."""
    where = None
    for where in traceback.walk_tb(error.__traceback__):  # noqa: B007
        pass
    if where is None:
        return False
    frame, line = where
    file = Path(frame.f_code.co_filename)
    if not file.is_relative_to(Path(__file__).parent):
        return False
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return any(isinstance(node, ast.Raise) and node.exc is not None and node.lineno == line for node in nodes)


def _run(command: str, argv: list[str]) -> int:
    if (status := _without_config(command, argv)) is not None:
        return status
    group, overrides = _group_of(argv[1:])
    if cluster.requested_group(**group):
        from jaxrlhf.run.launch import watched

        if (status := watched()) is not None:
            return status
    config = _config_of(command, argv[0], overrides)
    distributed.start(**group)
    _cache_compilations()
    from jaxrlhf.run.report import write_report
    from jaxrlhf.run.run import run
    from jaxrlhf.run.table import read_summaries, show
    from jaxrlhf.storage.remote import is_url, join

    if not distributed.is_leader():
        logging.getLogger().setLevel(logging.ERROR)  # the leader says it
    folder = run(config, until=None if command == "run" else command)
    if not distributed.is_leader():
        pass
    elif command == "run":
        show(read_summaries(folder))
        where = join(config.output, config.name) if is_url(config.output) else folder
        print(f"run folder: {where}")
        if page := write_report(folder):
            print(f"report: {join(where, page.name) if is_url(where) else page}")
    else:
        for stage in sorted((folder / "stages").glob("*")) if not config.arms else sorted(folder.glob("*/stages/*")):
            print(stage)
    distributed.finish()
    return 0


def _group_of(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(how the processes of a run find each other, the other words)."""
    parser = argparse.ArgumentParser(prog="jaxrlhf run CONFIG.yaml", add_help=False, allow_abbrev=False)
    parser.add_argument("--coordinator")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    group, rest = parser.parse_known_args(words)
    return vars(group), rest


def _launch(command: str, argv: list[str]) -> int:
    from jaxrlhf.run import launch

    parser = argparse.ArgumentParser(prog="jaxrlhf launch", allow_abbrev=False)
    launch.add_arguments(parser)
    return launch.main(parser.parse_args(argv))


def _sweep(command: str, argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="jaxrlhf sweep CONFIG.yaml",
        description="Every arm of a recipe at every seed, into one table. A sweep that was stopped goes on with the same command. "
        "Exit status 1 where a run failed: its error.txt says why, the others have gone on.",
        epilog="Any other --section.key VALUE changes the recipe, as in `jaxrlhf run`; --output FOLDER is where runs go (runs by default).",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", default="", help="5: the seeds 0 to 4; 3,5,9: these three")
    if argv and argv[0] in HELP:
        parser.print_help()
        return 0
    if (status := _without_config(command, argv)) is not None:
        return status
    options, overrides = parser.parse_known_args(argv[1:])
    config = _config_of(command, argv[0], overrides)
    from jaxrlhf.run.sweep import read_sweep, seeds_of, sweep, way_out
    from jaxrlhf.run.sweep_table import show

    seeds = seeds_of(options.seeds)
    _cache_compilations()
    folder = sweep(config, seeds)
    done = read_sweep(folder)
    show(done)
    print(f"sweep folder: {folder}")
    for line in way_out(done):
        print(f"jaxrlhf: {line}", file=sys.stderr)
    return 1 if way_out(done) else 0


def _plan(command: str, argv: list[str]) -> int:
    from jaxrlhf.run import plan

    parser = argparse.ArgumentParser(
        prog="jaxrlhf plan CONFIG.yaml",
        description="What every phase of a run needs: memory by part, products of matrices, traffic, exchanges between devices, time. The "
        "steps are compiled and not run; no data and no weights are read. Predictions, not measurements.",
        epilog="Any other --section.key VALUE changes the recipe, as in `jaxrlhf run`.",
        allow_abbrev=False,
    )
    plan.add_arguments(parser)
    if argv and argv[0] in HELP:
        parser.print_help()
        return 0
    if (status := _without_config(command, argv)) is not None:
        return status
    options, overrides = parser.parse_known_args(argv[1:])
    plan.start_devices(options.devices)
    return plan.main(options, _config_of(command, argv[0], overrides))


def _without_config(command: str, argv: list[str]) -> int | None:
    """The exit status of a command that was given no config: asked for help, or mistaken."""
    if argv and argv[0] in HELP:
        print(USAGE, end="")
        return 0
    if not argv or argv[0].startswith("-"):
        print(f"jaxrlhf {command} needs a config: jaxrlhf {command} CONFIG.yaml\n{USAGE}", end="", file=sys.stderr)
        return 2
    return None


def _config_of(command: str, path: str, overrides: list[str]) -> Any:
    """The recipe at `path` with what the command line overrides."""
    from jaxrlhf.config.checks import contradictions
    from jaxrlhf.recipe import ConfigError, load_config

    config = load_config(path)
    if overrides:
        config = _overridden(config, overrides, f"jaxrlhf {command} {path}")
        faults = [*contradictions(config), *_overruled(config, overrides)]
        if command == "sweep" and any(word.partition("=")[0] == "--seed" for word in overrides):
            faults.append("--seed would do nothing: --seeds gives the seeds, and --sft_seed that of the text and of SFT.")
        if faults:
            raise ConfigError("\n".join(faults))
    return config


def _overridden(config: Any, overrides: list[str], prog: str) -> Any:
    import dataclasses

    import tyro
    import yaml

    from jaxrlhf.config import Config

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


def _overruled(config: Any, overrides: list[str]) -> Iterator[str]:
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


def _cache_compilations() -> None:
    from jaxrlhf.sharding.compile_cache import cache_compilations

    cache_compilations()


def _tool(command: str, argv: list[str]) -> int:
    """A command of TOOLS."""
    import importlib

    parser = argparse.ArgumentParser(prog=f"jaxrlhf {command}")
    module = importlib.import_module(f"jaxrlhf.run.{TOOLS[command]}")
    module.add_arguments(parser)
    options = parser.parse_args(argv)
    _cache_compilations()
    return module.main(options)


def _generate(command: str, argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"jaxrlhf {command}", description="Sample responses from a policy folder, one JSON object a line."
    )
    parser.add_argument("folder", help="a Hugging Face model folder, such as a policy stage of a run")
    parser.add_argument("prompts", nargs="*", help="prompts as arguments; none and no --file: one prompt a line from standard input")
    parser.add_argument("--file", help="prompts from JSONL(.gz) or Parquet with a prompt field")
    parser.add_argument("--output", help="write JSON lines here instead of printing them")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--max_prompt_length", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--num_samples", type=int, default=1, help="responses to each prompt")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    _cache_compilations()
    from jaxrlhf.run.generate import generate_texts

    settings = vars(options)
    rows = generate_texts(**{name: settings[name] for name in settings if name != "output"})
    _print_rows(rows, options.output)
    return 0


def _print_rows(rows: Any, output: str | None) -> None:
    import json

    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output is None:
        sys.stdout.writelines(lines)
        return
    partial = Path(f"{output}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    os.replace(partial, output)


if __name__ == "__main__":
    sys.exit(main())
