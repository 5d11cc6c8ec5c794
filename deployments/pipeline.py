"""The graph as the gateway sees it: a request into three stages, one stream of items out, every stage freed at the end.

Responses are passed on un-awaited, so pictures and features go from replica to replica. Knows no HTTP and no formats.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.handoff import Handoff
from deployments.messages import Item
from llava_core.errors import LlavaError
from llava_core.types import GenerationRequest

Handle = DeploymentHandle[Any]


@dataclass(frozen=True)
class StageHealth:
    """A stage is not ready when it does not answer in time, or with an error."""

    name: str
    is_ready: bool


class Pipeline:
    """Three stages and how requests pass through them. Handles are configured here, once."""

    def __init__(self, preprocessor: Handle, encoder: Handle, generator: Handle, handoff: Handoff) -> None:
        self._handoff = handoff
        self._prepare = handoff.calling(preprocessor, "prepare")
        self._encode = handoff.calling(encoder, "encode")
        self._generate = handoff.streaming(generator, "generate")
        self._pings = {
            "preprocessor": handoff.calling(preprocessor, "ping"),
            "vision_encoder": handoff.calling(encoder, "ping"),
            "generator": handoff.calling(generator, "ping"),
        }

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Item, None]:
        """Items up to the last one. Leaving early, by closing or cancelling, cancels the request on every stage."""
        # Held until the end: the results of the first two live as long as their responses do.
        calls: list[Any] = []
        is_complete = False
        try:
            calls.append(self._prepare.remote(request))
            if request.num_images:
                calls.append(self._encode.remote(calls[-1]))
            calls.append(self._generate.remote(await self._handoff.give(calls[-1])))
            async for item in calls[-1]:
                yield item
            is_complete = True
        finally:
            if not is_complete:
                for call in reversed(calls):
                    call.cancel()

    async def ping(self, timeout_s: float) -> list[StageHealth]:
        """Ask every stage at once; a real call through its handle, as requests make it."""
        names = list(self._pings)
        return list(await asyncio.gather(*(self._ping(name, timeout_s) for name in names)))

    async def _ping(self, name: str, timeout_s: float) -> StageHealth:
        response: Any = self._pings[name].remote()
        try:
            async with asyncio.timeout(timeout_s):
                await response
        except (TimeoutError, LlavaError, RayServeException, RayError):
            response.cancel()
            return StageHealth(name, is_ready=False)
        return StageHealth(name, is_ready=True)
