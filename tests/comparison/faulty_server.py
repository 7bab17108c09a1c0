"""An endpoint of chat completions on loopback that is often at fault, and counts what it was asked."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Bodies under status 200 that are JSON and no completion.
MALFORMED = {
    "error": {"error": {"message": "upstream is overloaded", "code": 502}},
    "no message": {"choices": [{"index": 0}]},
    "no choice": {"choices": [], "usage": None},
    "choices in a word": {"choices": "x", "usage": {}},
    "null choices": {"choices": None},
    "choice in a word": {"choices": ["x"]},
    "null message": {"choices": [{"index": 0, "message": None}]},
    "no content": {"choices": [{"index": 0, "message": {"role": "assistant"}}]},
    "number": {"choices": [{"index": 0, "message": {"role": "assistant", "content": 7}}]},
    "no text": {"choices": [{"index": 0, "message": {"role": "assistant", "content": [{"type": "image_url"}]}}]},
    "failed choice": {"choices": [{"index": 0, "error": {"code": 502}, "message": {"role": "assistant", "content": ""}}]},
    "list": [],
    "null": None,
}
FAULTS = {
    "429": 0.1,
    "500": 0.05,
    "503": 0.05,
    "nonsense": 0.1,
    "silent": 0.02,
    "cut": 0.03,
    "page": 0.03,
    "error": 0.04,
    "no message": 0.04,
}


class FaultyServer(ThreadingHTTPServer):
    """`verdict(content)` is the honest answer to a question; `faults` are the shares of answers that are something else."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, verdict: Callable[[str], str], faults: dict[str, float] | None = None, *, silence: float = 1.0, delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.verdict, self.faults, self.silence, self.delay = verdict, faults or {}, silence, delay
        self.random, self.lock = random.Random(0), threading.Lock()
        self.odd: dict[str, object] = {}  # fields of an honest reply that are something else
        self.asked: Counter[str] = Counter()  # question -> honest answers sent
        self.fates: Counter[str] = Counter()
        self.bodies: list[dict] = []
        self.keys: set[str] = set()
        self.in_flight = self.most_in_flight = 0
        self.trickled = 0  # bytes of the last reply that trickles

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that was killed

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        content = body["messages"][0]["content"]
        with server.lock:
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            server.bodies.append(body)
            server.keys.add(self.headers.get("authorization", ""))
            draw, fate = server.random.random(), "honest"
            for name, share in server.faults.items():
                draw -= share
                if draw < 0:
                    fate = name
                    break
            server.fates[fate] += 1
        try:
            time.sleep(server.delay)
            self.answer(fate, content)
        finally:
            with server.lock:
                server.in_flight -= 1

    def answer(self, fate: str, content: str):
        if fate == "silent":
            time.sleep(self.server.silence)
            self.close_connection = True
            return
        if fate.isdigit():
            key = self.headers.get("authorization", "").removeprefix("Bearer ")
            self.send(
                int(fate), json.dumps({"error": {"message": f"{fate} for key {key}"}}), {"retry-after": "0.01"} if fate == "429" else {}
            )
            return
        if fate == "trickle":
            self.send(200, " " * 1000, kind=fate)
            return
        if fate == "page":
            self.send(200, "<html>out of order</html>", kind="text/html")
            return
        if fate in MALFORMED:
            self.send(200, json.dumps(MALFORMED[fate]))
            return
        text = "I would rather not say." if fate == "nonsense" else self.server.verdict(content)
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 3, "total_tokens": 103},
        } | self.server.odd
        text = json.dumps(reply)
        if fate == "honest":
            with self.server.lock:
                self.server.asked[content] += 1
        self.send(200, text[: len(text) // 2] if fate == "cut" else text)

    def send(self, status: int, text: str, headers: dict[str, str] | None = None, kind: str = "application/json"):
        data = text.encode()
        if kind == "trickle":
            self.trickle(data)
            return
        self.send_response(status)
        for name, value in ({"content-type": kind, "content-length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def trickle(self, data: bytes):
        """A byte every twentieth of a second: no single read ever times out."""
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        for n in range(len(data)):
            self.wfile.write(data[n : n + 1])
            self.server.trickled = n + 1
            time.sleep(0.05)
