"""HTTP with another server: connections that are kept, reopened or refused, TLS, and secrets kept out of messages."""

import asyncio
import http.server
import json
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from deployments.errors import UpstreamError, UpstreamRefusedError, UpstreamTimeoutError
from deployments.settings.upstreams import UpstreamArgs
from deployments.upstreams.exchange import Exchange
from llava_core.errors import OverloadedError
from tests.deployments.outgoing.test_fetch import _tls, serving
from tests.sockets import scripted, whole

KEY = "sk-of-the-upstream"


def _exchange(url: str = "http://gpu-1:30000/v1", *, name: str = "big", **args: Any) -> Exchange:
    settings = UpstreamArgs.model_validate({"url": url, "model": "m", **args})
    return Exchange(name, settings, key=KEY, tls=ssl.create_default_context())


async def _posted(exchange: Exchange, *, within_s: float = 20) -> bytes:
    until = asyncio.get_running_loop().time() + within_s
    async with exchange.post("/chat/completions", b"{}", "id", until=until) as response:
        return await exchange.whole(response, until=until)


def _run(exchange: Exchange, work: Callable[[Exchange], Awaitable[Any]]) -> Any:
    async def closing() -> Any:
        try:
            return await work(exchange)
        finally:
            await exchange.close()

    return asyncio.run(closing())


def test_a_request_is_sent_below_the_configured_path() -> None:
    with scripted(whole("200 OK", b"body", "content-type: text/html")) as script:
        assert _run(_exchange(f"{script.url}/proxied/v1/"), _posted) == b"body"
    [(head, body)] = script.requests
    assert head.startswith("POST /proxied/v1/chat/completions HTTP/1.1\r\n")
    assert body == b"{}"


def test_proxies_from_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with scripted(whole("200 OK", b"x")) as script:
        assert _run(_exchange(script.url), _posted) == b"x"


def test_connections_are_reused_and_bounded() -> None:
    """The server waits until the maximum number of requests is in flight, and counts connections."""
    connections: set[int] = set()
    together = threading.Barrier(3)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            connections.add(self.client_address[1])
            self.rfile.read(int(self.headers["content-length"]))
            together.wait(20)
            self.send_response(200)
            self.send_header("content-length", "1")
            self.end_headers()
            self.wfile.write(b"x")

        def log_message(self, *_: Any) -> None:
            pass

    async def six(exchange: Exchange) -> None:
        for _ in range(2):
            assert await asyncio.gather(*(_posted(exchange) for _ in range(3))) == [b"x"] * 3

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        _run(_exchange(f"http://127.0.0.1:{server.server_port}", max_requests=2), six)
        server.shutdown()
        thread.join(10)
    assert len(connections) == 3


def test_a_request_that_was_sent_is_not_retried() -> None:
    """httpx retries once; a request that was sent is never sent twice."""
    with scripted(b"", whole("200 OK", b"x")) as script:
        with pytest.raises(UpstreamError, match="broke the connection") as raised:
            _run(_exchange(script.url), _posted)
        assert raised.value.code == "upstream_cut"
        assert len(script.requests) == 1


def test_a_connection_that_failed_to_open_is_retried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []
    with scripted(whole("200 OK", b"x")) as script:
        exchange = _exchange(script.url)
        backend: Any = exchange._transport._pool._network_backend
        connect = backend.connect_tcp

        async def failing_once(*args: Any, **options: Any) -> Any:
            import httpcore

            attempts.append(args)
            if len(attempts) == 1:
                raise httpcore.ConnectError("refused")
            return await connect(*args, **options)

        monkeypatch.setattr(backend, "connect_tcp", failing_once)
        assert _run(exchange, _posted) == b"x"
    assert len(attempts) == 2


def test_a_host_that_accepts_no_connections_times_out_as_unreachable() -> None:
    # Nobody accepts connections, and the kernel's backlog is full.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening:
        address = listening.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        with pytest.raises(UpstreamError) as raised:
            _run(_exchange(f"http://127.0.0.1:{address[1]}", connect_seconds=0.2), _posted)
        for filler in fillers:
            filler.close()
    assert raised.value.code == "upstream_unreachable"


def test_a_certificate_is_accepted_only_where_it_is_trusted() -> None:
    served, trusting = _tls("localhost")
    reply = b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx"

    async def ask(tls: ssl.SSLContext) -> bytes:
        async with serving({"/v1/chat/completions": reply}, served) as server:
            settings = UpstreamArgs(url=f"https://localhost:{server.port}/v1", model="m")
            exchange = Exchange("big", settings, tls=tls)
            try:
                return await _posted(exchange)
            finally:
                await exchange.close()

    assert asyncio.run(ask(trusting)) == b"x"
    with pytest.raises(UpstreamError) as raised:
        asyncio.run(ask(ssl.create_default_context()))
    assert raised.value.code == "upstream_unreachable"


