"""Ports of this machine: how they are written, whether they are free, and which one the metrics get. Standard library
only."""

from __future__ import annotations

import contextlib
import errno
import socket

from deployments.errors import LaunchError

_LAST_PORT = 65535


def host_and_port(host: str, port: int) -> str:
    """Host and port as in a URL: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_port(host: str, port: int, option: str = "--port") -> None:
    """Raise LaunchError when the address cannot be listened on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = "is already in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise LaunchError(f"port {port} on {host} {reason}; choose another with {option}") from None


def choose_metrics_port(port: int, asked: int | None) -> int:
    """The requested port, or else the one after the service's, or else 0, which is any free one."""
    if asked:
        if asked == port:
            raise LaunchError(f"port {port} cannot be both the service's and that of its metrics; choose another")
        check_port("127.0.0.1", asked, "--metrics-port")
        return asked
    with contextlib.suppress(LaunchError):
        if asked is None and port < _LAST_PORT:
            check_port("127.0.0.1", port + 1)
            return port + 1
    return 0
