"""`x-request-timeout-seconds`: when an answer is too late for its client, whatever of it there is by then.

Serve reads the same header: it cancels a request at that moment and answers in words of its own. So the service is done
a little earlier. Knows how time passes, not what is waited for.
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
    """Counts from when it is made; `seconds` None never ends anything."""

    def __init__(self, seconds: float | None) -> None:
        # A quarter of a short time: on a busy machine Serve's clock and this one are looked at a while apart.
        left = None if seconds is None else seconds - min(_EARLIER_S, seconds / 4)
        self._at = None if left is None else asyncio.get_running_loop().time() + left

    @contextlib.asynccontextmanager
    async def around(self) -> AsyncIterator[None]:
        """For a block that waits: raises DeadlineError in time, after what is waited for was cancelled."""
        try:
            async with asyncio.timeout_at(self._at) as timer:
                yield
        except TimeoutError:
            if not timer.expired():
                raise
            raise DeadlineError("the answer was not complete in time") from None

    def watch(self, items: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
        """The items as long as there is time."""
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
    """The client's, none where it names none. Raises RequestError that names the header."""
    given = headers.getlist(TIMEOUT_HEADER)
    if not given:
        return Deadline(None)
    seconds = float(given[0]) if len(given) == 1 and _SECONDS.fullmatch(given[0]) else 0.0
    if not 0 < seconds <= max_seconds:
        raise RequestError(
            f"{TIMEOUT_HEADER} must be one number above 0 and not above {max_seconds:g}", param=TIMEOUT_HEADER
        )
    return Deadline(seconds)
