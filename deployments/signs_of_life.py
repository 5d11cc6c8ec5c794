"""Signs of life in a stream between two hosts: whoever has nothing to say says so, and who hears nothing has lost it.

A process that dies closes its connections, and the other end knows at once. A host that loses power or a cable closes
nothing: TCP waits for many minutes, and gRPC's own pings are no help, because servers, by its documentation, take more
than two in five minutes for an attack. Knows nothing of what is streamed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from deployments.waiting import abandon

Item = TypeVar("Item")

# How often who has nothing to say says so, and how long a stream may be silent: long enough for an event loop on a busy
# machine, and for a switch that restarts.
SIGN_S = 2.0
SILENCE_S = 10.0


@dataclass(frozen=True)
class StillHere:
    """Nothing has happened, on a host that is alive."""


async def with_signs(
    items: AsyncGenerator[Item, None], *, every_s: float = SIGN_S
) -> AsyncGenerator[Item | StillHere, None]:
    """The items, and a sign after every `every_s` without one. Closing it closes what gives the items."""
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
    """The items without the signs. When neither comes for `silence_s`, and again after as long, `when_silent` may raise
    what that means: where there is no replica yet, nobody can say anything."""
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
    """What comes next, None at the end. Whoever leaves the block takes along what is being waited for: not by
    `asyncio.timeout`, because Serve makes an error of its own of a cancellation, and that would not be known again."""
    coming = asyncio.ensure_future(anext(items, None))
    try:
        yield coming
    finally:
        await abandon(coming)


async def _has_come(coming: asyncio.Future[Item], within_s: float) -> bool:
    done, _ = await asyncio.wait([coming], timeout=within_s)
    return bool(done)
