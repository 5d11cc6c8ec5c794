"""Signs of life in a stream between two hosts: an idle sender sends them, and silence means that the sender is lost.

When a process dies its connections close, and the other end knows at once. When a host loses power or its cable,
nothing closes: TCP waits for many minutes, and gRPC's own pings do not help, because servers, by its documentation,
treat more than two in five minutes as an attack. Knows nothing about what is streamed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from deployments.waiting import abandon

Item = TypeVar("Item")

# How often an idle sender sends a sign, and how long a stream may be silent: long enough for an event loop on a busy
# machine, and for a switch that restarts.
SIGN_S = 2.0
SILENCE_S = 10.0


@dataclass(frozen=True)
class StillHere:
    """A sign of life: there is no new item, but the host is alive."""


async def with_signs(
    items: AsyncGenerator[Item, None], *, every_s: float = SIGN_S
) -> AsyncGenerator[Item | StillHere, None]:
    """Yields the items, and a sign after every `every_s` without one. Closing it closes `items`."""
    async with aclosing(items):
        while True:
            async with _next(items) as coming:
                while not await _has_come(coming, every_s):
                    yield StillHere()
            if (item := coming.result()) is None:
                return
            yield item


async def listen(
    items: AsyncIterable[Item | StillHere],
    when_silent: Callable[[], Awaitable[None]],
    *,
    silence_s: float = SILENCE_S,
) -> AsyncGenerator[Item, None]:
    """Yields the items without the signs. Calls `when_silent` after every `silence_s` without either; it raises if that
    means a loss, and not, for example, while no replica has the call yet."""
    iterator = aiter(items)
    while True:
        async with _next(iterator) as coming:
            while not await _has_come(coming, silence_s):
                await when_silent()
        item = coming.result()
        if item is None:
            return
        if not isinstance(item, StillHere):
            yield item


@asynccontextmanager
async def _next(items: AsyncIterator[Item]) -> AsyncGenerator[asyncio.Future[Item | None], None]:
    """The next item, None at the end. Leaving the block cancels the wait for it. Not done with `asyncio.timeout`,
    because Serve turns a cancellation into an error of its own, which could not be recognised as a timeout."""
    coming = asyncio.ensure_future(anext(items, None))
    try:
        yield coming
    finally:
        await abandon(coming)


async def _has_come(coming: asyncio.Future[Item], within_s: float) -> bool:
    done, _ = await asyncio.wait([coming], timeout=within_s)
    return bool(done)
