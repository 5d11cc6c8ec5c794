"""The service does not listen where others can reach it without keys, unless told to."""

from pathlib import Path

import pytest

from deployments.access.exposure import ExposureError, check_exposure
from deployments.errors import KeysFileError
from deployments.settings.app import AuthArgs
from llava_core.client.exchange import is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_the_loopback_interface_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    check_exposure(host, AuthArgs())


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "8.8.8.8", "example.com", "", "localhost.example.com"]
)
def test_other_interfaces_need_keys_or_explicit_permission(host: str, tmp_path: Path) -> None:
    assert not is_loopback(host)
    with pytest.raises(ExposureError, match=r"keys create.*auth\.keys_file.*auth\.allow_anyone"):
        check_exposure(host, AuthArgs())
    check_exposure(host, AuthArgs(allow_anyone=True))
    keys = tmp_path / "keys.json"
    keys.write_text('{"keys": []}')
    check_exposure(host, AuthArgs(keys_file=str(keys)))


def test_unreadable_keys_count_as_no_keys(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(KeysFileError):
            check_exposure(host, AuthArgs(keys_file=str(tmp_path / "none.json"), allow_anyone=True))
