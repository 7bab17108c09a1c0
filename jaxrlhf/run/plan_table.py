"""A plan as tables, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrlhf.recipe import to_mapping
from jaxrlhf.run.devices import Device
from jaxrlhf.run.plan_memory import GIB, OF_BANDWIDTH, OF_PEAK, USABLE, Planned, advice, gib, room

if TYPE_CHECKING:
    from jaxrlhf.run.plan import Plan

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#B3B3B3", "#000000", "#8C510A")


def show(plan: Plan, name: str, device: Device | None) -> None:
    """Print the plan."""
    print(f"{name} on {plan.devices} devices ({plan.compiler} compiler); sizes are of one device")
    print("\nmodel                parameters    GiB")
    for model, (parameters, size) in plan.models.items():
        print(f"{model:16} {parameters:14,} {gib(size):>6}")
    print()
    _memory(plan)
    print()
    _work(plan, device)
    for note in plan.notes:
        print(f"note: {note}")
    if device is None:
        print("\nGive --device NAME (or --memory, --peak and --bandwidth) to see what fits and how long it takes.")
        return
    _verdict(plan, device)


def _memory(plan: Plan) -> None:
    print(f"{'memory, GiB':38} {'total':>7}  of which")
    for one in plan.phases:
        largest = sorted(one.parts.items(), key=lambda part: -part[1])
        parts = ", ".join(f"{part} {gib(size)}" for part, size in largest if size > 0.01 * one.total)
        print(f"{one.phase.title:38} {gib(one.total):>7}  {parts}{_at(one)}")


def _at(one: Planned) -> str:
    return f" (extrapolated from {' and '.join(map(str, one.program.layers))} layers)" if one.program.layers else ""


def _work(plan: Plan, device: Device | None) -> None:
    print(f"{'a call, on one device':38} {'calls':>8} {'TFLOP':>9} {'GB moved':>9} {'GB sent':>8} {'compiled s':>10}", end="")
    print(f" {'seconds':>9} {'bound by':>9} {'tokens/s':>10}" if device else "")
    for one in plan.phases:
        p, calls = one.program, "?" if one.phase.calls is None else f"{one.phase.calls:,}"
        line = f"{one.phase.title:38} {calls:>8} {p.flops / 1e12:9.4g} {p.traffic / 1e9:9.4g} {p.sent / 1e9:8.3g} {p.seconds:10.1f}"
        if device:
            bounds = one.seconds(device, plan.dtype(one))
            slowest = max(bounds, key=lambda name: bounds[name])
            line += f" {bounds[slowest]:9.3g} {slowest:>9} {one.phase.tokens / max(bounds[slowest], 1e-12):10,.0f}"
        print(line)


def _verdict(plan: Plan, device: Device) -> None:
    """What fits, what helps, and how long the run takes."""
    print(
        f"\n{device.name}, published: {device.memory:g} GiB, {device.peak(plan.config.model.dtype) / 1e12:g} TFLOP/s in "
        f"{plan.config.model.dtype}, {device.bandwidth:g} GB/s, {device.link:g} GB/s to other devices. Predicted, not measured. Assumed: "
        f"{USABLE:.0%} of the memory is usable, products reach {OF_PEAK:.0%} of the peak, traffic {OF_BANDWIDTH:.0%} of the bandwidths, and "
        "the slowest of the three is the time."
    )
    tight = [one for one in plan.phases if one.total > room(device)]
    if not tight:
        print(f"fits: the largest phase needs {gib(max(one.total for one in plan.phases))} of {gib(room(device))} GiB.")
    for one in tight:
        print(f"DOES NOT FIT: {one.phase.title} needs {gib(one.total)} GiB, {gib(one.total - room(device))} more than {gib(room(device))}.")
        for tip in advice(one, device, plan.config, plan.mesh):
            print(f"  {tip.setting}: saves about {gib(tip.saves)} GiB ({tip.why})")
    seconds, unknown = plan.run_seconds(device)
    rest = f", without {', '.join(unknown)}: give --rows and --valid_rows" if unknown else ""
    print(f"the whole run: {duration(seconds)} of computing{rest}; reading, writing and compiling come on top.")


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def as_json(plan: Plan, device: Device | None) -> dict[str, Any]:
    """All figures: bytes, FLOPs and seconds."""
    phases = []
    for one in plan.phases:
        row: dict[str, Any] = {"stage": one.phase.stage, "phase": one.phase.name, "calls": one.phase.calls, "tokens": one.phase.tokens}
        row |= {"bytes": one.total, "parts": one.parts, "program": vars(one.program) | {"layers": list(one.program.layers)}}
        if device is not None:
            row |= {"seconds": one.seconds(device, plan.dtype(one)), "fits": one.total <= room(device)}
            row |= {"advice": [vars(tip) for tip in advice(one, device, plan.config, plan.mesh)] if not row["fits"] else []}
        phases.append(row)
    models = {name: {"parameters": count, "bytes": size} for name, (count, size) in plan.models.items()}
    whole = {"config": to_mapping(plan.config), "devices": plan.devices, "compiler": plan.compiler, "models": models, "phases": phases}
    whole |= {"notes": plan.notes, "assumed": {"usable": USABLE, "of_peak": OF_PEAK, "of_bandwidth": OF_BANDWIDTH}}
    if device is None:
        return whole
    seconds, unknown = plan.run_seconds(device)
    return whole | {"device": device._asdict(), "run_seconds": seconds, "not_counted": unknown}


def draw(plans: Mapping[str, Plan], device: Device | None, file: Path) -> None:
    """A bar a phase, its parts stacked, and the device's memory as a line; one panel a plan."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = FigureCanvasAgg(Figure()).get_supported_filetypes()
    if file.suffix.removeprefix(".") not in kinds:
        raise ValueError(f"--figure {file}: no picture of that kind can be written; give a name that ends in .png, .svg or .pdf.")
    names = list(dict.fromkeys(part for plan in plans.values() for one in plan.phases for part in one.parts))
    count = max(len(plan.phases) for plan in plans.values())
    canvas = Figure(figsize=(9, 1.6 + len(plans) * (0.8 + 0.28 * count)), layout="constrained")
    FigureCanvasAgg(canvas)
    for axes, (title, plan) in zip(canvas.subplots(len(plans), squeeze=False)[:, 0], plans.items(), strict=True):
        _bars(axes, plan, names)
        axes.set_title(f"{title}: memory of one of {plan.devices} devices, predicted", fontsize=10)
        if device is not None:
            axes.axvline(room(device) / GIB, color="black", linestyle="--", linewidth=1, label=f"usable, {device.name}")
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    canvas.savefig(file, dpi=150)


def _bars(axes: Any, plan: Plan, names: list[str]) -> None:
    rows = range(len(plan.phases))
    left = [0.0] * len(plan.phases)
    for number, name in enumerate(names):
        sizes = [one.parts.get(name, 0.0) / GIB for one in plan.phases]
        axes.barh(rows, sizes, left=left, label=name, color=COLOURS[number % len(COLOURS)], hatch="//" if number >= len(COLOURS) else None)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.set_yticks(rows, [one.phase.title for one in plan.phases], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
