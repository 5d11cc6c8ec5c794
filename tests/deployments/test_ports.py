"""Ports that are free, taken, or on another machine."""

import socket

import pytest

from deployments.errors import LaunchError
from deployments.ports import check_port, choose_metrics_port, host_and_port


def test_another_machines_address_cannot_be_used() -> None:
    with pytest.raises(LaunchError, match="cannot be used"):
        check_port("192.0.2.200", 0)


def test_ipv6_addresses_are_checked_too() -> None:
    check_port("::1", 0)
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = int(taken.getsockname()[1])
        with pytest.raises(LaunchError, match=f"port {port} on ::1 is already in use"):
            check_port("::1", port)


def test_the_metrics_port_is_the_next_or_a_free_one_never_the_services() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        # The default port may be another service's; then only a start that names it is refused.
        assert choose_metrics_port(port - 1, None) == 0
        with pytest.raises(LaunchError, match="with --metrics-port"):
            choose_metrics_port(port - 1, port)
    assert choose_metrics_port(port - 1, None) == port
    assert choose_metrics_port(port - 1, port) == port
    assert choose_metrics_port(port, 0) == 0
    with pytest.raises(LaunchError, match="choose another"):
        choose_metrics_port(port, port)


def test_addresses_are_written_as_in_urls() -> None:
    assert host_and_port("127.0.0.1", 7860) == "127.0.0.1:7860"
    assert host_and_port("::1", 7860) == "[::1]:7860"
