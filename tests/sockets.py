"""Servers for tests of clients: an ASGI app behind uvicorn, and a server that replies with scripted bytes."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from deployments.gateway import Gateway
from tests.deployments.fakes import ScriptedEngine, all_ready

SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@contextlib.contextmanager
def serving_app(app: Any, *, port: int = 0) -> Iterator[str]:
    """Run an app in a real server on a thread; yields its address."""
    listening = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        # Connections that stay open are cut off.
        server.should_exit = server.force_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextlib.contextmanager
def serving_engine(engine: ScriptedEngine, *, port: int = 0, **options: Any) -> Iterator[str]:
    """Run the real gateway in front of scripted answers; yields its address."""
    with serving_app(Gateway({"m": engine}, **{"check_stages": all_ready, **options}).app, port=port) as url:
        yield url


def chunked(data: bytes) -> bytes:
    """Return one chunk of a chunked HTTP body."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def whole(status: str, body: bytes, *headers: str) -> bytes:
    """Return a complete response, after which the connection is closed."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Script:
    """What a scripted server has received: one head and body per connection."""

    url: str
    requests: list[tuple[str, bytes]] = field(default_factory=list)


@contextlib.contextmanager
def scripted(*responses: bytes | Callable[[socket.socket], None]) -> Iterator[Script]:
    """A server that answers one connection after the other with these bytes and closes it; the last one for ever.

    A response may be a function instead, which does with the connection what it likes.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        script = Script(f"http://127.0.0.1:{listening.getsockname()[1]}")
        thread = threading.Thread(target=_answer_all, args=(listening, script, responses), daemon=True)
        thread.start()
        yield script
        # Wakes up the thread that waits for a connection.
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        assert not thread.is_alive()


def _answer_all(listening: socket.socket, script: Script, responses: Any) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection:
            response = responses[min(len(script.requests), len(responses) - 1)]
            script.requests.append(_read_request(connection))
            # The client may have disconnected.
            with contextlib.suppress(OSError):
                if callable(response):
                    response(connection)
                else:
                    connection.sendall(response)


def _read_request(connection: socket.socket) -> tuple[str, bytes]:
    connection.settimeout(30)
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    lengths = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    while lengths and len(body) < int(lengths[0]):
        body += connection.recv(65536)
    return head.decode(), body
