"""What the gateway measures: every HTTP request, around the whole app, and the pieces of every answer as they come.

Also logs one line for each request, with its route but never its content. Knows neither bodies nor stages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass

from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.http.request_context import RequestContext, current_request, request_context
from deployments.messages import Item, Rejected
from deployments.metrics import (
    CANCELLATIONS,
    CHUNK_GAP,
    ERRORS,
    HTTP_DURATION,
    HTTP_REQUESTS,
    REFUSALS,
    TIME_TO_FIRST_TOKEN,
    Recorder,
)

logger = logging.getLogger(__name__)
CLIENT_CLOSED_REQUEST = 499
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_OTHER = "other"


class RequestMetrics:
    """Wraps an ASGI app, and so counts every answer, whether from a route, a middleware or the last resort."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute], recorder: Recorder) -> None:
        self._app = app
        self._routes = tuple(route for route in routes if isinstance(route, Route))
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Before anything can change the scope.
        method, route = scope["method"], self._route(scope)
        response = _Response()

        async def watched(message: Message) -> None:
            response.note(message)
            await send(message)

        with request_context() as context:
            try:
                await self._app(scope, receive, watched)
            finally:
                self._record(method if method in _METHODS else _OTHER, route, response, context)

    def _route(self, scope: Scope) -> str:
        """The route's pattern and not the path, because clients could make up any number of paths."""
        return next((route.path for route in self._routes if route.matches(scope)[0] != Match.NONE), _OTHER)

    def _record(self, method: str, route: str, response: _Response, context: RequestContext) -> None:
        seconds = time.perf_counter() - context.started
        status = str(response.status if response.is_whole else CLIENT_CLOSED_REQUEST)
        self._recorder.count(HTTP_REQUESTS, method, route, status)
        self._recorder.observe(HTTP_DURATION, seconds, route)
        if status == str(CLIENT_CLOSED_REQUEST):
            self._recorder.count(CANCELLATIONS, "waiting" if response.is_whole or not response.status else "streaming")
        if context.error_code is not None:
            self._recorder.count(ERRORS, context.error_code)
        if context.limit is not None:
            self._recorder.count(REFUSALS, context.limit)
        known = {"status": status, "key_id": context.key_id, "error_code": context.error_code}
        fields = {name: value for name, value in known.items() if value is not None}
        logger.info("%s %s %s %.1f ms", method, route, status, seconds * 1e3, extra=fields)


@dataclass
class _Response:
    """What was sent. A response that was never completed was abandoned by its client."""

    status: int = 0
    is_whole: bool = False

    def note(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.is_whole = not message.get("more_body", False)


async def metered(items: AsyncGenerator[Item, None], recorder: Recorder, model: str) -> AsyncGenerator[Item, None]:
    """Yields the items and times each of them: the first since the start of its request, later ones since the previous
    piece of the same answer."""
    last: dict[int, float] = {}
    async with aclosing(items):
        async for item in items:
            if not isinstance(item, Rejected):
                now = time.perf_counter()
                if not last:
                    recorder.observe(TIME_TO_FIRST_TOKEN, now - current_request().started, model)
                elif item.index in last:
                    recorder.observe(CHUNK_GAP, now - last[item.index], model)
                last[item.index] = now
            yield item
