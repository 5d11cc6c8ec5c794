"""Requests that a real HAProxy and the server behind it might parse differently: hidden routes stay hidden.

Behind it is the HTTP server that replicas run. A request that reaches it without HAProxy's check would be smuggled.
"""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from deployments.launch.load_balancer import LoadBalancer, local_host
from tests.deployments.service import until

# HAProxy itself responds to this with 404; the server behind it would serve the path.
HIDDEN = b"GET /-/routes HTTP/1.1\r\nhost: x\r\nx-hidden: 1\r\n\r\n"
END_OF_CHUNKS = b"0\r\n\r\n"


@dataclass
class Replica:
    """Remembers every request except HAProxy's own health checks."""

    requests: list[tuple[str, list[tuple[bytes, bytes]]]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        names = {name for name, _ in scope["headers"]}
        if scope["path"] != "/-/routes" or b"x-hidden" in names or b"x-request-id" in names:
            self.requests.append((scope["path"], list(scope["headers"])))
        answer = json.dumps({"/": "llava"}).encode()
        headers = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[LoadBalancer, Replica]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    replica = Replica()
    listening = socket.create_server((local_host(port), 0))
    server = uvicorn.Server(uvicorn.Config(replica, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    balancer = LoadBalancer(("127.0.0.1", port), local_host(port), [listening.getsockname()[1]], "llava")
    balancer.start()
    until(
        lambda: _sent(balancer, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").startswith(b"HTTP/1.1 200")
    )
    yield balancer, replica
    balancer.stop()
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def _sent(balancer: LoadBalancer, request: bytes) -> bytes:
    """Return everything that arrives until HAProxy closes the connection."""
    with socket.create_connection(balancer.address, timeout=10) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def _post(*headers: bytes, body: bytes) -> bytes:
    return b"\r\n".join([b"POST /a HTTP/1.1", b"host: x", b"connection: close", *headers, b"", b""]) + body


CL, TE = b"content-length: %d", b"transfer-encoding: chunked"
AMBIGUOUS = {
    "CL.TE": _post(CL % (len(END_OF_CHUNKS) + len(HIDDEN)), TE, body=END_OF_CHUNKS + HIDDEN),
    "TE.CL": _post(TE, CL % 4, body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)),
    "two different lengths": _post(CL % 0, CL % len(HIDDEN), body=HIDDEN),
    "the same length twice": _post(CL % 0, CL % 0, body=HIDDEN),
    "lengths in a list": _post(b"content-length: 0, %d" % len(HIDDEN), body=HIDDEN),
    "a length with a sign": _post(b"content-length: +0", body=HIDDEN),
    "a negative length": _post(b"content-length: -1", body=HIDDEN),
    "a hexadecimal length": _post(b"content-length: 0x10", body=HIDDEN),
    "space before the colon": _post(b"transfer-encoding : chunked", body=END_OF_CHUNKS + HIDDEN),
    "chunked not the last": _post(b"transfer-encoding: chunked, identity", body=END_OF_CHUNKS + HIDDEN),
    "chunked twice": _post(b"transfer-encoding: chunked, chunked", body=END_OF_CHUNKS + HIDDEN),
    "chunked misspelled": _post(b"transfer-encoding: \x0bchunked", body=END_OF_CHUNKS + HIDDEN),
    "a folded header": _post(b"x: y\r\n transfer-encoding: chunked", CL % 0, body=HIDDEN),
    "a bare LF": _post(b"x: y\ntransfer-encoding: chunked", CL % 0, body=HIDDEN),
    "a bare CR": _post(b"x: y\rtransfer-encoding: chunked", CL % 0, body=HIDDEN),
    "NUL in a value": _post(b"x: a\0b", CL % 0, body=HIDDEN),
    "NUL in a name": _post(b"x\0: a", CL % 0, body=HIDDEN),
    "a chunk without a valid size": _post(TE, body=b"zz\r\n\r\n" + HIDDEN),
    "a chunk size that overflows": _post(TE, body=b"fffffffffffffffff\r\n" + HIDDEN),
    "a chunk longer than declared": _post(TE, body=b"1\r\nxyz\r\n0\r\n\r\n" + HIDDEN),
    "chunked HTTP/1.0": _post(TE, body=END_OF_CHUNKS + HIDDEN).replace(b"HTTP/1.1", b"HTTP/1.0", 1),
}


# The requests that HAProxy accepts, and forwards with their end stated in only one way.
TAKEN = {"CL.TE", "TE.CL", "the same length twice", "a folded header", "chunked HTTP/1.0"}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_no_request_is_smuggled_past_haproxy(name: str, served: tuple[LoadBalancer, Replica]) -> None:
    balancer, replica = served
    replica.requests.clear()
    answered = _sent(balancer, AMBIGUOUS[name])
    assert answered.startswith(b"HTTP/1.1 200" if name in TAKEN else b"HTTP/1.1 400")
    assert answered.count(b"HTTP/1.") == 1
    # A last request, so that every earlier one has been processed.
    last = _sent(balancer, b"GET /last HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert last.startswith(b"HTTP/1.1 200")
    assert [path for path, _ in replica.requests] == (["/a", "/last"] if name in TAKEN else ["/last"])
    for _, headers in replica.requests:
        names = [header for header, _ in headers]
        assert b"x-hidden" not in names
        assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1


def test_the_smuggled_route_exists_behind_haproxy(served: tuple[LoadBalancer, Replica]) -> None:
    """Otherwise the tests above would prove nothing."""
    balancer, replica = served
    replica.requests.clear()
    assert _sent(balancer, HIDDEN.replace(b"x-hidden", b"connection: close\r\nx-hidden")).startswith(b"HTTP/1.1 404")
    with socket.create_connection((balancer.host, balancer.ports[0]), timeout=10) as direct:
        direct.sendall(HIDDEN)
        assert direct.recv(65536).startswith(b"HTTP/1.1 200")
    assert [path for path, _ in replica.requests] == ["/-/routes"]
