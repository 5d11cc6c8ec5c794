"""Connections to named addresses: which hosts may be contacted, and that the checked address is the one used. More of
that is in test_fetch.py."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from deployments.outgoing.connections import NoAddressError, Outgoing, resolve_host
from deployments.settings.hosts import HostArgs
from tests.sockets import scripted, whole


def outgoing(*found: str, **args: Any) -> Outgoing:
    """Return an Outgoing for which every name resolves to these addresses."""

    async def resolve(_host: str, _port: int) -> Sequence[str]:
        return found

    given = {"allowed_hosts": ["gpu1:21002"], "allow_http": True, "allowed_networks": ["127.0.0.0/8"], **args}
    return Outgoing(HostArgs.model_validate(given), resolve=resolve)


async def sent(out: Outgoing, method: str, url: httpx.URL, content: bytes | None = None) -> tuple[int, bytes]:
    """Return the response's status and body."""
    response = await out.send(method, url, {}, content)
    try:
        return response.status_code, await response.aread()
    finally:
        await response.aclose()


def test_nothing_is_allowed_unless_hosts_are_configured() -> None:
    assert Outgoing(HostArgs()).is_off
    assert not Outgoing(HostArgs()).allows(httpx.URL("https://gpu1"))
    assert not outgoing().is_off


@pytest.mark.parametrize(
    ("url", "allows_http", "is_allowed"),
    [
        ("http://gpu1:21002/x", True, True),
        ("http://gpu1:21002/x", False, False),
        ("https://gpu1:21002/x", False, True),
        ("http://gpu1/x", True, False),
        ("http://gpu2:21002/x", True, False),
    ],
)
def test_host_port_and_scheme_are_checked(url: str, *, allows_http: bool, is_allowed: bool) -> None:
    assert outgoing(allow_http=allows_http).allows(httpx.URL(url)) == is_allowed


def test_a_request_goes_to_the_checked_address_with_the_hosts_name() -> None:
    with scripted(whole("200 OK", b"pong")) as server:
        port = httpx.URL(server.url).port

        url = httpx.URL(f"http://gpu1:{port}/x")
        assert asyncio.run(sent(outgoing("127.0.0.1"), "POST", url, b"ping")) == (200, b"pong")
        [(head, body)] = server.requests
    assert head.startswith("POST /x HTTP/1.1")
    assert f"host: gpu1:{port}" in head.lower()
    assert body == b"ping"


@pytest.mark.parametrize("found", [(), ("10.0.0.1",), ("169.254.169.254",), ("127.0.0.1", "10.0.0.1"), ("::1",)])
def test_a_name_with_a_disallowed_address_is_not_contacted(found: tuple[str, ...]) -> None:
    with pytest.raises(NoAddressError):
        asyncio.run(sent(outgoing(*found), "GET", httpx.URL("http://gpu1:21002/")))


def test_the_next_address_is_tried_where_the_first_does_not_listen() -> None:
    with scripted(whole("200 OK", b"")) as server:
        port = httpx.URL(server.url).port
        url = httpx.URL(f"http://gpu1:{port}/")
        assert asyncio.run(sent(outgoing("127.9.9.9", "127.0.0.1"), "GET", url)) == (200, b"")
    with pytest.raises(httpx.ConnectError):
        asyncio.run(sent(outgoing("127.0.0.1"), "GET", url))


def test_a_name_is_resolved_by_this_machines_resolver() -> None:
    assert "127.0.0.1" in asyncio.run(resolve_host("localhost", 80))
    # This is why numbers are refused by their form: they would lead to internal hosts.
    assert asyncio.run(resolve_host("2130706433", 80)) == ["127.0.0.1"]
