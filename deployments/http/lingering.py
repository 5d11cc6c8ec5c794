"""The rest of a body whose request is answered before it has arrived: read and thrown away, so that the answer arrives.

If the connection were closed at once, the network would report it as broken to a client that is still sending, and many
clients then report that instead of the refusal. So the answer is sent, and the rest of the body is read for a while
before the connection is closed: what web servers call a lingering close. Knows no routes, and not why a request is
refused.
"""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Pictures of 20 MB, in base64, need 22 Mbit/s to arrive by then.
_MAX_SECONDS = 10.0
# Serve counts such a connection among the `gateway.max_ongoing_requests` (1000) until it is closed. Clients without a
# key must not be able to occupy them all.
_MAX_CONNECTIONS = 200


class LingeringClose:
    """Middleware. Reads no more than `max_bytes` of a body, for no longer than `max_seconds`, and of no more than
    `max_connections` requests at once; beyond that it closes the connection."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int,
        max_seconds: float = _MAX_SECONDS,
        max_connections: int = _MAX_CONNECTIONS,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._max_connections = max_connections
        self._count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. The app has ended, and holds nothing more of the request, before the rest of the body is read."""
        num_announced = _num_announced(scope) if scope["type"] == "http" else 0
        if not num_announced:
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            if exchange.is_end_held_back:
                if num_announced <= self._max_bytes and self._count < self._max_connections:
                    await self._throw_away(exchange)
                await send({"type": "http.response.body"})

    async def _throw_away(self, exchange: _Exchange) -> None:
        self._count += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._max_seconds):
                    while not exchange.is_body_over and exchange.num_bytes <= self._max_bytes:
                        await exchange.receive()
        finally:
            self._count -= 1


class _Exchange:
    """One request and its response, whose end is held back while more of the body may come: with it the server would
    close the connection."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.num_bytes = 0
        self.is_body_over = False
        self.is_end_held_back = False

    async def receive(self) -> Message:
        """ASGI's receive."""
        message = await self._receive()
        self.num_bytes += len(message.get("body", b""))
        # Nothing more comes from a client that has disconnected, either.
        self.is_body_over = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """ASGI's send. The response itself is not held back: most clients look for it while they are sending."""
        if not self.is_body_over:
            if message["type"] == "http.response.start":
                # Otherwise the server would wait for the rest of any body, however large, to use the connection again.
                MutableHeaders(scope=message)["connection"] = "close"
            elif not message.get("more_body", False):
                self.is_end_held_back = True
                message = {**message, "more_body": True}
        await self._send(message)


def _num_announced(scope: Scope) -> int:
    """The length of the body; 1 if it is sent in chunks, whose number only the last one shows."""
    headers = Headers(scope=scope)
    return 1 if "transfer-encoding" in headers else int(headers.get("content-length", "0"))
