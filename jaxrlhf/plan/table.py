"""A plan as tables, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrlhf.formatting import format_duration
from jaxrlhf.plan.devices import Device
from jaxrlhf.plan.memory import GIB, OF_BANDWIDTH, OF_PEAK, USABLE, Planned, advice, gib, room
from jaxrlhf.recipe import to_mapping

if TYPE_CHECKING:
    from jaxrlhf.plan.plan import Plan

MADE_BY = "jaxrlhf plan"  # in the pictures; one without is another's, and is not written over
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#B3B3B3", "#000000", "#8C510A")


def show(plan: Plan, name: str, devices: Sequence[Device]) -> None:
    """Print the plan, with what each of `devices` makes of it."""
    by = "counted by formula, not compiled" if plan.compiler is None else f"compiled for {plan.compiler}"
    print(f"{name} on {plan.devices} device{'s' * (plan.devices > 1)}, {by}; sizes are of one device")
    print("\nmodel                parameters    GiB")
    for model, (parameters, size) in plan.models.items():
        print(f"{model:16} {parameters:14,} {gib(size):>6}")
    print()
    _memory(plan)
    print()
    _work(plan)
    if plan.compiler is not None:
        print()
        _beside(plan)
    for note in plan.notes:
        print(f"note: {note}")
    if not devices:
        print("\nGive --device NAME (or --memory, --peak and --bandwidth) to see what fits and how long it takes.")
        return
    print(
        f"\nPredicted, not measured. Assumed: {USABLE:.0%} of the memory is usable, products of matrices reach {OF_PEAK:.0%} of the peak "
        f"and traffic {OF_BANDWIDTH:.0%} of the bandwidths, and the slowest of the three is the time. On GPUs jax takes 75 % of the memory "
        f"unless it is told more: XLA_PYTHON_CLIENT_MEM_FRACTION={USABLE:g}."
    )
    for device in devices:
        _verdict(plan, device)


def _memory(plan: Plan) -> None:
    print(f"{'memory, GiB':38} {'total':>7}  of which")
    for one in plan.phases:
        largest = sorted(one.parts.items(), key=lambda part: -part[1])
        parts = ", ".join(f"{part} {gib(size)}" for part, size in largest if size > 0.01 * one.total)
        print(f"{one.phase.title:38} {gib(one.total):>7}  {parts}{_at(one)}")


def _at(one: Planned) -> str:
    return f" (extrapolated from {' and '.join(map(str, one.program.layers))} layers)" if one.program.layers else ""


def _work(plan: Plan) -> None:
    print(f"{'a call, on one device':38} {'calls':>8} {'TFLOP':>9} {'GB moved':>9} {'GB sent':>8}")
    for one in plan.phases:
        p, calls = one.program, "?" if one.phase.calls is None else f"{one.phase.calls:,}"
        print(f"{one.phase.title:38} {calls:>8} {p.flops / 1e12:9.4g} {p.traffic / 1e9:9.4g} {p.sent / 1e9:8.3g}")


def _beside(plan: Plan) -> None:
    """The formulas' figures over the compiler's."""
    print(f"{'formula / compiler':38} {'temporaries':>11} {'TFLOP':>9} {'GB moved':>9} {'GB sent':>8} {'compiled in s':>14}")
    for one in plan.phases:
        pairs = [(getattr(one.counted, name), getattr(one.program, name)) for name in ("temp", "flops", "traffic", "sent")]
        temp, flops, traffic, sent = (f"{formula / said:.2f}" if said else "-" for formula, said in pairs)
        print(f"{one.phase.title:38} {temp:>11} {flops:>9} {traffic:>9} {sent:>8} {one.program.seconds:14.1f}")


def _verdict(plan: Plan, device: Device) -> None:
    """How long every phase takes, what does not fit and what helps."""
    dtype = next((plan.dtype(one) for one in plan.phases if one.phase.name != "gold scores"), plan.config.model.dtype)
    peak = device.peak(dtype) / 1e12
    print(
        f"\n{device.name}, published: {device.memory:g} GiB, {peak:g} TFLOP/s in {dtype}, {device.bandwidth:g} GB/s, "
        f"{device.link:g} GB/s to other devices"
    )
    print(f"{'':38} {'seconds':>9} {'bound by':>9} {'tokens/s':>11} {'GiB':>7}")
    for one in plan.phases:
        bounds = one.seconds(device, plan.dtype(one))
        slowest = max(bounds, key=lambda name: bounds[name])
        pace = one.phase.tokens / max(bounds[slowest], 1e-12)
        verdict = {True: "", None: "  may not fit", False: "  does not fit"}[fits(plan, one, device)]
        print(f"{one.phase.title:38} {bounds[slowest]:9.3g} {slowest:>9} {pace:11,.0f} {gib(one.total):>7}{verdict}")
    tight = [one for one in plan.phases if one.total > room(device)]
    if not tight:
        print(f"fits: the largest phase needs {gib(max(one.total for one in plan.phases))} of {gib(room(device))} GiB.")
    for one in tight:
        needs = f"{one.phase.title} needs {gib(one.total)} GiB, {gib(one.total - room(device))} more than {gib(room(device))}"
        at_most = fits(plan, one, device) is None
        print(f"MAY NOT FIT: {needs}, at most: those are a CPU's activations." if at_most else f"DOES NOT FIT: {needs}.")
        for tip in advice(one, device, plan.config, plan.mesh):
            print(f"  {tip.setting}: saves about {gib(tip.saves)} GiB ({tip.why})")
    seconds, unknown = plan.run_seconds(device)
    rest = f", without {', '.join(unknown)}: give --rows and --valid_rows" if unknown else ""
    print(f"the whole run: {format_duration(seconds)} of computing{rest}; reading, writing and compiling come on top.")


def fits(plan: Plan, one: Planned, device: Device) -> bool | None:
    """Whether a phase has room on a device; None where it is too large only by activations that are counted, or compiled, as a CPU's."""
    if one.total <= room(device):
        return True
    larger = plan.compiler is None or (plan.compiler == "cpu" and plan.config.model.dtype == "bfloat16")
    return None if larger and one.total - one.parts["activations"] < room(device) else False


