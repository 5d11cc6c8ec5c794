"""Signs of life in a stream between two hosts: whoever has nothing to say says so, and who hears nothing has lost it.

A process that dies closes its connections, and the other end knows at once. A host that loses power or a cable closes
nothing: TCP waits for many minutes, and gRPC's own pings are no help, because Serve's replicas take more than two in
five minutes for an attack. Knows nothing of what is streamed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from deployments.errors import StageSilentError

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
            coming = asyncio.ensure_future(anext(items, None))
            try:
                while not (await asyncio.wait([coming], timeout=every_s))[0]:
                    yield StillHere()
            finally:
                # Whoever leaves takes along what is being waited for.
                coming.cancel()
                await asyncio.wait([coming])
            if (item := coming.result()) is None:
                return
            yield item


async def listen(
    items: AsyncIterable[Item | StillHere], stage: str, *, silence_s: float = SILENCE_S
) -> AsyncGenerator[Item, None]:
    """The items of a stage without the signs. Raises StageSilentError when neither comes for `silence_s`."""
    coming = aiter(items)
    while True:
        try:
            async with asyncio.timeout(silence_s):
                item = await anext(coming, None)
        except TimeoutError:
            raise StageSilentError(
                f"the part of the service that works on this request has not been heard of for {silence_s:g} s", stage
            ) from None
        if item is None:
            return
        if not isinstance(item, StillHere):
            yield item
