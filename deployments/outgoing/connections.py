"""Connections to addresses that strangers have named: the only place that makes them.

Off unless hosts are allowed. A name is resolved once, the resulting addresses are checked, and the connection goes to a
checked address, so that no second answer of a name server counts. Uses no proxy, cookie or credential, and follows no
redirect. Knows neither pictures nor workers.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import httpx

from deployments.outgoing.addresses import HostRule, may_connect
from llava_core.errors import LlavaError

if TYPE_CHECKING:
    from deployments.settings.hosts import HostArgs

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class NoAddressError(LlavaError):
    """A host's name does not resolve, or resolves to an address that is not allowed."""


async def resolve_host(host: str, port: int) -> list[str]:
    """The addresses of a name, as this machine resolves it. Raises OSError if there are none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class Outgoing:
    """Sends for any number of requests at once, and keeps nothing between them."""

    def __init__(self, args: HostArgs, *, resolve: Resolve = resolve_host, tls: ssl.SSLContext | None = None) -> None:
        self._allows_http = args.allow_http
        self._rules = [HostRule.parse(host) for host in args.allowed_hosts]
        self._networks = [ipaddress.ip_network(network) for network in args.allowed_networks]
        self._resolve = resolve
        # A transport and not a client, which would keep one request's cookies for another. Connections are not reused:
        # the pool finds them by address, and another host's name may resolve to the same one.
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
        """Whether host, port and scheme are allowed. Resolves nothing."""
        return any(rule.allows(url) for rule in self._rules) and (url.scheme == "https" or self._allows_http)

    async def send(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], content: bytes | None = None
    ) -> httpx.Response:
        """Returns the head of the response, whose body the caller reads before closing it. The address must be an
        allowed one. Has no timeout of its own; setting one is up to the caller.

        Raises NoAddressError, or httpx.HTTPError.
        """
        error: Exception = NoAddressError("its host has no address that may be asked")
        for ip in await self._addresses(url):
            request = httpx.Request(
                method,
                url.copy_with(host=ip),
                headers={**headers, "host": url.netloc.decode("ascii")},
                content=content,
                # Certificates are checked against the name, which is also sent to the server.
                extensions={"sni_hostname": url.host},
            )
            try:
                return await self._transport.handle_async_request(request)
            except httpx.ConnectError as reason:
                error = reason
        raise error

    async def _addresses(self, url: httpx.URL) -> list[str]:
        """All addresses that the name resolves to, or none if one of them is not allowed: no honest name has such a
        mixture."""
        try:
            found = await self._resolve(url.host, url.port or (443 if url.scheme == "https" else 80))
        except (OSError, UnicodeError):
            return []
        is_allowed = all(may_connect(address, self._networks) for address in found)
        return list(dict.fromkeys(found)) if is_allowed else []
