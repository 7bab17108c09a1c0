"""`jaxrlhf report`: the page of one or several run folders, written once or served fresh on this machine alone."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from jaxrlhf.evaluation.report import PAGE, ReportError, report, watched, write
from jaxrlhf.evaluation.report_samples import CAP
from jaxrlhf.storage.remote import as_path, is_url
from jaxrlhf.storage.run_folder import fetch_run, publish, put_report

HOST, PORT = "127.0.0.1", 8765


def write_report(folder: str | Path) -> Path | None:
    """Write the report of a run that has just finished; its path. None, with a message on standard error, where that fails.

    The run is done and its folder is whole: no fault in drawing a page may turn it into a failure.
    """
    try:
        page = write(report([folder]), Path(folder) / PAGE)
        publish(Path(folder))
        return page
    except Exception as error:
        print(f"jaxrlhf: the report was not written ({type(error).__name__}: {error}); the run is whole: try jaxrlhf report {folder}",
              file=sys.stderr)  # fmt: skip
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "One self-contained page of runs: table, figures, samples, config and lineage; PNG and SVG figures beside it."
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, of a run with arms, or of a sweep; several side by side")
    parser.add_argument("--output", help="file (….html) or folder to write to; default: report.html in the first RUN")
    parser.add_argument("--samples", type=int, default=CAP, help=f"rows of every arm and round in the sample table (default {CAP})")
    parser.add_argument("--serve", nargs="?", type=int, const=PORT, metavar="PORT", help=f"keep it fresh on http://{HOST}:{PORT}, "
                        "for nobody but this machine")  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """Write the report and print where it is, or serve it until interrupted. Raises ReportError where there is nothing to show."""
    if options.samples < 0:
        raise ReportError(f"--samples {options.samples}: give how many rows at most, 0 or more.")
    if options.serve is not None:
        if any(is_url(run) for run in options.runs):
            raise ReportError("--serve follows folders of this machine; leave it out for a run at a URL.")
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


def target_of(output: str | None, first: Path) -> Path:
    if output is None:
        if not first.is_dir():
            raise ReportError(f"{first} is no folder to write {PAGE} into; name another with --output.")
        return first / PAGE
    path = Path(output).expanduser()
    target = path if path.suffix.lower() in (".html", ".htm") else path / PAGE
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


class Live:
    """The page of run folders, made anew when they have changed since it was last made."""

    def __init__(self, folders: Sequence[str], cap: int = CAP):
        self._folders, self._cap, self._lock = folders, cap, Lock()
        self._seen: object = None
        self._html = ""

    @property
    def version(self) -> str:
        """Changes when the folders do."""
        return hashlib.sha256(repr(watched(self._folders)).encode()).hexdigest()[:16]

    def page(self) -> str:
        with self._lock:
            version = self.version
            if version != self._seen:
                try:
                    self._html = report(self._folders, cap=self._cap, version=version).html
                except Exception as error:  # of whatever kind: a reader who has the page open is told, and it is tried again
                    said = str(error) if isinstance(error, ReportError) else f"the page cannot be made ({type(error).__name__}: {error})"
                    self._html = _waiting(said, version)
                self._seen = version
            return self._html


def _waiting(said: str, version: str) -> str:
    """A page that says what is missing and asks again."""
    from jaxrlhf.evaluation.report_page import page

    return page("Nothing to show yet", [], [], [], ({"columns": [], "arms": [], "rows": []}, ""), [said], made="just now", version=version)


def server_of(folders: Sequence[str], port: int, *, cap: int = CAP) -> ThreadingHTTPServer:
    """A server on the loopback address: / is the page, /version what it is asked whether it has changed. Port 0 takes a free one."""
    live = Live(folders, cap)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another origin can make a browser ask under a name of its own that leads here; ours answers to its own alone.
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in (HOST, "localhost"):
                self._send(403, "text/plain", "this page is for 127.0.0.1 and localhost only\n")
            elif self.path == "/version":
                self._send(200, "text/plain", live.version)
            elif self.path in ("/", f"/{PAGE}"):
                self._send(200, "text/html", live.page())
            else:
                self._send(404, "text/plain", "not here\n")

        def _send(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            for name, value in (
                ("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY"),
            ):  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            del format, args  # every three seconds a line would be no news

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise ReportError(f"port {port} of {HOST} cannot be used ({error}); give another: --serve {PORT + 1}.") from error


def serve(folders: Sequence[str], port: int, *, cap: int = CAP) -> int:
    with server_of(folders, port, cap=cap) as server:
        print(f"report: http://{HOST}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    return 0
