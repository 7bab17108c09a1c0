"""Open what shows metrics beside metrics.jsonl: the progress bar, TensorBoard, W&B."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def brief(numbers: Mapping[str, Any]) -> str:
    """The first three losses, scores and KLs (or metrics), for the progress bar."""
    chosen = [name for name in numbers if name.startswith(("loss/", "rollout/score", "rollout/kl"))] or list(numbers)
    shown = [f"{name} {numbers[name]:.4g}" for name in chosen if isinstance(numbers[name], int | float)]
    return "  ".join(shown[:3])


def title_of(name: str, round: int | None) -> str:
    return name if round is None else f"{name}-r{round}"


def open_bar(console: Console, title: str, total: int | None, start: int) -> tuple[Progress, Any]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    fields = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("phase", "speed", "metrics")]
    bar = Progress(*columns, *fields, console=console, refresh_per_second=4)
    bar.start()
    return bar, bar.add_task(title, total=total, completed=start, phase="", speed="", metrics="")


def open_tensorboard(folder: Path | None, name: str, round: int | None, start: int) -> Any:
    """A TensorBoard run for each stage, so that the rounds of a metric share a plot; steps after `start` are purged."""
    from tensorboardX import SummaryWriter

    assert folder is not None
    return SummaryWriter(str(folder / "tensorboard" / title_of(name, round)), purge_step=start + 1)


def open_wandb(folder: Path, arguments: dict[str, Any]) -> Any:
    """A W&B run that a resumed run continues: its id is kept in the run folder. Each stage has its own step axis."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("logging to W&B needs the package wandb: pip install 'jaxrlhf[wandb]', or leave log.wandb out.") from error
    kept = folder / "wandb_id"
    if kept.exists():
        arguments = {"id": kept.read_text(errors="ignore").strip(), "resume": "allow", **arguments}
    run = wandb.init(dir=str(folder), **arguments)
    kept.write_text(f"{run.id}\n")
    return run
