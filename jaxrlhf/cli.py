"""The command line: run a command, and print a clear message where it fails."""

import argparse
import ast
import importlib
import logging
import os
import shlex
import sys
import traceback
from pathlib import Path

from jaxrlhf import distributed
from jaxrlhf.commands import HELP, RUN_COMMANDS, USAGE
from jaxrlhf.distributed.cluster import check_alone
from jaxrlhf.distributed.launch import LAUNCHED
from jaxrlhf.distributed.stops import Stopped, ignored
from jaxrlhf.distributed.watchdog import STATUS_OF_OTHERS
from jaxrlhf.monitoring.output import shown_output

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would warn that torch is missing

RECIPE_COMMANDS = (*RUN_COMMANDS, "sweep", "preflight", "plan", "verify-resume")  # take a recipe and --section.key VALUE
OTHERS = ("embed", "nearest", "generate", "evaluate", "report", "verify", "launch")
# Command → its module in jaxrlhf.commands.
COMMANDS = dict.fromkeys(RUN_COMMANDS, "run") | {
    name: name.replace("-", "_") for name in (*RECIPE_COMMANDS, *OTHERS) if name not in RUN_COMMANDS
}


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0; 1 with a message on standard error; 2 for a command that cannot be parsed; 143 or 130 for one told to stop; 141
    where who read its output went away.

    Whatever becomes of standard output and error, the command goes on to its end and its results are complete.
    """
    with shown_output() as out:
        status = _main(sys.argv[1:]) if argv is None else _main(argv, last=False)
        out.flush()
        if status or out.lost is None:
            return status
        if isinstance(out.lost, BrokenPipeError):
            return 141  # as a shell has it for SIGPIPE
        print(f"jaxrlhf: standard output could not be written ({out.lost}).", file=sys.stderr)
        return 1


def _main(argv: list[str], last: bool = True) -> int:
    """`last`: the process ends with this command."""
    if not argv or argv[0] in HELP:
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"jaxrlhf: no command {argv[0]!r}.\n{USAGE}", end="", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax logs every save
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for `module:attribute` in the current folder; last, so that it hides no installed module
    try:
        if COMMANDS[argv[0]] != "run" and not (argv[0] == "verify-resume" and "--part" in argv):  # that is a process which trains
            check_alone(argv[0])
        return _command(argv[0], argv[1:])
    except Stopped as stop:
        if last:
            ignored()  # a further signal would only be a traceback of the interpreter's end
        return _stopped(stop, shlex.join(["jaxrlhf", *argv]))
    except KeyboardInterrupt:
        message = "stopped; the same command goes on from the last finished stage, or from a checkpoint inside one."
        print(f"\n{message}", file=sys.stderr)
        distributed.abort(130, message)
        return 130
    except Exception as error:
        return _failed(error)


def _command(command: str, argv: list[str]) -> int:
    """Parse and run one command; a recipe and its overrides are passed on as `recipe` and `overrides`."""
    module = importlib.import_module(f"jaxrlhf.commands.{COMMANDS[command]}")
    parser = argparse.ArgumentParser(prog=f"jaxrlhf {command}", add_help=COMMANDS[command] != "run")
    module.add_arguments(parser)
    if command not in RECIPE_COMMANDS:
        return module.main(parser.parse_args(argv))
    parser.prog, parser.allow_abbrev = f"jaxrlhf {command} CONFIG.yaml", False
    if argv and argv[0] in HELP:
        print(parser.format_help() if parser.add_help else USAGE, end="")
        return 0
    if not argv or argv[0].startswith("-"):
        print(f"jaxrlhf {command} needs a config: jaxrlhf {command} CONFIG.yaml\n{USAGE}", end="", file=sys.stderr)
        return 2
    options, overrides = parser.parse_known_args(argv[1:])
    return module.main(argparse.Namespace(command=command, recipe=argv[0], overrides=overrides, **vars(options)))


def _stopped(stop: Stopped, command: str) -> int:
    """Say what goes on from where, and return the exit status: 143 for SIGTERM, 130 for Ctrl-C."""
    where = "the last finished stage, or from a checkpoint inside one" if stop.where is None else "there"
    message = f"{stop.signal}: {stop.where or 'stopped at once'}. The same command goes on from {where}"
    print(f"\njaxrlhf: {message}{'.' if LAUNCHED in os.environ else f':{chr(10)}  {command}'}", file=sys.stderr)
    if stop.where is None:
        distributed.abort(stop.code, message)
    distributed.finish()  # all stop at the same step
    return stop.code


def _failed(error: Exception) -> int:
    """Print the error and return the exit status; an error that is not written for users is raised again, with its traceback."""
    if (cause := distributed.failure_elsewhere(error)) is not None:
        print(f"jaxrlhf: {cause}", file=sys.stderr)
        distributed.abort(STATUS_OF_OTHERS)
    if os.environ.get("JAXRLHF_TRACEBACK") or not _is_plain(error):
        if distributed.is_grouped():
            traceback.print_exception(error)
            distributed.abort(1, f"{type(error).__name__}: {error}")
        raise error
    message = str(error.args[0] if isinstance(error, KeyError) else error)  # str() would quote a KeyError's
    message = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)  # it may quote a hostile file
    message = "\n".join(line if len(line) < 1500 else f"{line[:700]} … {line[-700:]}" for line in message.split("\n"))
    print(f"jaxrlhf: {message}", file=sys.stderr)
    for note in getattr(error, "__notes__", []):
        if "JAX_TRACEBACK_FILTERING" not in note:  # JAX's note on a traceback that is not shown
            print(f"  {note}", file=sys.stderr)
    distributed.abort(1, message)
    return 1


def _is_plain(error: Exception) -> bool:
    """Whether the message is written for users: the system's errors, a missing package, and what this package raises itself.

    Anything else is a bug of ours or in the user's code, and keeps its traceback.
    """
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith("jaxrlhf")
    return isinstance(error, OSError) or type(error).__module__.startswith("jaxrlhf.") or _raised_here(error)


def _raised_here(error: Exception) -> bool:
    """Whether a `raise` statement of this package raised it, or of JAX's flags, and not an operation such as `int("x")`."""
    where = None
    for where in traceback.walk_tb(error.__traceback__):  # noqa: B007
        pass
    if where is None:
        return False
    frame, line = where
    file = Path(frame.f_code.co_filename)
    if not file.is_relative_to(Path(__file__).parent):
        return file.parts[-3:] == ("jax", "_src", "config.py")  # a flag of JAX in the environment with a value that JAX does not know
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return any(isinstance(node, ast.Raise) and node.exc is not None and node.lineno == line for node in nodes)


if __name__ == "__main__":
    sys.exit(main())
