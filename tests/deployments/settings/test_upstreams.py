"""Settings for another server, and where its key comes from."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.errors import LaunchError
from deployments.settings.upstreams import UpstreamArgs, read_key, trusted


def _args(**fields: Any) -> UpstreamArgs:
    return UpstreamArgs.model_validate({"url": "http://gpu-1:8000/v1", "model": "big", **fields})


def test_a_trailing_slash_of_the_url_is_ignored() -> None:
    assert _args(url="https://gpu-1/v1/").url == _args(url="https://gpu-1/v1").url == "https://gpu-1/v1"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("gpu-1:8000/v1", "must be an address"),
        ("ftp://gpu-1/v1", "must be an address"),
        ("http:///v1", "must be an address"),
        ("http://gpu-1:notaport/v1", "it is not an address"),
        ("http://user:secret@gpu-1/v1", "credentials"),
        ("http://gpu-1/v1?key=secret", "must end with the path"),
        ("http://gpu-1/v1#part", "must end with the path"),
    ],
)
def test_an_invalid_server_url_is_refused(url: str, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        _args(url=url)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": ""},
        {"api_key_env": "not a name"},
        {"connect_seconds": 0},
        {"silence_seconds": -1},
        {"max_requests": 0},
        {"api_key": "secret"},
    ],
)
def test_unknown_and_out_of_bounds_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        _args(**fields)


def test_a_key_is_read_from_the_environment_and_kept_out_of_settings() -> None:
    args = _args(api_key_env="BIG_KEY")
    assert read_key(args, {"BIG_KEY": " sk-secret\n"}) == "sk-secret"
    assert read_key(_args(), {"BIG_KEY": "sk-secret"}) is None
    assert "secret" not in repr(args)


@pytest.mark.parametrize(
    ("value", "why"), [(None, "is not set"), (" ", "is not set"), ("sk\r\nx: y", "no key that can")]
)
def test_a_missing_or_unsendable_key_aborts_the_start(value: str | None, why: str) -> None:
    with pytest.raises(LaunchError, match=f"BIG_KEY.* {why}") as raised:
        read_key(_args(api_key_env="BIG_KEY"), {} if value is None else {"BIG_KEY": value})
    assert "x: y" not in str(raised.value)


def test_a_ca_file_must_exist_and_hold_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = _args(ca_file="ca.pem")
    # Absolute, because replicas have another working directory.
    assert args.ca_file == str(tmp_path / "ca.pem")
    with pytest.raises(LaunchError, match=r"ca\.pem holds no certificates"):
        trusted(args)
    (tmp_path / "ca.pem").write_text("nothing of the kind")
    with pytest.raises(LaunchError, match=r"ca\.pem holds no certificates"):
        trusted(args)
