"""Settings for the hosts that this service may connect to because a request says so: hosts of pictures given by
address, and of workers that register themselves.

Knows names and networks, but connects to nothing.
"""

from __future__ import annotations

import ipaddress

from pydantic import field_validator

from deployments.outgoing.addresses import HostRule
from deployments.settings.stages import Settings


class HostArgs(Settings):
    """Only hosts in `allowed_hosts`: `name`, `*.name` or `*`, with `:port` unless it is the scheme's default. Names
    must resolve to public addresses or into `allowed_networks`."""

    allowed_hosts: tuple[str, ...] = ()
    allowed_networks: tuple[str, ...] = ()
    allow_http: bool = False

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            HostRule.parse(host)
        return hosts

    @field_validator("allowed_networks")
    @classmethod
    def _check_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ipaddress.ip_network(network)
        return networks
