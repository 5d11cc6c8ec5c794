"""The HTTP knowledge shared by both clients: address, key, timeouts, the attempts of a request, httpx's errors as ours.

Sends nothing and never waits, so that it serves blocking and asynchronous code alike.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from llava_core.client.errors import ConnectionFailedError, ServiceError, TimeoutExceededError, status_error
from llava_core.client.events import StreamedAnswer
from llava_core.client.requests import Call
from llava_core.client.retries import DEFAULT_RETRIES, Retries, read_retry_after

API_KEY_VARIABLE = "LLAVA_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_HEADER = "x-request-timeout-seconds"
_CONNECT_S = 10.0
# After its deadline a service has this much longer to report it itself, which is more informative than a timeout here.
_GRACE_S = 1.0


@dataclass(frozen=True)
class Service:
    """A service's address and key, how long it may be silent, and how requests are retried."""

    url: str = DEFAULT_URL
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 600.0
    retries: Retries = DEFAULT_RETRIES

    def http_options(self) -> dict[str, Any]:
        """Arguments for an httpx client. Raises ServiceError for an invalid address."""
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ServiceError(f"{self.url!r} is not a valid address: {error}") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ServiceError(f"{self.url!r} is not a valid address such as {DEFAULT_URL}")
        key = self.api_key or os.environ.get(API_KEY_VARIABLE)
        return {
            # `/v1` at the end is accepted, as in OpenAI clients' URLs.
            "base_url": url.copy_with(path=url.path.rstrip("/").removesuffix("/v1")),
            "headers": {} if not key else {"authorization": f"Bearer {key}"},
            # A proxy set in the environment could not reach this machine's own addresses.
            "trust_env": not is_loopback(url.host),
            # The caller decides how many requests run at once.
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
        }


def is_loopback(host: str) -> bool:
    """Whether the address is reachable only from this machine. A name other than localhost may resolve to anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Attempts:
    """The attempts of one request, and the time left for them."""

    def __init__(self, service: Service, call: Call, retries: Retries | None = None) -> None:
        self._service, self._call = service, call
        self._retries = service.retries if retries is None else retries
        self._ends = None if call.deadline_s is None else time.monotonic() + call.deadline_s
        self._num_failed = 0

    def request(self) -> dict[str, Any]:
        """Arguments for httpx's next request, which also tells the service how much time is left. Raises
        TimeoutExceededError."""
        headers = {"content-type": "application/json"}
        silence_s = self._service.timeout_s
        if self._ends is not None:
            left = self._ends - time.monotonic()
            if left <= 0:
                raise self.too_late()
            headers[TIMEOUT_HEADER] = f"{left:.3f}" if left >= 0.001 else "0.001"
            silence_s = min(silence_s, left + _GRACE_S)
        return {
            "method": self._call.method,
            "url": self._call.path,
            "content": self._call.content,
            "headers": headers,
            "timeout": httpx.Timeout(silence_s, connect=min(_CONNECT_S, silence_s)),
        }

    def wait_s(self, error: ServiceError) -> float:
        """Seconds until the next attempt. Raises the error if there is no further attempt or no time for it."""
        wait = self._retries.wait_s(error, self._num_failed)
        self._num_failed += 1
        if wait is None or (self._ends is not None and time.monotonic() + wait >= self._ends):
            raise error
        return wait

    def check_time(self) -> None:
        """Check the deadline during a stream, for servers that do not know deadlines. Raises TimeoutExceededError."""
        if self._ends is not None and time.monotonic() > self._ends + _GRACE_S:
            raise self.too_late()

    def too_late(self) -> TimeoutExceededError:
        """The error for an expired deadline."""
        return TimeoutExceededError(f"there was no whole answer within {self._call.deadline_s:g} s")


def refusal(response: httpx.Response) -> ServiceError:
    """The error for a refusing response that has been read to its end."""
    after = read_retry_after(response.headers.get("retry-after"))
    request_id = response.headers.get("x-request-id")
    return status_error(response.status_code, response.content, request_id=request_id, retry_after_s=after)


@contextlib.contextmanager
def connecting(url: str) -> Iterator[None]:
    """Translate httpx's errors into ours until a response begins."""
    try:
        yield
    except httpx.ConnectTimeout as error:
        raise ConnectionFailedError(f"{url} does not answer") from error
    except httpx.TimeoutException as error:
        raise TimeoutExceededError(f"{url} has not answered in time") from error
    except httpx.RequestError as error:
        raise ConnectionFailedError(f"the connection to {url} failed: {error or type(error).__name__}") from error


@contextlib.contextmanager
def reading(answer: StreamedAnswer) -> Iterator[None]:
    """Translate httpx's errors into ours while a response is read. Errors after the answer's end are ignored."""
    try:
        yield
    except httpx.TimeoutException as error:
        if not answer.is_done:
            raise answer.interrupted("the service has fallen silent") from error
    except httpx.RequestError as error:
        if not answer.is_done:
            raise answer.interrupted(f"the connection broke: {error or type(error).__name__}") from error
