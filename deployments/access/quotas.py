"""What one key has used: requests and tokens of the last minute, and requests that are running now.

Counted per process, so each of several gateway replicas grants the full limits. Knows no keys' secrets and no HTTP.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from deployments.access.api_keys import ApiKey
from deployments.errors import RateLimitError

_MINUTE_S = 60.0


class Bucket:
    """Fills evenly up to `per_minute`. It may be overdrawn, because the amount is known only afterwards."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._filled_at = clock()

    def wait_s(self) -> float:
        """The time until it holds at least one; 0 if it does now."""
        self._fill()
        return max(0.0, (1 - self._level) * _MINUTE_S / self._per_minute)

    def take(self, amount: int) -> None:
        """Takes the amount, even if the bucket does not hold it."""
        self._fill()
        self._level -= amount

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._per_minute, self._level + (now - self._filled_at) * self._per_minute / _MINUTE_S)
        self._filled_at = now


class Quota:
    """The quota of one key. Tokens are charged as they are generated, so a request that began within the limit may
    exceed it, and the next one has to wait for that."""

    def __init__(self, key: ApiKey, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = key
        self._num_running = 0
        self._requests = Bucket(key.requests_per_minute, clock) if key.requests_per_minute else None
        self._tokens = Bucket(key.tokens_per_minute, clock) if key.tokens_per_minute else None

    def enter(self) -> None:
        """Counts a request, until `leave`. Raises RateLimitError, and counts nothing, if it exceeds a limit."""
        limit = self._key.max_concurrent
        if limit is not None and self._num_running >= limit:
            raise RateLimitError(f"this key may have {limit} requests at once", limit="concurrent_requests")
        for name, bucket, most in (
            ("requests", self._requests, self._key.requests_per_minute),
            ("tokens", self._tokens, self._key.tokens_per_minute),
        ):
            if bucket is not None and (wait_s := bucket.wait_s()):
                raise RateLimitError(
                    f"this key may use {most} {name} per minute", limit=name, retry_after_s=math.ceil(wait_s)
                )
        if self._requests is not None:
            self._requests.take(1)
        self._num_running += 1

    def leave(self) -> None:
        """Called when the request has been answered or abandoned."""
        self._num_running -= 1

    def charge(self, num_tokens: int) -> None:
        """Charges prompt or generated tokens to this key."""
        if self._tokens is not None:
            self._tokens.take(num_tokens)
