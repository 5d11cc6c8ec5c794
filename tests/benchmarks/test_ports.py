"""Ports for services of tests and benchmarks."""

import secrets
import socket

import pytest

from benchmarks.ports import free_port


def test_a_port_that_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_port()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        choices = iter([taken.getsockname()[1], free])
        monkeypatch.setattr(secrets, "choice", lambda _: next(choices))
        assert free_port() == free


def test_ports_are_below_those_of_outgoing_connections() -> None:
    for _ in range(20):
        with socket.create_server(("127.0.0.1", port := free_port())):
            assert 20_000 <= port < 30_000
