"""`x-request-timeout-seconds`: the client's deadline for the complete answer.

Serve reads the same header: it cancels the request at that moment and answers with an error of its own. So the deadline
here is a little earlier. Knows about time, but not what is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TypeVar

from starlette.datastructures import Headers

from deployments.errors import DeadlineError
from llava_core.errors import RequestError

TIMEOUT_HEADER = "x-request-timeout-seconds"
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_EARLIER_S = 0.5

Item = TypeVar("Item")


class Deadline:
    """Counts from its construction; with `seconds` None it never expires."""

    def __init__(self, seconds: float | None) -> None:
        # For a short timeout a quarter of it: on a busy machine Serve's clock and this one are read some time apart.
        left = None if seconds is None else seconds - min(_EARLIER_S, seconds / 4)
        self._at = None if left is None else asyncio.get_running_loop().time() + left

    @contextlib.asynccontextmanager
    async def around(self) -> AsyncIterator[None]:
        """A context manager around a block that waits: cancels the wait at the deadline and raises DeadlineError."""
        try:
            async with asyncio.timeout_at(self._at) as timer:
                yield
        except TimeoutError:
            if not timer.expired():
                raise
            raise DeadlineError("the answer was not complete in time") from None

    def watch(self, items: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
        """Yields the items until the deadline, then raises DeadlineError."""
        return items if self._at is None else self._watch(items)

    async def _watch(self, items: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
        async with aclosing(items):
            while True:
                async with self.around():
                    try:
                        item = await anext(items)
                    except StopAsyncIteration:
                        return
                yield item


def read_deadline(headers: Headers, *, max_seconds: float) -> Deadline:
    """The client's deadline; one that never expires if it sets none. Raises RequestError that names the header."""
    given = headers.getlist(TIMEOUT_HEADER)
    if not given:
        return Deadline(None)
    seconds = float(given[0]) if len(given) == 1 and _SECONDS.fullmatch(given[0]) else 0.0
    if not 0 < seconds <= max_seconds:
        raise RequestError(
            f"{TIMEOUT_HEADER} must be one number above 0 and not above {max_seconds:g}", param=TIMEOUT_HEADER
        )
    return Deadline(seconds)
