"""A real HAProxy in front of small servers on this machine."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from benchmarks.ports import free_port
from deployments.launch.load_balancer import (
    LoadBalancer,
    LoadBalancerError,
    balance_gateways,
    balance_proxy,
    local_host,
)

PATIENCE_S = 20.0
APPLICATION = "llava"


class Handler(BaseHTTPRequestHandler):
    """Responds with the client and the path of the request."""

    others: ClassVar[Mapping[str, str]] = {}

    def do_GET(self) -> None:
        if self.path == "/-/routes":
            self._answer({"/": getattr(self.server, "application", APPLICATION), **self.others})
            return
        self._answer({"id": self.headers.get("x-request-id"), "port": self.server.server_address[1]})

    def _answer(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def replica(
    host: str, port: int, handler: type[Handler] = Handler, *, application: str = APPLICATION
) -> Iterator[None]:
    with ThreadingHTTPServer((host, port), handler) as server:
        server.application = application  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def free_ports(host: str, count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server((host, 0))) for _ in range(count)]
        return [int(probe.getsockname()[1]) for probe in probes]


@contextlib.contextmanager
def balancing(ports: int = 2) -> Iterator[LoadBalancer]:
    port = free_port()
    host = local_host(port)
    balancer = LoadBalancer(("127.0.0.1", port), host, free_ports(host, ports), APPLICATION)
    balancer.start()
    try:
        yield balancer
    finally:
        balancer.stop()


def ask(balancer: LoadBalancer, path: str = "/", **headers: str) -> tuple[int, dict[str, str], dict[str, object]]:
    connection = http.client.HTTPConnection(*balancer.address, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, dict(response.headers), json.loads(response.read())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_requests_reach_any_live_replica_with_a_request_id() -> None:
    with balancing() as balancer:
        first, second = balancer.ports
        with replica(balancer.host, second):
            wait_until(lambda: ask(balancer)[0] == 200)
            _, _, body = ask(balancer, **{"X-Request-Id": "mine"})
            assert body == {"id": "mine", "port": second}
            assert ask(balancer)[2]["id"]
        # Its successor on another port is found; no request is refused meanwhile.
        with replica(balancer.host, first):
            status, _, body = ask(balancer)
            assert (status, body["port"]) == (200, first)


def test_another_applications_replicas_get_no_requests() -> None:
    with balancing() as balancer:
        own, other = balancer.ports
        with replica(balancer.host, other, application="another"), replica(balancer.host, own):
            # Wait until both have been health-checked.
            wait_until(lambda: {ask(balancer)[2].get("port") for _ in range(20)} == {own})
    with balancing(1) as balancer, replica(balancer.host, balancer.ports[0], application=f"another-{APPLICATION}"):
        wait_until(lambda: ask(balancer)[0] == 503)


class Lasting(Handler):
    """Keeps connections open as long as it can."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        if self.path == "/":
            self.asked.append(self.headers.get("connection"))
        super().do_GET()


