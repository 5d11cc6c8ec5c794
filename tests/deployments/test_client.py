"""The demo's client against a server that answers from a script."""

import base64
import http.server
import threading
from collections.abc import Iterator

import pytest

from deployments.client import AnswerError, chat_body, is_healthy, stream_chat


class _Scripted(http.server.BaseHTTPRequestHandler):
    """Answers everything with the server's `script`, a status and a body, and notes what was asked for."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        self.server.keys.append(self.headers.get("authorization"))  # type: ignore[attr-defined]
        status, body = self.server.script  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Scripted) as server:
        server.paths, server.keys = [], []  # type: ignore[attr-defined]
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
        (200, b"<html>a proxy's page</html>", "ended before"),
        (200, b"data: garbage\n\n", "no event: 'garbage"),
        (200, b"data: [1]\n\n", "no event"),
        (200, b"data: \xff\xfe\n\n", "no event"),
        (200, b'data: {"error": "broken"}\n\n', "broken"),
    ],
)
def test_what_is_no_answer_is_an_error(server: http.server.HTTPServer, status: int, body: bytes, message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        _stream(server, status, body)


def test_the_address_may_have_a_path_and_no_proxy_is_asked(
    server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server.script = (200, b"data: [DONE]\n\n")  # type: ignore[attr-defined]
    for path in ("", "/", "/vision", "/vision/"):
        assert list(stream_chat(f"http://127.0.0.1:{server.server_port}{path}", {}, timeout_s=10)) == []
    prefixes = ("", "", "/vision", "/vision")
    assert server.paths == [f"{prefix}/v1/chat/completions" for prefix in prefixes]  # type: ignore[attr-defined]


def test_a_key_is_given_where_there_is_one(server: http.server.HTTPServer) -> None:
    server.script = (200, b"data: [DONE]\n\n")  # type: ignore[attr-defined]
    for key in ("a.key", None):
        list(stream_chat(f"http://127.0.0.1:{server.server_port}", {}, key=key, timeout_s=10))
    assert server.keys == ["Bearer a.key", None]  # type: ignore[attr-defined]


def test_health_is_a_200_and_nothing_else(server: http.server.HTTPServer) -> None:
    url = f"http://127.0.0.1:{server.server_port}"
    for status in (200, 503):
        server.script = (status, b"{}")  # type: ignore[attr-defined]
        assert is_healthy(url) == (status == 200)
    assert not is_healthy("http://127.0.0.1:9", timeout_s=5)


def test_no_service_is_an_error() -> None:
    with pytest.raises(AnswerError, match=r"connection to http://127\.0\.0\.1:9 failed"):
        list(stream_chat("http://127.0.0.1:9", {}, timeout_s=5))


def test_a_picture_travels_as_a_data_url() -> None:
    body = chat_body("What?", b"\x89PNG", "image/png", max_tokens=5)
    picture, text = body["messages"][0]["content"]
    assert picture["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    assert text == {"type": "text", "text": "What?"}
    assert body["max_tokens"] == 5
