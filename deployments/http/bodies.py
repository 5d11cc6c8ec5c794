"""Request bodies: read whole, limited individually and in total, because each stays in memory until it is sent on.

A body must also arrive in time: until it is complete its request occupies a place that others wait for. Knows how
bodies arrive, not what is in them.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from deployments.errors import RequestTimeoutError, RequestTooLargeError, UnsupportedEncodingError
from llava_core.errors import OverloadedError

_ENCODING_HEADER = "content-encoding"


class BodyBudget:
    """Counts the bytes of bodies that one process holds, at most `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def lease(self) -> Lease:
        """One request's share, initially empty."""
        return Lease(self)


class Lease:
    """Grows with what has arrived; `release` gives everything back, and may be called repeatedly."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._num_bytes = 0

    def grow(self, num_bytes: int) -> None:
        """Raises OverloadedError, and takes nothing, if all bodies together would exceed the limit."""
        if self._budget.num_bytes + num_bytes > self._budget.max_bytes:
            raise OverloadedError(
                "the service holds as many bytes of requests as its limit allows; try again later", limit="bodies"
            )
        self._num_bytes += num_bytes
        self._budget.num_bytes += num_bytes

    def release(self) -> None:
        """Called when the body is no longer held."""
        self._budget.num_bytes -= self._num_bytes
        self._num_bytes = 0


async def read_body(request: Request, lease: Lease, *, max_bytes: int, max_seconds: float) -> bytes:
    """Reads the whole body. Raises UnsupportedEncodingError if it is encoded, RequestTooLargeError as soon as it proves
    too large, RequestTimeoutError when it is not complete in time, OverloadedError when all bodies together are too
    large."""
    _check_encoding(request)
    error = RequestTooLargeError(f"the body has more than {max_bytes} bytes, which is the limit")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise error
    pieces = []
    size = 0
    try:
        # For the whole body, not for each piece: a client could send one byte a minute.
        async with asyncio.timeout(max_seconds):
            async for piece in request.stream():
                size += len(piece)
                if size > max_bytes:
                    raise error
                lease.grow(len(piece))
                pieces.append(piece)
    except TimeoutError:
        raise RequestTimeoutError(
            f"after {max_seconds:g} seconds, which is the limit, only {size} bytes of the body had arrived"
        ) from None
    return b"".join(pieces)


def _check_encoding(request: Request) -> None:
    """Compressed bodies are not decompressed: a small one could become any size."""
    for encoding in ",".join(request.headers.getlist(_ENCODING_HEADER)).split(","):
        if encoding.strip().lower() not in ("", "identity"):
            raise UnsupportedEncodingError(
                "bodies must be sent as they are, without Content-Encoding", param=_ENCODING_HEADER
            )
