"""Hosts that the configuration allows to be contacted: none unless named, and only valid hosts."""

import pytest
from pydantic import ValidationError

from deployments.settings.hosts import HostArgs


def test_no_host_and_no_plain_http_is_allowed_by_default() -> None:
    assert HostArgs() == HostArgs(allowed_hosts=(), allowed_networks=(), allow_http=False)


@pytest.mark.parametrize(
    "args",
    [
        {"allowed_hosts": ["https://example.com/"]},
        {"allowed_hosts": ["gpu1:99999"]},
        {"allowed_hosts": "gpu1"},
        {"allowed_networks": ["10.0.0.1/8"]},
        {"allowed_networks": ["gpu1"]},
        {"host": []},
    ],
)
def test_invalid_hosts_and_networks_are_refused(args: dict) -> None:
    with pytest.raises(ValidationError):
        HostArgs.model_validate(args)


def test_hosts_and_networks_are_dumped_as_they_were_written() -> None:
    given = {"allowed_hosts": ["gpu1:21002", "*.example.com", "*"], "allowed_networks": ["10.0.0.0/8", "fd00::/8"]}
    assert HostArgs.model_validate(given).model_dump(mode="json") == {**given, "allow_http": False}
