"""Heartbeats of an idle stream: comments, which clients skip and proxies take for traffic.

Protocols without comments supply a sign of their own. Knows how an ASGI response is sent, but not what is in it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from starlette.types import Message, Send

from deployments.http import sse


def comment() -> bytes:
    """The heartbeat of server-sent events."""
    return sse.COMMENT


class Heartbeat:
    """Sends a sign whenever nothing else was sent for `seconds`, from the first to the last piece of the response."""

    def __init__(self, send: Send, seconds: float, sign: Callable[[], bytes] = comment) -> None:
        self._send = send
        self._sign = sign
        self._seconds = seconds
        self._sending = asyncio.Lock()
        self._sent_at = 0.0
        self._is_under_way = False

    async def send(self, message: Message) -> None:
        """ASGI's send; it also postpones the next heartbeat."""
        async with self._sending:
            await self._send(message)
            self._sent_at = asyncio.get_running_loop().time()
            self._is_under_way = message["type"] != "http.response.body" or message.get("more_body", False)

    @contextlib.asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        """Sends heartbeats while the block runs."""
        task = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _beat(self) -> None:
        clock = asyncio.get_running_loop()
        while True:
            left = self._sent_at + self._seconds - clock.time()
            await asyncio.sleep(left if left > 0 else self._seconds)
            async with self._sending:
                if not self._is_under_way or clock.time() < self._sent_at + self._seconds:
                    continue
                try:
                    await self._send({"type": "http.response.body", "body": self._sign(), "more_body": True})
                except OSError:
                    # The client has disconnected, which the sender of the answer detects, too.
                    return
                self._sent_at = clock.time()
