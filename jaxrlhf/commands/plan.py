"""`jaxrlhf plan`: predict the memory and the time of a recipe without running it."""

import argparse
import json
import sys
from pathlib import Path

import jax

from jaxrlhf.commands import EPILOG
from jaxrlhf.commands.recipe_arguments import config_of
from jaxrlhf.files import check_replaceable, write_whole
from jaxrlhf.plan.devices import Device, device_named, device_of_kind, own_device
from jaxrlhf.plan.plan import plan
from jaxrlhf.plan.planner import Phase, Program
from jaxrlhf.plan.table import MADE_BY, as_json, check_figure, draw, show
from jaxrlhf.recipe import MARK, arms, to_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `jaxrlhf plan`, without the keys of the config."""
    parser.description = (
        "What every phase of a run needs: memory by part, products of matrices, traffic, exchanges between devices, time. It is counted "
        "from shapes in seconds, and --compile asks a compiler too; nothing is run, no data and no weights are read. Predictions."
    )
    parser.epilog = f"{EPILOG}."
    parser.add_argument("--devices", type=int, help="plan for this many devices, simulated on the CPU; default: those of this machine")
    parser.add_argument("--device", help="take the published memory, peak and bandwidth of: h100, or several, h100,h200,v5p")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of a device")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="its peak of dense matrix products in model.dtype")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="its memory's bandwidth")
    parser.add_argument("--rows", type=int, help="rows of data.train, for the number of steps; the data is not read")
    parser.add_argument("--valid_rows", type=int, help="rows held out, for the evaluations")
    parser.add_argument("--compile", action="store_true", help="compile every step too, and take the compiler's figures: minutes")
    parser.add_argument(
        "--exact", action="store_true", help="with --compile: training steps of deep models whole; default: 2 and 4 layers, extrapolated"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    parser.add_argument("--figure", metavar="FILE", help="draw the memory of each phase by part (png, svg, pdf)")


def start_devices(count: int | None) -> None:
    """Simulate `count` CPU devices, before JAX uses any; None: use the devices of this machine.

    The compilation cache is off: the plan reports how long compiling takes.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    if count is None:
        return
    if count < 1:
        raise ValueError(f"--devices {count} must be at least 1.")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def main(options: argparse.Namespace) -> int:
    """Plan every arm of the recipe, print the plans, and write the files that were asked for."""
    if options.exact and not options.compile:
        raise ValueError("--exact says how --compile compiles, and nothing is compiled without it; give both, or neither.")
    start_devices(options.devices)
    config = config_of(options.command, options.recipe, options.overrides)
    devices = devices_of(options)
    for name in ("rows", "valid_rows"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 1.")
    if options.figure:
        check_figure(options.figure)
        check_replaceable(options.figure, MADE_BY)
    if options.json:
        check_replaceable(options.json, '"of_bandwidth": ')
    if options.json and not Path(options.json).parent.is_dir():
        raise ValueError(f"--json {options.json}: the folder {Path(options.json).parent} does not exist; make it first.")
    plans, known = {}, {}
    print(to_yaml(config).removeprefix(MARK))  # the mark is that of a run's own file
    for name, one in arms(config).items():
        print(f"planning {name}: {len(jax.devices())} × {jax.devices()[0].device_kind}", file=sys.stderr)
        counts = {"rows": options.rows, "valid_rows": options.valid_rows}
        plans[name] = plan(one, **counts, compiles=options.compile, exact=options.exact, known=known, report=progress)
        show(plans[name], name, devices)
    if options.json:
        write_whole(options.json, json.dumps({name: as_json(one, devices) for name, one in plans.items()}, indent=1) + "\n")
    if options.figure:
        draw(plans, devices, Path(options.figure))
    return 0


def devices_of(options: argparse.Namespace) -> list[Device]:
    """The devices to compare with: those named, else this machine's; none for a CPU of which nothing is stated."""
    stated = (options.memory, options.peak, options.bandwidth)
    if options.device:
        return [own_device(*stated, device_named(name.strip())) for name in options.device.split(",")]
    here = device_of_kind(jax.devices()[0].device_kind)
    return [] if here is None and stated == (None, None, None) else [own_device(*stated, here)]


def progress(phase: Phase, program: Program) -> None:
    """Print what was compiled and how long it took."""
    depths = f" at {' and '.join(map(str, program.layers))} layers" if program.layers else ""
    print(f"  compiled {phase.title}{depths}: {program.seconds:.1f} s", file=sys.stderr, flush=True)
