"""The demo's client against a server that answers from a script."""

import base64
import http.server
import threading
from collections.abc import Iterator

import pytest

from deployments.client import AnswerError, chat_body, stream_chat


class _Scripted(http.server.BaseHTTPRequestHandler):
    """Answers every POST with the server's `script`: a status and a body."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        status, body = self.server.script  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Scripted) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def _stream(server: http.server.HTTPServer, status: int, body: bytes) -> list[dict]:
    server.script = (status, body)  # type: ignore[attr-defined]
    return list(stream_chat(f"http://127.0.0.1:{server.server_port}", {}, timeout_s=10))


def test_chunks_come_up_to_the_end(server: http.server.HTTPServer) -> None:
    body = b': keep-alive\n\ndata: {"a": 1}\n\ndata: {"a": 2}\n\ndata: [DONE]\n\n'
    assert _stream(server, 200, body) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, b'{"error": {"message": "bad"}}', "answered 400.*bad"),
        (200, b'data: {"error": {"message": "broken"}}\n\n', "broken"),
        (200, b'data: {"a": 1}\n\n', "ended before"),
    ],
)
def test_what_is_no_answer_is_an_error(server: http.server.HTTPServer, status: int, body: bytes, message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        _stream(server, status, body)


def test_no_service_is_an_error() -> None:
    with pytest.raises(AnswerError, match=r"connection to http://127\.0\.0\.1:9 failed"):
        list(stream_chat("http://127.0.0.1:9", {}, timeout_s=5))


def test_a_picture_travels_as_a_data_url() -> None:
    body = chat_body("What?", b"\x89PNG", "image/png", max_tokens=5)
    picture, text = body["messages"][0]["content"]
    assert picture["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    assert text == {"type": "text", "text": "What?"}
    assert body["max_tokens"] == 5
