"""The yardstick: a Ray Serve graph with as many hops as ours that computes nothing, in Ray's documented composition.

Gateway → A → B → C, un-awaited responses passed on, C streams. Knows nothing about models.
"""

from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import StreamingResponse

_LIGHT: dict[str, Any] = {"num_cpus": 0}


@serve.deployment(ray_actor_options=_LIGHT)
class Pass:
    """Returns what it is given."""

    async def __call__(self, value: object) -> object:
        return value


@serve.deployment(ray_actor_options=_LIGHT, max_ongoing_requests=64)
class Stream:
    """Yields two chunks."""

    async def __call__(self, value: object) -> AsyncGenerator[str, None]:
        yield "data: first\n\n"
        yield "data: [DONE]\n\n"


@serve.deployment(ray_actor_options=_LIGHT, max_ongoing_requests=64)
class Entrance:
    """Sends each request through the three others."""

    def __init__(self, first: DeploymentHandle, second: DeploymentHandle, last: DeploymentHandle) -> None:
        self.first, self.second, self.last = first, second, last.options(stream=True)

    async def __call__(self, request: Request) -> StreamingResponse:
        body = await request.body()
        response = self.second.remote(self.first.remote(len(body)))
        return StreamingResponse(self.last.remote(response), media_type="text/event-stream")


def build_empty_graph() -> Application:
    """The application; run it under a route prefix of its own."""
    return Entrance.bind(Pass.options(name="A").bind(), Pass.options(name="B").bind(), Stream.bind())
