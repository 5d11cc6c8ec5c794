"""Cancels asyncio futures and waits until they have ended. Knows nothing about what they compute."""

from __future__ import annotations

import asyncio
from typing import Any


async def abandon(*futures: asyncio.Future[Any]) -> None:
    """Cancel the futures and return once all have ended, however they end, so that what they held is released."""
    for each in futures:
        each.cancel()
    # asyncio.wait yields to the event loop even when every future is done.
    if left := [each for each in futures if not each.done()]:
        await asyncio.wait(left)
    for each in futures:
        if not each.cancelled():
            # Retrieved, because asyncio logs exceptions that nobody looks at.
            each.exception()
