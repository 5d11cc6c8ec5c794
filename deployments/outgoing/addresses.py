"""Which web addresses may be fetched: their form, their hosts by name, and the IP addresses that a name resolves to.

An address is parsed once, by the library that also sends the request, so that what is checked is what is requested.
Resolves and fetches nothing.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from llava_core.errors import ImageError

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_DEFAULT_PORTS = {"https": 443, "http": 80}
# Printable ASCII without the backslash, which only some parsers take for a slash.
_FORM = re.compile(r"[\x21-\x5b\x5d-\x7e]{1,4096}")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_RULE = re.compile(r"(?P<host>\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*)(:(?P<port>\d{1,5}))?")
# What resolvers accept as an IPv4 address: decimal, octal, hexadecimal, or with parts left out.
_NUMBER = re.compile(r"(.*\.)?(\d+|0x[0-9a-f]*)\.?")

# From IANA's registries. Not by `is_global`, whose tables are as old as the running Python.
_NOT_PUBLIC_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private, as are 172.16.0.0/12 and 192.168.0.0/16
        "100.64.0.0/10",  # behind carriers' NAT; some clouds' metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's host, as its machines see it
        "169.254.0.0/16",  # link-local; most clouds' metadata
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocols; some clouds' metadata
        "192.0.2.0/24",  # documentation, as are 198.51.100.0/24 and 203.0.113.0/24
        "192.88.99.0/24",  # gateways of 6to4
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# Nothing else is public, be it loopback, private, link-local, multicast, or a disguised IPv4 address (mapped, NAT64).
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocols; Teredo, a disguised IPv4 address
        "2001:db8::/32",  # documentation, as is 3fff::/20
        "2002::/16",  # 6to4, a disguised IPv4 address
        "3fff::/20",
    )
)


@dataclass(frozen=True)
class HostRule:
    """`name`, `*.name` for all its subdomains, or `*`; `port` None is the scheme's default."""

    host: str
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> HostRule:
        """Parses a rule. Raises ValueError for a text that is none."""
        match = _RULE.fullmatch(text.lower())
        if match is None:
            raise ValueError(f"{text!r} is not a host: write name, *.name or *, and :port if it is not the default")
        port = None if match["port"] is None else int(match["port"])
        if port is not None and not 0 < port < 2**16:
            raise ValueError(f"{text!r} is not a host: ports are numbers from 1 to 65535")
        return cls(match["host"], port)

    def allows(self, url: httpx.URL) -> bool:
        """Whether the address has this host and port."""
        default = _DEFAULT_PORTS[url.scheme]
        if (url.port or default) != (self.port or default):
            return False
        host = url.host
        if self.host == "*":
            # Allowing every name does not allow numeric addresses.
            return not _is_numeric(host)
        if self.host.startswith("*."):
            return host.endswith(self.host[1:]) and not _is_numeric(host)
        return host == self.host


def parse_address(address: str, *, param: str, base: httpx.URL | None = None) -> httpx.URL:
    """Parses an http(s) address, relative to `base` if that is given. Raises ImageError for any other text, and for an
    address with credentials."""
    error = ImageError("the image's address is not an http or https URL", param=param, code="invalid_image_url")
    if not _FORM.fullmatch(address):
        raise error
    try:
        url = httpx.URL(address) if base is None else base.join(address)
    except (httpx.InvalidURL, ValueError):
        raise error from None
    if url.scheme not in _DEFAULT_PORTS or not _HOST.fullmatch(url.host) or not 0 < (url.port or 1) < 2**16:
        raise error
    if url.userinfo:
        raise ImageError(
            "the image's address holds credentials, which are not sent on", param=param, code="invalid_image_url"
        )
    return url.copy_with(fragment=None)


def is_public(address: IpAddress) -> bool:
    """Whether it is on the public internet: not private, local, multicast or reserved, nor a disguised IPv4 address."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_V4)
    return address in _UNICAST_V6 and not any(address in network for network in _NOT_PUBLIC_V6)


def may_connect(address: str, networks: Sequence[IpNetwork]) -> bool:
    """Whether the address is public, or in one of the allowed `networks`."""
    # The interface is part of a link-local address, which is otherwise checked like any other.
    ip = ipaddress.ip_address(address.partition("%")[0])
    return is_public(ip) or any(ip in network for network in networks)


def _is_numeric(host: str) -> bool:
    return ":" in host or _NUMBER.fullmatch(host) is not None
