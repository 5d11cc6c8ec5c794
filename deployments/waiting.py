"""What asyncio leaves to whoever waits. Knows nothing of what is waited for."""

from __future__ import annotations

import asyncio
from typing import Any


async def abandon(*futures: asyncio.Future[Any]) -> None:
    """Cancel them, and return when all are over, however they end: what they hold is free then."""
    for each in futures:
        each.cancel()
    # Waiting takes a turn of the event loop also where nothing is left to wait for.
    if left := [each for each in futures if not each.done()]:
        await asyncio.wait(left)
    for each in futures:
        if not each.cancelled():
            # Nobody may care for it any more, of which asyncio would complain.
            each.exception()