def test_replica_connections_are_closed_while_clients_keep_theirs() -> None:
    with balancing(1) as balancer, replica(balancer.host, balancer.ports[0], Lasting):
        wait_until(lambda: ask(balancer)[0] == 200)
        Lasting.asked.clear()
        connection = http.client.HTTPConnection(*balancer.address, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.connect()
            first = connection.sock
            for _ in range(3):
                connection.request("GET", "/")
                assert connection.getresponse().read()
            assert connection.sock is first
        assert Lasting.asked == ["close"] * 3


class Proxy(Handler):
    """Reports all applications, like Serve's proxy."""

    others: ClassVar[Mapping[str, str]] = {"/b": "another"}


def test_serves_proxy_may_host_further_applications() -> None:
    port = free_port()
    balancer = balance_proxy(("127.0.0.1", port), APPLICATION)
    assert (balancer.proxy_port, list(balancer.ports)) == (port, [port])
    with replica(balancer.host, port, Proxy):
        balancer.start()
        try:
            assert ask(balancer)[0] == 200
        finally:
            balancer.stop()
    with balancing(1) as gateways, replica(gateways.host, gateways.ports[0], Proxy):
        wait_until(lambda: ask(gateways)[0] == 503)


def test_even_the_first_request_goes_only_to_live_replicas() -> None:
    port = free_port()
    host = local_host(port)
    *nothing, another, own = free_ports(host, 6)
    balancer = LoadBalancer(("127.0.0.1", port), host, [*nothing, another, own], APPLICATION)
    with replica(host, own), replica(host, another, application="another"):
        balancer.start()
        try:
            assert [ask(balancer)[2]["port"] for _ in range(12)] == [own] * 12
        finally:
            balancer.stop()


def test_no_request_is_refused_or_misrouted_once_it_listens() -> None:
    port = free_port()
    host = local_host(port)
    *nothing, own = free_ports(host, 6)
    balancer = LoadBalancer(("127.0.0.1", port), host, [*nothing, own], APPLICATION)
    seen: list[int] = []
    started = threading.Event()

    def knock() -> None:
        while not started.is_set():
            try:
                seen.append(ask(balancer)[0])
            except ConnectionRefusedError:
                assert not seen, f"it listened, answered {seen}, and does not listen any more"

    with replica(host, own), ThreadPoolExecutor(1) as threads:
        knocking = threads.submit(knock)
        try:
            balancer.start()
            assert ask(balancer)[0] == 200
            started.set()
            knocking.result(PATIENCE_S)
        finally:
            started.set()
            balancer.stop()
    assert seen[0] == 503
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize(
    "given", [["a" * 129], ["a, b"], [""], ['quo"te'], ["one", "two"], ["abc -- GET /v1/models 200 forged"]]
)
def test_an_invalid_request_id_is_replaced(given: list[str]) -> None:
    with balancing(1) as balancer, replica(balancer.host, balancer.ports[0]):
        wait_until(lambda: ask(balancer)[0] == 200)
        connection = http.client.HTTPConnection(*balancer.address, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.putrequest("GET", "/")
            for each in given:
                connection.putheader("x-request-id", each)
            connection.endheaders()
            found = json.loads(connection.getresponse().read())["id"]
    assert len(found) == 36
    assert found not in given


def test_serves_own_routes_are_hidden_from_clients() -> None:
    with balancing(1) as balancer, replica(balancer.host, balancer.ports[0]):
        wait_until(lambda: ask(balancer)[0] == 200)
        for path in ("/-/routes", "/-/healthz", "/-/"):
            status, headers, body = ask(balancer, path)
            assert (status, body["request_id"]) == (404, headers["x-request-id"])


@pytest.mark.parametrize("method", ["FOO", "get", "BREW"])
def test_an_unknown_method_is_refused_in_the_usual_shape(method: str) -> None:
    with balancing(1) as balancer, replica(balancer.host, balancer.ports[0]):
        wait_until(lambda: ask(balancer)[0] == 200)
        connection = http.client.HTTPConnection(*balancer.address, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request(method, "/", headers={"X-Request-Id": "mine"})
            response = connection.getresponse()
            body = json.loads(response.read())
    assert (response.status, response.headers["x-request-id"], body["request_id"]) == (405, "mine", "mine")
    assert body["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "request_head",
    [
        b"hello",
        b"GET / HTTP/1.1\r\nhost: x\r\nx-long: " + b"y" * 15_360,
        b"GET / HTTP/1.1\r\nhost: x" + b"\r\nx: y" * 101,
        b"GET http://other/ HTTP/1.1\r\nhost: x",
    ],
)
def test_what_haproxy_cannot_read_gets_its_own_message(request_head: bytes) -> None:
    """As documented; were it configurable, it would have the usual shape."""
    with balancing(1) as balancer, socket.create_connection(balancer.address, timeout=PATIENCE_S) as connection:
        connection.sendall(request_head + b"\r\n\r\n")
        answered = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answered.startswith(b"HTTP/1.1 400 Bad request\r\n")
    assert b"<html>" in answered


def test_a_client_that_stops_sending_is_refused_in_the_usual_shape() -> None:
    Slow.asked.clear()
    Slow.go_on.clear()
    with balancing(1) as balancer, replica(balancer.host, balancer.ports[0], Slow):
        wait_until(lambda: ask(balancer)[0] == 200)
        with socket.create_connection(balancer.address, timeout=PATIENCE_S) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nx-request-id: slow\r\n\r\n")
            assert Slow.asked.wait(PATIENCE_S)
            connection.shutdown(socket.SHUT_WR)
            head, _, body = b"".join(iter(lambda: connection.recv(4096), b"")).partition(b"\r\n\r\n")
        Slow.go_on.set()
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"x-request-id: slow" in head.split(b"\r\n")
    assert json.loads(body)["error"]["code"] == "connection_closed"


def test_a_missing_replica_gives_an_error_of_the_usual_shape() -> None:
    with balancing(1) as balancer:
        wait_until(lambda: ask(balancer)[0] == 503)
        status, headers, body = ask(balancer, **{"X-Request-Id": "mine:1"})
        assert status == 503
        assert headers["content-type"] == "application/json"
        assert headers["retry-after"] == "5"
        assert headers["x-request-id"] == body["request_id"] == "mine:1"
        error = body["error"]
        assert isinstance(error, dict)
        assert (error["type"], error["code"], error["param"]) == ("server_error", "unavailable", None)


def test_a_replica_that_dies_during_a_request_gives_the_same_shape() -> None:
    with balancing(1) as balancer, socket.create_server((balancer.host, balancer.ports[0])) as server:
        # Health checks get a response, every other request is dropped.
        stop = threading.Event()

        def serve() -> None:
            server.settimeout(0.05)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    client, _ = server.accept()
                    with client:
                        if b"/-/routes" in client.recv(4096):
                            client.sendall(b'HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\n{"/":"llava"}')

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            wait_until(lambda: ask(balancer)[0] == 502)
            error = ask(balancer)[2]["error"]
            assert isinstance(error, dict)
            assert error["code"] == "replica_lost"
        finally:
            stop.set()
            thread.join()


class Slow(Handler):
    """Answers one request slowly."""

    asked = threading.Event()
    go_on = threading.Event()

    def do_GET(self) -> None:
        if self.headers.get("x-request-id") == "slow":
            self.asked.set()
            assert self.go_on.wait(PATIENCE_S)
        super().do_GET()


class Refusing(Slow):
    """Refuses requests without reading their bodies."""

    def do_POST(self) -> None:
        self.send_response(413)
        self.send_header("content-length", "0")
        self.send_header("connection", "close")
        self.end_headers()


def test_a_silent_client_is_cut_off_after_a_refusal_but_not_while_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deployments.launch.load_balancer._CLIENT_S", 1)
    Slow.asked.clear()
    Slow.go_on.clear()
    with (
        balancing(1) as balancer,
        ThreadPoolExecutor(1) as threads,
        replica(balancer.host, balancer.ports[0], Refusing),
    ):
        wait_until(lambda: ask(balancer)[0] == 200)
        waiting = threads.submit(lambda: ask(balancer, **{"X-Request-Id": "slow"}))
        assert Slow.asked.wait(PATIENCE_S)
        with socket.create_connection(balancer.address, timeout=PATIENCE_S) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
            answered = b"".join(iter(lambda: connection.recv(4096), b""))
        assert b" 413 " in answered.partition(b"\r\n")[0]
        # It has waited since before the other one fell silent, which is too long ago by now.
        Slow.go_on.set()
        assert waiting.result(PATIENCE_S)[0] == 200


def test_draining_refuses_new_requests_and_waits_for_those_in_flight() -> None:
    with (
        balancing(2) as balancer,
        ThreadPoolExecutor(2) as threads,
        replica(balancer.host, balancer.ports[0], Slow),
    ):
        Slow.asked.clear()
        Slow.go_on.clear()
        wait_until(lambda: ask(balancer)[0] == 200)
        running = threads.submit(lambda: ask(balancer, **{"X-Request-Id": "slow"}))
        assert Slow.asked.wait(PATIENCE_S)
        # Without patience there is no waiting.
        assert not balancer.drain(0)
        draining = threads.submit(balancer.drain, PATIENCE_S)
        status, headers, body = ask(balancer)
        assert (status, headers["retry-after"]) == (503, "5")
        assert set(body) == {"error", "request_id"}
        assert not draining.done()
        Slow.go_on.set()
        assert draining.result(PATIENCE_S)
        assert running.result(PATIENCE_S)[0] == 200


def test_a_dead_balancer_cannot_be_drained() -> None:
    with balancing(1) as balancer:
        balancer._process.kill()  # type: ignore[union-attr]
        balancer._process.wait()  # type: ignore[union-attr]
        with pytest.raises(LoadBalancerError, match="does not answer"):
            balancer.drain(PATIENCE_S)


def test_an_occupied_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        balancer = LoadBalancer(("127.0.0.1", port), local_host(port), [30_000], APPLICATION)
        with pytest.raises(LoadBalancerError, match=rf"127\.0\.0\.1:{port}"):
            balancer.start()
        balancer.stop()


def test_a_missing_haproxy_binary_is_reported_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/nowhere")
    balancer = LoadBalancer(("127.0.0.1", 1), local_host(1), [30_000], APPLICATION)
    with pytest.raises(LoadBalancerError, match="`serve run` does without it"):
        balancer.start()
    balancer.stop()


def test_an_ipv6_address_is_put_in_brackets() -> None:
    assert "bind [::1]:8000\n" in LoadBalancer(("::1", 8000), "127.64.31.64", [30_000], APPLICATION).configuration


def test_it_knows_every_port_that_serve_may_give_a_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "31000")
    # Set here, so that monkeypatch restores it afterwards.
    monkeypatch.setenv("RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT", "0")
    balancer = balance_gateways(("127.0.0.1", 8000), APPLICATION, max_gateways=3)
    assert (balancer.host, balancer.address) == (local_host(8000), ("127.0.0.1", 8000))
    # More than one per gateway: a gateway that replaces another cannot reuse its port.
    assert len(balancer.ports) > 2 * 3
    assert list(balancer.ports) == list(range(31_000, int(os.environ["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"])))


def test_every_service_on_a_machine_has_its_own_loopback_address() -> None:
    assert local_host(8000) == "127.64.31.64"
    assert len({local_host(port) for port in range(65_536)}) == 65_536


def test_it_does_not_outlive_its_parent_process(tmp_path: Path) -> None:
    port = free_port()
    program = (
        "import sys, time; from deployments.launch.load_balancer import *\n"
        f"LoadBalancer(('127.0.0.1', {port}), local_host({port}), [30000], 'llava').start()\n"
        "print(flush=True); time.sleep(600)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        socket.create_connection(("127.0.0.1", port), PATIENCE_S).close()
        process.kill()

    def is_gone() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    wait_until(is_gone)
