"""How many requests a gateway works on at once; any beyond that are refused before their bodies are read.

Each stage has a limit of its own, but a request meets it only once it gets there: in a burst, behind all the others.
Knows no routes and no stages.
"""

from __future__ import annotations

from collections.abc import Collection

from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.http.errors import describe, error_response
from llava_core.errors import OverloadedError


class InFlight:
    """Middleware for requests with a body. Queries about the service itself are answered however busy it is, and so are
    `light_routes`."""

    def __init__(self, app: ASGIApp, *, limit: int, light_routes: Collection[Route] = ()) -> None:
        self._app = app
        self._limit = limit
        self._light_routes = light_routes
        self._count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. A request counts until its answer is complete or its client has disconnected."""
        if scope["type"] != "http" or scope["method"] != "POST" or self._is_light(scope):
            await self._app(scope, receive, send)
            return
        if self._count >= self._limit:
            error = OverloadedError(
                f"the service works on {self._limit} requests, which is the limit; try again later", limit="in_flight"
            )
            await error_response(describe(error), scope["state"]["request_id"])(scope, receive, send)
            return
        self._count += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._count -= 1

    def _is_light(self, scope: Scope) -> bool:
        return any(route.matches(scope)[0] is Match.FULL for route in self._light_routes)
