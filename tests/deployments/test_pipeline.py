"""The graph on fake handles: what is passed to whom, and what is cancelled when a client leaves."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from deployments.handoff import LocalHandoff
from deployments.messages import Item
from deployments.pipeline import Pipeline, StageHealth
from llava_core.errors import EngineError
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TextPart
from tests.deployments.fakes import FakeHandle, FakeResponse, answer


def _request(*parts: TextPart | ImagePart) -> GenerationRequest:
    return GenerationRequest("id", (Message("user", parts),), SamplingParams())


class _Graph:
    """Three fake stages."""

    def __init__(self, items: list[Item], *, hangs: bool = False) -> None:
        async def generate(_given: object) -> AsyncGenerator[Item, None]:
            for item in items:
                yield item
            if hangs:
                await asyncio.Event().wait()

        def ping() -> None:
            return None

        self.preprocessor = FakeHandle(prepare=lambda request: request, ping=ping)
        self.encoder = FakeHandle(encode=lambda prepared: prepared, ping=ping)
        self.generator = FakeHandle(generate=generate, ping=ping)

    @property
    def pipeline(self) -> Pipeline:
        handles: Any = (self.preprocessor, self.encoder, self.generator)
        return Pipeline(*handles, LocalHandoff())

    @property
    def responses(self) -> list[FakeResponse]:
        handles = (self.preprocessor, self.encoder, self.generator)
        return [response for handle in handles for _, _, response in handle.calls]


async def _items(pipeline: Pipeline, request: GenerationRequest) -> list[Item]:
    return [item async for item in pipeline.stream(request)]


def test_responses_are_passed_from_stage_to_stage_unawaited() -> None:
    graph = _Graph([*answer("a", "b")])
    request = _request(ImagePart(b"x"), TextPart("hi"))
    assert asyncio.run(_items(graph.pipeline, request)) == answer("a", "b")
    [(_, prepared_args, prepared)] = graph.preprocessor.calls
    [(_, encoded_args, encoded)] = graph.encoder.calls
    [(_, generated_args, _)] = graph.generator.calls
    assert prepared_args == (request,)
    assert encoded_args == (prepared,)
    assert generated_args == (encoded,)
    assert not any(response.is_cancelled for response in graph.responses)


def test_text_alone_goes_past_the_encoder() -> None:
    graph = _Graph([*answer("a")])
    asyncio.run(_items(graph.pipeline, _request(TextPart("hi"))))
    assert graph.encoder.calls == []
    assert graph.generator.calls[0][1] == (graph.preprocessor.calls[0][2],)


def test_leaving_early_cancels_every_stage() -> None:
    graph = _Graph([*answer("a", "b")])

    async def leave() -> None:
        async with aclosing(graph.pipeline.stream(_request(ImagePart(b"x")))) as items:
            await anext(items)

    asyncio.run(leave())
    assert len(graph.responses) == 3
    assert all(response.is_cancelled for response in graph.responses)


def test_cancelling_cancels_every_stage() -> None:
    graph = _Graph([answer("a", "b")[0]], hangs=True)

    async def cancel() -> None:
        async def read() -> None:
            async for _ in graph.pipeline.stream(_request(TextPart("hi"))):
                started.set()

        started = asyncio.Event()
        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert all(response.is_cancelled for response in graph.responses)


def test_ping_asks_every_stage() -> None:
    names = ("preprocessor", "vision_encoder", "generator")
    assert asyncio.run(_Graph([]).pipeline.ping(1.0)) == [StageHealth(name, is_ready=True) for name in names]


def test_a_stage_that_fails_or_hangs_has_no_status_and_no_open_call() -> None:
    graph = _Graph([])

    def fail() -> None:
        raise EngineError("dead")

    graph.encoder = FakeHandle(encode=None, ping=lambda: asyncio.Event().wait())
    graph.generator = FakeHandle(generate=None, ping=fail)
    health = asyncio.run(graph.pipeline.ping(0.05))
    assert [stage.is_ready for stage in health] == [True, False, False]
    assert graph.encoder.calls[0][2].is_cancelled
