"""Request bodies: each read whole, bounded one by one and all together, because each is in memory until it is sent on.

A body must also come in time: until it is whole its request holds a place that others wait for. Knows how bodies
arrive, not what is in them.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from deployments.errors import RequestTimeoutError, RequestTooLargeError
from llava_core.errors import OverloadedError


class BodyBudget:
    """How many bytes of bodies one process holds."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def lease(self) -> Lease:
        """One request's share, nothing at first."""
        return Lease(self)


class Lease:
    """Grows with what has arrived; `release` gives everything back, however often it is called."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._num_bytes = 0

    def grow(self, num_bytes: int) -> None:
        """Raises OverloadedError, and takes nothing, when all bodies together would be too much."""
        if self._budget.num_bytes + num_bytes > self._budget.max_bytes:
            raise OverloadedError(
                "the service holds as many bytes of requests as it may; try again later", limit="bodies"
            )
        self._num_bytes += num_bytes
        self._budget.num_bytes += num_bytes

    def release(self) -> None:
        """The body is no longer here."""
        self._budget.num_bytes -= self._num_bytes
        self._num_bytes = 0


async def read_body(request: Request, lease: Lease, *, max_bytes: int, max_seconds: float) -> bytes:
    """Raises RequestTooLargeError as soon as a body is seen to be, RequestTimeoutError when it is not whole in time,
    OverloadedError when there are too many."""
    error = RequestTooLargeError(f"the body has more than {max_bytes} bytes, which is the limit")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise error
    pieces = []
    size = 0
    try:
        # Of the whole body: one byte a minute is as good as nothing.
        async with asyncio.timeout(max_seconds):
            async for piece in request.stream():
                size += len(piece)
                if size > max_bytes:
                    raise error
                lease.grow(len(piece))
                pieces.append(piece)
    except TimeoutError:
        raise RequestTimeoutError(
            f"after {max_seconds:g} seconds, which is the limit, {size} bytes of the body had come and not all of it"
        ) from None
    return b"".join(pieces)
