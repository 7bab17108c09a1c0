"""A page that is kept fresh, served on this machine alone."""

import hashlib
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

from jaxrlhf.report.build import PAGE, report, watched
from jaxrlhf.report.runs import ReportError
from jaxrlhf.report.samples import CAP

HOST, PORT = "127.0.0.1", 8765
CONNECTIONS = 32  # at a time: a further one takes the place of the oldest, so that those who never end keep nobody out
PATIENCE = 10.0  # seconds that a client may be silent, and that it has to take the answer


class Server(ThreadingHTTPServer):
    """A server that slow, silent and vanished clients can neither fill nor make talk."""

    def __init__(self, *args: Any):
        self._open: dict[Any, None] = {}  # connections, the oldest first
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        for oldest in list(self._open)[: max(0, len(self._open) + 1 - CONNECTIONS)]:
            self._open.pop(oldest, None)
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # its thread reads the end of it, and ends
        self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that is gone is no error
            super().handle_error(request, client_address)


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
    from jaxrlhf.report.page import page

    return page("Nothing to show yet", [], [], [], ({"columns": [], "arms": [], "rows": []}, ""), [said], made="just now", version=version)


def server_of(folders: Sequence[str], port: int, *, cap: int = CAP) -> Server:
    """A server on the loopback address: / is the page, /version what it is asked whether it has changed. Port 0 takes a free one."""
    live = Live(folders, cap)

    class Handler(BaseHTTPRequestHandler):
        timeout = PATIENCE

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
        return Server((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise ReportError(f"port {port} of {HOST} cannot be used ({error}); give another: --serve {PORT + 1}.") from error


def serve(folders: Sequence[str], port: int, *, cap: int = CAP) -> int:
    with server_of(folders, port, cap=cap) as server:
        print(f"report: http://{HOST}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    return 0
