"""The yardstick: a Ray Serve graph with as many hops as ours that computes nothing, composed as Ray documents it.

Gateway → A → B → C; responses are passed on without awaiting them, and C streams a fake answer. Knows nothing about
models.
"""

from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import StreamingResponse

Handle = DeploymentHandle[Any]
FIRST = 'data: {"choices": [{"delta": {"content": "."}}]}\n\n'
LAST = 'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}\n\ndata: [DONE]\n\n'


class Pass:
    """Returns its argument."""

    async def __call__(self, value: object) -> object:
        return value


class Stream:
    """Yields two chunks."""

    async def __call__(self, value: object) -> AsyncGenerator[str, None]:
        yield FIRST
        yield LAST


class Entrance:
    """Sends each request through the three other deployments."""

    def __init__(self, first: Handle, second: Handle, last: Handle) -> None:
        self.first, self.second, self.last = first, second, last.options(stream=True)

    async def __call__(self, request: Request) -> StreamingResponse:
        body = await request.body()
        chunks: Any = self.last.remote(self.second.remote(self.first.remote(len(body))))
        return StreamingResponse(chunks, media_type="text/event-stream")


def build_empty_graph() -> Application:
    """Build the application; run it under its own route prefix."""
    stages = _deploy(Pass, "A").bind(), _deploy(Pass, "B").bind(), _deploy(Stream, "C").bind()
    return _deploy(Entrance, "Entrance").bind(*stages)


def _deploy(cls: type, name: str) -> Deployment:
    decorate = serve.deployment(name=name, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=64)
    deployment: Deployment = decorate(cls)
    return deployment