def as_json(plan: Plan, devices: Sequence[Device]) -> dict[str, Any]:
    """All figures: bytes, FLOPs and seconds."""
    models = {name: {"parameters": count, "bytes": size} for name, (count, size) in plan.models.items()}
    whole = {"config": to_mapping(plan.config), "devices": plan.devices, "compiler": plan.compiler, "models": models}
    whole |= {"notes": plan.notes, "assumed": {"usable": USABLE, "of_peak": OF_PEAK, "of_bandwidth": OF_BANDWIDTH}}
    whole["phases"] = [
        {"stage": one.phase.stage, "phase": one.phase.name, "calls": one.phase.calls, "tokens": one.phase.tokens, "bytes": one.total}
        | {"parts": one.parts, "program": vars(one.program) | {"layers": list(one.program.layers)}}
        | ({} if one.counted is None else {"formula": vars(one.counted) | {"layers": []}})
        for one in plan.phases
    ]
    return whole | {"on": [_on(plan, device) for device in devices]}


def _on(plan: Plan, device: Device) -> dict[str, Any]:
    seconds, unknown = plan.run_seconds(device)
    phases = [
        {
            "phase": one.phase.title,
            "seconds": one.seconds(device, plan.dtype(one)),
            "fits": fits(plan, one, device),
            "advice": [vars(tip) for tip in advice(one, device, plan.config, plan.mesh)] if one.total > room(device) else [],
        }
        for one in plan.phases
    ]
    return {"device": device._asdict(), "run_seconds": seconds, "not_counted": unknown, "phases": phases}


def check_figure(file: str) -> None:
    """ValueError for a name whose ending is no kind of picture."""
    if Path(file).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--figure {file}: no picture of that kind can be written; give a name that ends in .png, .svg or .pdf.")
    if not Path(file).parent.is_dir():
        raise ValueError(f"--figure {file}: there is no folder {Path(file).parent}; make it first.")


def draw(plans: Mapping[str, Plan], devices: Sequence[Device], file: Path) -> None:
    """A bar a phase, its parts stacked, and each device's memory as a line; one panel a plan."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(part for plan in plans.values() for one in plan.phases for part in one.parts))
    count = max(len(plan.phases) for plan in plans.values())
    canvas = Figure(figsize=(9, 1.6 + len(plans) * (0.8 + 0.28 * count)), layout="constrained")
    FigureCanvasAgg(canvas)
    for axes, (title, plan) in zip(canvas.subplots(len(plans), squeeze=False)[:, 0], plans.items(), strict=True):
        _bars(axes, plan, names)
        axes.set_title(f"{title}: memory of one of {plan.devices} devices, predicted", fontsize=10)
        for number, device in enumerate(devices):
            style = {"color": "black", "linestyle": ("--", ":", "-.")[number % 3], "linewidth": 1}
            axes.axvline(room(device) / GIB, label=f"usable, {device.name}", **style)
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    canvas.savefig(file, dpi=150, metadata={"Software" if file.suffix == ".png" else "Creator": MADE_BY})


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
