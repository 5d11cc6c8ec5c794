"""What the gateway finds out about a request on the way to its answer, for the log and the metrics.

Each HTTP request has one of these; whoever learns something says so where it is learned, in any task of the request.
Holds no content: identifiers and codes alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class RequestContext:
    """`started` is of time.perf_counter. `key_id` names the API key that was used, and is not the key."""

    started: float = field(default_factory=time.perf_counter)
    key_id: str | None = None
    # What clients of the route look for in an error, beside OpenAI's.
    error_extras: Mapping[str, object] = field(default_factory=dict)
    # Of the error that the client was told.
    error_code: str | None = None
    # What there was too little of, where that was the error.
    limit: str | None = None


_current: ContextVar[RequestContext | None] = ContextVar("request", default=None)


def current_request() -> RequestContext:
    """Of the request that this task works for; one that nobody looks at where there is none."""
    return _current.get() or RequestContext()


@contextlib.contextmanager
def request_context() -> Iterator[RequestContext]:
    """A request's own, for the block and every task that begins in it."""
    context = RequestContext()
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
