"""A worker that behaves like LLaVA's own: registers with its controller, sends heartbeats, answers in frames.

Written from the protocol, with none of the service's code. It can also be told to misbehave.
"""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import requests

END = b"\0"
# What it writes, from the status of its response on: pieces of bytes; None waits for the end of the test.
Script = Callable[[dict[str, Any]], Iterable[bytes | None]]


def words(*given: str) -> Script:
    """Return the script of a good answer."""

    def script(body: dict[str, Any]) -> list[bytes | None]:
        text, pieces = body["prompt"], []
        for word in given:
            text += word
            pieces.append(json.dumps({"text": text, "error_code": 0}).encode() + END)
        return pieces

    return script


@dataclass
class OriginalWorker:
    """`status` is what it reports, `script` how it answers. `asked` holds the requests for answers."""

    url: str
    status: Any
    script: Script
    http_status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    num_status: int = 0
    hung_up: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def register(self, controller: str, *, check_heart_beat: bool = True, **options: Any) -> None:
        body = {"worker_name": self.url, "check_heart_beat": check_heart_beat, "worker_status": self.status}
        response = requests.post(f"{controller}/register_worker", json=body, timeout=30, **options)
        assert response.status_code == 200, response.text

    def heart_beat(self, controller: str, **options: Any) -> bool:
        body = {"worker_name": self.url, "queue_length": self.status["queue_length"]}
        return requests.post(f"{controller}/receive_heart_beat", json=body, timeout=5, **options).json()["exist"]


@contextlib.contextmanager
def original_worker(script: Script | None = None, *, model: str = "llava-other") -> Iterator[OriginalWorker]:
    """Yield a worker that listens on the loopback interface until the block ends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(worker.http_status)
            for name, value in worker.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.path == "/worker_get_status":
                worker.num_status += 1
                self.wfile.write(json.dumps(worker.status).encode())
                return
            assert self.path == "/worker_generate_stream"
            worker.asked.append(json.loads(body))
            try:
                for piece in worker.script(worker.asked[-1]):
                    if piece is None:
                        # Ends when the client hangs up.
                        self.connection.settimeout(0.05)
                        while not worker.ended.is_set():
                            with contextlib.suppress(TimeoutError):
                                if not self.connection.recv(1):
                                    worker.hung_up.set()
                                    return
                        return
                    self.wfile.write(piece)
                    self.wfile.flush()
            except OSError:
                worker.hung_up.set()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        status = {"model_names": [model], "speed": 1, "queue_length": 0}
        worker = OriginalWorker(f"http://127.0.0.1:{server.server_port}", status, script or words(" Hel", "lo"))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield worker
        finally:
            worker.ended.set()
            server.shutdown()
            thread.join()
