"""`jaxrlhf report`: write the page of one or several run folders, or serve it on this machine and keep it up to date."""

import argparse
import sys
from pathlib import Path

from jaxrlhf.report.build import FIGURES, PAGE, TABLE, report, write
from jaxrlhf.report.runs import ReportError
from jaxrlhf.report.samples import CAP
from jaxrlhf.report.server import HOST, PORT, serve
from jaxrlhf.storage.copies import files_in
from jaxrlhf.storage.remote import as_path, is_url, join, put_file
from jaxrlhf.storage.run_folder import fetch_run, publish


def write_report(folder: str | Path) -> Path | None:
    """Write the report of a run that has just finished; its path, or None with a message on standard error.

    The run itself is finished, so an error in its report must not turn it into a failure.
    """
    try:
        page = write(report([folder]), Path(folder) / PAGE)
        publish(Path(folder))
        return page
    except Exception as error:
        print(f"jaxrlhf: the report was not written ({type(error).__name__}: {error}); the run is complete: try jaxrlhf report {folder}",
              file=sys.stderr)  # fmt: skip
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write one self-contained page of runs (table, figures, samples, config, lineage), and PNG and SVG figures beside it."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, of a run with arms, or of a sweep; several side by side")
    parser.add_argument("--output", help="file (….html) or folder to write to; default: report.html in the first RUN")
    parser.add_argument("--samples", type=int, default=CAP, help=f"rows of every arm and round in the sample table (default {CAP})")
    parser.add_argument("--serve", nargs="?", type=int, const=PORT, metavar="PORT", help=f"serve it on http://{HOST}:{PORT}, "
                        "up to date, for this machine only")  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """Write the report and print where it is, or serve it until interrupted. Raises ReportError where there is nothing to show."""
    if options.samples < 0:
        raise ReportError(f"--samples {options.samples}: give a number of rows, at least 0.")
    if options.serve is not None:
        if any(is_url(run) for run in options.runs):
            raise ReportError("--serve reads folders of this machine; leave it out for a run at a URL.")
        return serve(options.runs, options.serve, cap=options.samples)
    runs = [fetch_run(run) if is_url(run) else as_path(run).expanduser() for run in options.runs]
    done = report(runs, cap=options.samples)
    target = target_of(options.output, runs[0])
    for line in done.missing:
        print(f"jaxrlhf: {line}", file=sys.stderr)
    print(f"report: {write(done, target)}")
    if is_url(options.runs[0]) and options.output is None:
        print(f"report: {put_report(options.runs[0], target)}")
    return 0


def put_report(url: str, page: Path) -> str:
    """Upload the report of `fetch_run(url)` to the run: the page, its table and its figures. The page's URL."""
    figures = [f"{FIGURES}/{name}" for name in files_in(page.parent / FIGURES)]
    for name in (TABLE, *figures, page.name):
        put_file(page.parent / name, join(url, name))
    return join(url, page.name)


def target_of(output: str | None, first: Path) -> Path:
    if output is None:
        if not first.is_dir():
            raise ReportError(f"{first} is not a folder; name one for {PAGE} with --output.")
        return first / PAGE
    path = Path(output).expanduser()
    target = path if path.suffix.lower() in (".html", ".htm") else path / PAGE
    target.parent.mkdir(parents=True, exist_ok=True)
    return target
