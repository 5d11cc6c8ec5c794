"""How a request is taken in, on any route: its deadline, its body within the limits, and the body's content.

Knows no routes, and nothing about what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request

from deployments.http.bodies import BodyBudget, Lease, read_body
from deployments.http.deadlines import Deadline, read_deadline
from deployments.settings.app import LimitArgs
from llava_core.request_limits import RequestLimits

Given = TypeVar("Given")
# A body, an id for the request, and the limits.
Reader = Callable[[bytes, str, RequestLimits], Given]


class Intake:
    """The intake of one gateway, whose bodies share `limits.max_bytes_in_flight`."""

    def __init__(self, limits: LimitArgs) -> None:
        self.limits = limits
        self._bodies = BodyBudget(limits.max_bytes_in_flight)

    def lease(self) -> Lease:
        """One request's share of the bytes, initially empty."""
        return self._bodies.lease()

    def deadline(self, request: Request) -> Deadline:
        """The client's own deadline. Raises RequestError that names the header."""
        return read_deadline(request.headers, max_seconds=self.limits.max_timeout_seconds)

    async def read(self, request: Request, lease: Lease, read: Reader[Given], request_id: str) -> Given:
        """Reads the body and parses it with `read`. Raises what `read_body` and `read` do."""
        body = await read_body(
            request, lease, max_bytes=self.limits.max_body_bytes, max_seconds=self.limits.max_body_seconds
        )
        # Parsing JSON and base64 of several megabytes takes tens of milliseconds.
        return await asyncio.to_thread(read, body, request_id, self.limits.request)
