"""What both clients know of HTTP: address, key, timeouts, the attempts of a request, and httpx's errors as ours.

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
# After its deadline a service still has this long to say so itself, which tells more than a clock here.
_GRACE_S = 1.0


@dataclass(frozen=True)
class Service:
    """Where a service is, the key for it, how long it may be silent, and how often it is asked again."""

    url: str = DEFAULT_URL
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 600.0
    retries: Retries = DEFAULT_RETRIES

    def http_options(self) -> dict[str, Any]:
        """For a client of httpx. Raises ServiceError for an address that is none."""
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ServiceError(f"{self.url!r} is no address: {error}") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ServiceError(f"{self.url!r} is no address such as {DEFAULT_URL}")
        key = self.api_key or os.environ.get(API_KEY_VARIABLE)
        return {
            # As clients of OpenAI's have it, `/v1` may stand at the end.
            "base_url": url.copy_with(path=url.path.rstrip("/").removesuffix("/v1")),
            "headers": {} if not key else {"authorization": f"Bearer {key}"},
            # The proxy that an environment names could not reach this machine's own addresses.
            "trust_env": not is_loopback(url.host),
            # How many requests run at once is the caller's choice.
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
        }


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there. A name other than localhost may lead anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Attempts:
    """The attempts of one request, and the time that is left for them."""

    def __init__(self, service: Service, call: Call, retries: Retries | None = None) -> None:
        self._service, self._call = service, call
        self._retries = service.retries if retries is None else retries
        self._ends = None if call.deadline_s is None else time.monotonic() + call.deadline_s
        self._num_failed = 0

    def request(self) -> dict[str, Any]:
        """The next attempt as httpx builds requests, which tells the service how much time is left."""
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
        """Seconds until the next attempt. Raises the error where there is none, or no time for it."""
        wait = self._retries.wait_s(error, self._num_failed)
        self._num_failed += 1
        if wait is None or (self._ends is not None and time.monotonic() + wait >= self._ends):
            raise error
        return wait

    def check_time(self) -> None:
        """For a stream of a server that does not know deadlines. Raises TimeoutExceededError."""
        if self._ends is not None and time.monotonic() > self._ends + _GRACE_S:
            raise self.too_late()

    def too_late(self) -> TimeoutExceededError:
        """The error for when time is over."""
        return TimeoutExceededError(f"there was no whole answer within {self._call.deadline_s:g} s")


def refusal(response: httpx.Response) -> ServiceError:
    """What a response says that is no answer, read to its end."""
    after = read_retry_after(response.headers.get("retry-after"))
    request_id = response.headers.get("x-request-id")
    return status_error(response.status_code, response.content, request_id=request_id, retry_after_s=after)


@contextlib.contextmanager
def connecting(url: str) -> Iterator[None]:
    """Until a response begins: httpx's errors as ours."""
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
    """While a response is read: httpx's errors as ours. What happens once all was said is of no concern."""
    try:
        yield
    except httpx.TimeoutException as error:
        if not answer.is_done:
            raise answer.interrupted("the service has fallen silent") from error
    except httpx.RequestError as error:
        if not answer.is_done:
            raise answer.interrupted(f"the connection broke: {error or type(error).__name__}") from error
