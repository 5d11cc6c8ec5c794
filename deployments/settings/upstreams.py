"""Settings of a model that another server answers for: the server's address, key and timeouts.

Knows names and bounds. The key itself is only in the environment, and read from there when a gateway starts.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path

import httpx
from pydantic import Field, field_validator

from deployments.errors import LaunchError
from deployments.settings.stages import Settings


class UpstreamArgs(Settings):
    """An OpenAI-compatible server. `url` is the part before `/chat/completions`, and usually ends in `/v1`; `model` is
    the model's name there, and `api_key_env` the environment variable that holds the key for the server.

    Timeouts: `connect_seconds` for the connection, `silence_seconds` for the beginning of a stream and between two of
    its pieces, `answer_seconds` for an answer that is not streamed. The server's state is checked every
    `check_seconds`. Each gateway replica has up to `max_requests` in flight. `forward` names request fields to send on
    besides those that always are; `ca_file` has the certificates to trust in place of the system's.
    """

    url: str = Field(max_length=2048)
    model: str = Field(min_length=1, max_length=256)
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    ca_file: str | None = None
    connect_seconds: float = Field(default=5, gt=0)
    silence_seconds: float = Field(default=120, gt=0)
    answer_seconds: float = Field(default=600, gt=0)
    check_seconds: float = Field(default=10, gt=0)
    max_requests: int = Field(default=256, ge=1)
    forward: frozenset[str] = frozenset()

    @field_validator("url")
    @classmethod
    def _check_url(cls, text: str) -> str:
        try:
            url = httpx.URL(text)
        except httpx.InvalidURL as error:
            raise ValueError(f"it is not an address: {error}") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("it must be an address such as http://gpu-1:8000/v1")
        if url.userinfo:
            raise ValueError("it holds credentials; name the variable that has the key in api_key_env")
        if url.query or url.fragment:
            raise ValueError("it must end with the path to which /chat/completions is added, without query or fragment")
        return text.rstrip("/")

    @field_validator("ca_file")
    @classmethod
    def _locate(cls, ca_file: str | None) -> str | None:
        # Replicas run in another working directory.
        return None if ca_file is None else str(Path(ca_file).expanduser().resolve())


def read_key(args: UpstreamArgs, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key for the server. Raises LaunchError that names the variable if it holds none."""
    if args.api_key_env is None:
        return None
    key = environment.get(args.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise LaunchError(
            f"the environment variable {args.api_key_env}, which api_key_env of an upstream names, "
            f"{'holds no key that can be sent' if key else 'is not set'}; set it where the service is started"
        )
    return key


def trusted(args: UpstreamArgs) -> ssl.SSLContext:
    """The TLS context with the trusted certificates. Raises LaunchError for a file that has none."""
    try:
        return ssl.create_default_context(cafile=args.ca_file)
    except OSError as error:
        raise LaunchError(f"{args.ca_file} holds no certificates in PEM: {error.strerror or error}") from None
