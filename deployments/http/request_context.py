"""What the gateway learns about a request on the way to its answer, for the log and the metrics.

Each HTTP request has a context of its own, to which any of its tasks can add. Holds no content, only identifiers and
codes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class RequestContext:
    """`started` is by time.perf_counter(). `key_id` is the id of the API key that was used, not the key."""

    started: float = field(default_factory=time.perf_counter)
    key_id: str | None = None
    # Fields that clients of the route expect in an error, besides OpenAI's.
    error_extras: Mapping[str, object] = field(default_factory=dict)
    # The code of the error that was sent to the client.
    error_code: str | None = None
    # The limit that was exhausted, if that was the error.
    limit: str | None = None


_current: ContextVar[RequestContext | None] = ContextVar("request", default=None)


def current_request() -> RequestContext:
    """The context of the request that this task works for; if there is none, one that nobody reads."""
    return _current.get() or RequestContext()


@contextlib.contextmanager
def request_context() -> Iterator[RequestContext]:
    """A request's own context, for the block and every task that is started in it."""
    context = RequestContext()
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
