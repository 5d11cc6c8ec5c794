"""Connections that this service makes because a stranger has named an address: the only place that makes one.

Off unless hosts are allowed. A name is resolved once, what it leads to is judged, and the connection goes to the very
address that was judged, so that no second answer of a name server counts. No proxy, cookie or credential takes part,
and no redirect is followed. Knows neither pictures nor workers.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence

import httpx

from deployments.addresses import HostRule, may_connect
from deployments.host_settings import HostArgs
from llava_core.errors import LlavaError

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class NoAddressError(LlavaError):
    """A host's name leads nowhere, or where nobody may be asked."""


async def resolve_host(host: str, port: int) -> list[str]:
    """The addresses of a name, as this machine finds them. Raises OSError where there are none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class Outgoing:
    """Sends for any number of requests at once, keeping nothing between them."""

    def __init__(self, args: HostArgs, *, resolve: Resolve = resolve_host, tls: ssl.SSLContext | None = None) -> None:
        self._allows_http = args.allow_http
        self._rules = [HostRule.parse(host) for host in args.allowed_hosts]
        self._networks = [ipaddress.ip_network(network) for network in args.allowed_networks]
        self._resolve = resolve
        # A transport and not a client, which would keep cookies of one request for another. Connections are not kept:
        # they are found again by their address, and another host's name may lead to the same one.
        self._transport = httpx.AsyncHTTPTransport(
            verify=tls or ssl.create_default_context(),
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    @property
    def is_off(self) -> bool:
        """Whether no host at all is allowed."""
        return not self._rules

    def allows(self, url: httpx.URL) -> bool:
        """Whether host, port and scheme are. Looks nothing up."""
        return any(rule.allows(url) for rule in self._rules) and (url.scheme == "https" or self._allows_http)

    async def send(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], content: bytes | None = None
    ) -> httpx.Response:
        """The head of the answer; the body is still to be read, and the response to be closed. The address must be an
        allowed one. Waits without end: a time limit is the caller's.

        Raises NoAddressError, or httpx.HTTPError.
        """
        error: Exception = NoAddressError("its host has no address that may be asked")
        for ip in await self._addresses(url):
            request = httpx.Request(
                method,
                url.copy_with(host=ip),
                headers={**headers, "host": url.netloc.decode("ascii")},
                content=content,
                # Certificates are checked against the name, which is also what the server is told.
                extensions={"sni_hostname": url.host},
            )
            try:
                return await self._transport.handle_async_request(request)
            except httpx.ConnectError as reason:
                error = reason
        raise error

    async def _addresses(self, url: httpx.URL) -> list[str]:
        """All that the name leads to, or none where it leads to one that may not be asked: nobody means such a
        mixture."""
        try:
            found = await self._resolve(url.host, url.port or (443 if url.scheme == "https" else 80))
        except (OSError, UnicodeError):
            return []
        is_allowed = all(may_connect(address, self._networks) for address in found)
        return list(dict.fromkeys(found)) if is_allowed else []
