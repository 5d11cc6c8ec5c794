"""What one key has used: requests and tokens of the last minute, and requests that are being answered now.

Counted in the process that asks, so with several gateway replicas each grants the limits anew. Knows no keys' secrets
and no HTTP.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from deployments.api_keys import ApiKey
from deployments.errors import RateLimitError

_MINUTE_S = 60.0


class Bucket:
    """Fills evenly up to `per_minute`. It may be overdrawn: what is taken is known only afterwards."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._filled_at = clock()

    def wait_s(self) -> float:
        """Until there is one in it; 0 when there is."""
        self._fill()
        return max(0.0, (1 - self._level) * _MINUTE_S / self._per_minute)

    def take(self, amount: int) -> None:
        """Whether it is there or not."""
        self._fill()
        self._level -= amount

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._per_minute, self._level + (now - self._filled_at) * self._per_minute / _MINUTE_S)
        self._filled_at = now


class Quota:
    """Of one key. Tokens are charged as they are generated, so that a request begun within the limit may exceed it, and
    the next one waits for that."""

    def __init__(self, key: ApiKey, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = key
        self._num_running = 0
        self._requests = Bucket(key.requests_per_minute, clock) if key.requests_per_minute else None
        self._tokens = Bucket(key.tokens_per_minute, clock) if key.tokens_per_minute else None

    def enter(self) -> None:
        """One request more, until `leave`. Raises RateLimitError, and counts nothing, when it is one too many."""
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
        """The request has been answered, or given up."""
        self._num_running -= 1

    def charge(self, num_tokens: int) -> None:
        """Tokens that were read or written for this key."""
        if self._tokens is not None:
            self._tokens.take(num_tokens)