def test_an_unstreamed_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.upstreams.exchange.MAX_ANSWER_BYTES", 100)
    with (
        scripted(whole("200 OK", b"x" * 101)) as script,
        pytest.raises(UpstreamError, match="more than 100 bytes") as raised,
    ):
        _run(_exchange(script.url), _posted)
    assert raised.value.code == "upstream_invalid"


def _refusal_with(exchange: Exchange, status: int, message: str, **more: Any) -> Any:
    body = json.dumps({"error": {"message": message, **more}}).encode()
    return exchange.refusal(status, body)


def test_the_servers_messages_reveal_neither_key_address_nor_model_name() -> None:
    exchange = _exchange("http://gpu-1.internal:30000/v1")
    message = f"model m at gpu-1.internal:30000 (http://gpu-1.internal:30000/v1) with {KEY}: max_tokens of /m/x.json"
    error = _refusal_with(exchange, 400, message, param="m", code="invalid_value")
    assert isinstance(error, UpstreamRefusedError)
    assert error.message == "model big at the server (an address) with ***: max_tokens of big"
    assert (error.param, error.code) == ("big", "invalid_value")


def test_what_the_server_wrote_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It may quote the prompt, or be made to look like further lines of the log."""
    exchange = _exchange()
    for status in (400, 429, 500):
        _refusal_with(exchange, status, "a private matter\nWARNING forged", code="context_length_exceeded")
        _refusal_with(exchange, status, "x", code="a private matter\nWARNING forged", param="private")
    where = "model big: its server at http://gpu-1:30000/v1 answered"
    assert [record.getMessage() for record in caplog.records] == [
        f"{where} {status}{code}" for status in (400, 429, 500) for code in (" with context_length_exceeded", "")
    ]


@pytest.mark.parametrize(
    "answered",
    [
        b"a private matter\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\na private matter\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: a private matter\r\ncontent-length: 0\r\n\r\n",
    ],
    ids=["no HTTP", "no chunk", "no media type"],
)
def test_invalid_http_is_not_logged_either(answered: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def read(exchange: Exchange) -> None:
        until = asyncio.get_running_loop().time() + 20
        async with exchange.post("/chat/completions", b"{}", "id", until=until) as response:
            if response.headers.get("content-type"):
                await anext(exchange.events(response))
            await exchange.whole(response, until=until)

    with scripted(answered) as script:
        with pytest.raises(UpstreamError) as raised:
            _run(_exchange(script.url), read)
        assert f"model big: its server at {script.url} " in caplog.text
    assert "private" not in caplog.text + str(raised.value)


def test_long_messages_of_the_server_are_truncated() -> None:
    assert len(_refusal_with(_exchange(), 400, "x" * 10_000).message) == 1000


@pytest.mark.parametrize(
    ("retry_after", "seconds"), [(None, None), ("7", 7), ("0", 1), ("999999", 3600), ("soon", None), ("-5", None)]
)
def test_retry_after_is_passed_on_within_bounds(retry_after: str | None, seconds: int | None) -> None:
    full = _exchange().refusal(429, b"", retry_after)
    assert isinstance(full, OverloadedError)
    assert full.retry_after_s == (seconds or 1)
    broken = _exchange().refusal(503, b"", retry_after)
    assert isinstance(broken, UpstreamError)
    assert broken.retry_after_s == seconds


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, UpstreamRefusedError, "upstream_refused"),
        (409, UpstreamRefusedError, "upstream_refused"),
        (413, UpstreamRefusedError, "upstream_refused"),
        (422, UpstreamRefusedError, "upstream_refused"),
        (204, UpstreamError, "upstream_failed"),
        (302, UpstreamError, "upstream_failed"),
        (401, UpstreamError, "upstream_key_refused"),
        (403, UpstreamError, "upstream_key_refused"),
        (404, UpstreamError, "upstream_failed"),
        (405, UpstreamError, "upstream_failed"),
        (408, UpstreamTimeoutError, "upstream_timeout"),
        (418, UpstreamError, "upstream_failed"),
        (500, UpstreamError, "upstream_failed"),
        (504, UpstreamTimeoutError, "upstream_timeout"),
        (999, UpstreamError, "upstream_failed"),
    ],
)
def test_only_the_clients_own_mistakes_are_reported_as_such(status: int, kind: type, code: str) -> None:
    error = _refusal_with(_exchange(), status, "why", code="their_own")
    assert type(error) is kind
    assert error.code == code
    assert getattr(error, "status", status) == status


def test_a_body_is_read_up_to_a_limit() -> None:
    async def read(exchange: Exchange) -> tuple[int, bytes | None]:
        return await exchange.get("/models", within_s=20, max_bytes=3)

    with scripted(whole("200 OK", b"abc"), whole("404 No", b"abcd")) as script:
        assert _run(_exchange(script.url), read) == (200, b"abc")
        assert _run(_exchange(script.url), read) == (404, None)
