"""A report: run folders → one HTML page, its figures as files, its table as Markdown. It reads folders and nothing else.

folder/report.html   folder/summary.md   folder/figures/*.svg, *.png
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxrlhf.files import REPORT_MARKS, check_replaceable, write_whole
from jaxrlhf.report.arms import Collected, collect
from jaxrlhf.report.drawing import Figure
from jaxrlhf.report.figures import DRAWINGS, draw
from jaxrlhf.report.page import markdown, missing_by_text, page
from jaxrlhf.report.runs import ReportError
from jaxrlhf.report.samples import CAP, samples_of

PAGE, TABLE, FIGURES = "report.html", "summary.md", "figures"

__all__ = ["PAGE", "Report", "ReportError", "report", "watched", "write"]


class Report(NamedTuple):
    """The contents of a report, nothing of it written yet. `missing`: what a reader should know is not there."""

    html: str
    markdown: str
    figures: list[Figure]
    missing: list[str]


def report(folders: Sequence[str | Path], *, cap: int = CAP, version: str | None = None) -> Report:
    """Read run folders and compose the report; `cap` samples of every arm and round at most.

    Raises ReportError where no folder has anything to show; what else is missing or broken is said in the page and in `missing`.
    """
    found = collect(folders)
    figures, absent = draw(found.arms)
    title, made = title_of(found), time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    html = page(title, found.arms, figures, absent, samples_of(found.arms, cap), found.problems, made=made, version=version)
    missing = [*found.problems, *(f"{names}: {said}" for said, names in missing_by_text(found.arms))]
    return Report(html, markdown(title, found.arms, found.problems), figures, missing)


def title_of(found: Collected) -> str:
    names = [folder.expanduser().resolve().name for folder in found.folders]
    return ", ".join(dict.fromkeys(names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def write(done: Report, target: Path) -> Path:
    """Write the page at `target` and the rest beside it, each file whole or as it was; its path. FileExistsError for foreign files."""
    folder = target.parent
    check_replaceable(target, *REPORT_MARKS)
    if not target.exists():
        for name in (TABLE, *(f"{FIGURES}/{figure.name}.svg" for figure in done.figures)):
            check_replaceable(folder / name, *REPORT_MARKS)
    for figure in done.figures:
        write_whole(folder / FIGURES / f"{figure.name}.svg", figure.svg)
        write_whole(folder / FIGURES / f"{figure.name}.png", figure.png)
    drawn = {figure.name for figure in done.figures}
    for name in (drawing.name for drawing in DRAWINGS if drawing.name not in drawn):  # of an earlier report
        for suffix in ("svg", "png"):
            (folder / FIGURES / f"{name}.{suffix}").unlink(missing_ok=True)
    write_whole(folder / TABLE, done.markdown)
    write_whole(target, done.html)  # last: a page that is there has its figures beside it
    return target


def watched(folders: Sequence[str | Path]) -> tuple[tuple[str, int, int], ...]:
    """What changes when a report of these folders would: names, sizes and times of the files it follows."""
    found = []
    for folder in folders:
        for pattern in ("config.yaml", "summary.json", "metrics.jsonl", "stages/*"):
            for depth in ("", "*/", "seed-*/*/"):
                for path in Path(folder).expanduser().glob(depth + pattern):
                    try:
                        facts = path.lstat()
                    except OSError:
                        continue
                    found.append((str(path), facts.st_size, facts.st_mtime_ns))
    return tuple(sorted(set(found)))
