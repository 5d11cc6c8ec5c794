"""The graph on fake handles: what each stage receives, and what is cancelled when a client leaves."""

import asyncio
import weakref
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError
from starlette.testclient import TestClient

from deployments.errors import ContentRefusedError, StageLostError, StageSilentError
from deployments.gateway import Gateway
from deployments.graph import stage_call
from deployments.graph.affinity import Session, affinity_key
from deployments.graph.handoff import LocalHandoff
from deployments.graph.pipeline import Pipeline
from deployments.graph.sent_calls import SENT_CALLS, Whereabouts
from deployments.messages import Item, Rejected
from llava_core.errors import OverloadedError, RequestError
from llava_core.types import AnyRequest, GenerationRequest, ImagePart, Message, SamplingParams, TextPart
from tests.deployments.fakes import FakeHandle, FakeResponse, all_ready, answer
from tests.deployments.pictures import data_url, plain


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

        self.preprocessor = FakeHandle(prepare=lambda request, _model: request)
        self.encoder = FakeHandle(encode=lambda prepared: prepared)
        self.generator = FakeHandle(generate=generate)

    @property
    def pipeline(self) -> Pipeline:
        handles: Any = (self.preprocessor, self.encoder, self.generator)
        return Pipeline(*handles, LocalHandoff(), model="m")

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
    assert prepared_args == (request, "m")
    assert encoded_args == (prepared,)
    assert generated_args == (encoded,)
    assert not any(response.is_cancelled for response in graph.responses)


def test_text_alone_skips_the_encoder() -> None:
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


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("items", "status"), [([*answer("a", "b")], 200), ([Rejected(RequestError("bad", param="messages"))], 400)]
)
def test_nothing_is_cancelled_after_a_complete_answer(*, items: list[Item], status: int, stream: bool) -> None:
    graph = _Graph(items)
    content = [{"type": "image_url", "image_url": {"url": data_url(plain())}}, {"type": "text", "text": "hi"}]
    with TestClient(Gateway({"m": graph.pipeline}, all_ready).app) as client:
        response = client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], "stream": stream}
        )
    assert response.status_code == status
    assert len(graph.responses) == 3
    assert not any(response.is_cancelled for response in graph.responses)


class _Elsewhere(LocalHandoff):
    """Keeps requests outside this process, like Ray's store."""

    def keep(self, request: AnyRequest) -> object:
        return "kept"


def test_the_request_is_released_before_the_answer_begins() -> None:
    graph = _Graph([*answer("a")])
    seen: list[int] = []

    async def read() -> None:
        request = _request(ImagePart(b"x"))
        handles: Any = (graph.preprocessor, graph.encoder, graph.generator)
        pipeline = Pipeline(*handles, _Elsewhere(), model="m")
        items = pipeline.stream(request, lambda: seen.append(len(graph.generator.calls)))
        watched = weakref.ref(request)
        del request
        await anext(items)
        assert watched() is None
        await items.aclose()

    asyncio.run(read())
    assert seen == [0]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(BackPressureError(1, 1), OverloadedError), (ActorDiedError(), ContentRefusedError), (ZeroDivisionError(), None)],
)
def test_rays_errors_are_translated_into_ours(raised: Exception, expected: type[Exception] | None) -> None:
    graph = _Graph([])

    async def generate(*_given: object) -> AsyncGenerator[Item, None]:
        yield answer("a", "b")[0]
        raise raised

    graph.generator = FakeHandle(generate=generate)
    with pytest.raises(expected or type(raised)):
        asyncio.run(_items(graph.pipeline, _request(TextPart("hi"))))
    assert all(response.is_cancelled for response in graph.responses)


def _keys(stage: FakeHandle) -> list[str]:
    return [Session.read(session).key for session in stage.sessions]


class _Dying:
    """A generator whose replicas die `deaths` times before their first item, or report another stage's death."""

    def __init__(self, deaths: int, *, tells: bool) -> None:
        self._deaths = deaths
        self._tells = tells
        self.num_calls = 0

    async def __call__(self, *_given: object) -> AsyncGenerator[Item, None]:
        self.num_calls += 1
        if self.num_calls <= self._deaths:
            if not self._tells:
                raise ActorDiedError
            yield Rejected(StageLostError("gone"))
            return
        for item in answer("a", "b"):
            yield item


@pytest.mark.parametrize("tells", [True, False])
def test_a_loss_before_the_first_item_is_retried_from_the_last_surviving_result(*, tells: bool) -> None:
    graph = _Graph([])
    dying = _Dying(1, tells=tells)
    graph.generator = FakeHandle(generate=dying)
    request = _request(ImagePart(b"x"), TextPart("hi"))
    assert asyncio.run(_items(graph.pipeline, request)) == answer("a", "b")
    # If only the last stage is lost, the results of the first stages still exist.
    times = 2 if tells else 1
    assert [args for _, args, _ in graph.preprocessor.calls] == [(request, "m")] * times
    assert (len(graph.encoder.calls), dying.num_calls) == (times, 2)
    assert graph.generator.calls[-1][1] == (graph.encoder.calls[-1][2],)
    # The calls of the last attempt.
    assert not any(handle.calls[-1][2].is_cancelled for handle in (graph.preprocessor, graph.encoder, graph.generator))


@pytest.mark.parametrize("tells", [True, False])
def test_content_that_is_lost_twice_is_then_refused(*, tells: bool) -> None:
    graph = _Graph([])
    dying = _Dying(2, tells=tells)
    graph.generator = FakeHandle(generate=dying)
    pipeline = graph.pipeline

    async def run() -> None:
        for _ in range(3):
            with pytest.raises(ContentRefusedError):
                await _items(pipeline, _request(ImagePart(b"x"), TextPart("hi")))
        # Other requests are served, by the replica that the service has by now.
        assert await _items(pipeline, _request(ImagePart(b"y"))) == answer("a", "b")

    asyncio.run(run())
    assert dying.num_calls == 3


def test_a_loss_after_the_last_item_is_ignored() -> None:
    graph = _Graph([])

    async def generate(_given: object) -> AsyncGenerator[Item, None]:
        for item in answer("a", "b"):
            yield item
        raise ActorDiedError

    graph.generator = FakeHandle(generate=generate)
    assert asyncio.run(_items(graph.pipeline, _request(TextPart("hi")))) == answer("a", "b")
    assert len(graph.generator.calls) == 1


def test_leaving_during_a_retry_cancels_every_stage() -> None:
    graph = _Graph([])
    again = asyncio.Event()

    async def generate(_given: object) -> AsyncGenerator[Item, None]:
        if len(graph.generator.calls) == 1:
            raise ActorDiedError
        again.set()
        await asyncio.Event().wait()
        yield answer("a")[0]

    graph.generator = FakeHandle(generate=generate)

    async def run() -> None:
        task = asyncio.create_task(_items(graph.pipeline, _request(ImagePart(b"x"))))
        await again.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert len(graph.responses) == 4
    assert all(response.is_cancelled for response in graph.responses)


def test_a_loss_while_tokenizing_is_retried_too() -> None:
    graph = _Graph([])

    def tokenize(_request: object, _model: str) -> str:
        if len(graph.preprocessor.calls) == 1:
            raise ActorDiedError
        return "ids"

    graph.preprocessor = FakeHandle(tokenize=tokenize)
    assert asyncio.run(graph.pipeline.tokenize(_request(TextPart("hi")))) == "ids"


def test_the_first_stage_tokenizes_and_is_cancelled_with_its_caller() -> None:
    graph = _Graph([])
    forever = asyncio.Event()
    graph.preprocessor = FakeHandle(tokenize=lambda *_: "ids", detokenize=lambda *_: forever.wait())
    pipeline = graph.pipeline

    async def run() -> None:
        assert await pipeline.tokenize(_request(TextPart("hi"))) == "ids"
        task = asyncio.create_task(pipeline.detokenize([1]))
        while len(graph.preprocessor.calls) < 2:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert [(name, response.is_cancelled) for name, _, response in graph.preprocessor.calls] == [
        ("tokenize", False),
        ("detokenize", True),
    ]
    assert [args[-1] for _, args, _ in graph.preprocessor.calls] == ["m", "m"]


def test_overload_while_tokenizing_is_our_error_too() -> None:
    def busy(*_: object) -> None:
        raise BackPressureError(1, 1)

    graph = _Graph([])
    graph.preprocessor = FakeHandle(tokenize=busy)
    with pytest.raises(OverloadedError):
        asyncio.run(graph.pipeline.tokenize(_request(TextPart("hi"))))


def test_calls_carry_the_affinity_key_also_when_retried() -> None:
    graph = _Graph([])
    graph.generator = FakeHandle(generate=_Dying(1, tells=False))
    request = _request(ImagePart(b"x"), TextPart("hi"))
    asyncio.run(_items(graph.pipeline, request))
    for stage, times in ((graph.preprocessor, 1), (graph.encoder, 1), (graph.generator, 2)):
        assert _keys(stage) == [affinity_key(request)] * times
        # Then the router knows which replica has lost it.
        assert len(set(stage.sessions)) == 1


@pytest.mark.parametrize("tells", [True, False])
def test_a_stage_that_reports_a_loss_is_not_blamed_for_it(*, tells: bool) -> None:
    """To its router, a repeated request counts as lost by its replica."""
    graph = _Graph([])
    graph.generator = FakeHandle(generate=_Dying(1, tells=tells))
    asyncio.run(_items(graph.pipeline, _request(ImagePart(b"x"), TextPart("hi"))))
    requests = {Session.read(session).request for session in graph.generator.sessions}
    assert len(requests) == (2 if tells else 1)
    assert len({Session.read(session).request for session in graph.encoder.sessions}) == 1


def test_text_has_an_affinity_key_only_at_the_last_stage() -> None:
    graph = _Graph([*answer("a")])
    graph.preprocessor = FakeHandle(prepare=lambda request, _model: request, tokenize=lambda *_: "ids")
    request = _request(TextPart("hi"))

    async def run() -> None:
        await _items(graph.pipeline, request)
        await graph.pipeline.tokenize(request)
        await graph.pipeline.tokenize(_request(ImagePart(b"x")))

    asyncio.run(run())
    assert _keys(graph.generator) == [affinity_key(request)]
    assert _keys(graph.preprocessor) == ["", "", affinity_key(_request(ImagePart(b"x")))]


@pytest.mark.parametrize("stage", ["preprocessor", "encoder"])
def test_work_of_an_unreachable_stage_is_redone_by_another_replica(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Its call does not end, and no connection is closed."""
    monkeypatch.setattr(stage_call, "ASKED_AFTER_S", 0.02)
    monkeypatch.setattr(stage_call, "SILENCE_S", 0.05)
    graph = _Graph([])

    async def out_of_reach_once(*_given: object) -> str:
        if len(getattr(graph, stage).calls) == 1:
            await asyncio.Event().wait()
        return "made"

    async def passed_on(given: Any) -> Any:
        return await given

    async def generate(given: Any) -> AsyncGenerator[Item, None]:
        assert await given == "made"
        for item in answer("a", "b"):
            yield item

    class Watched(LocalHandoff):
        def is_made(self, given: object) -> bool:
            return given is not getattr(graph, stage).calls[0][2]

    async def read() -> list[Item]:
        handles: Any = (graph.preprocessor, graph.encoder, graph.generator)
        reading = asyncio.create_task(_items(Pipeline(*handles, Watched(), model="m"), _request(ImagePart(b"x"))))
        handle: Any = getattr(graph, stage)
        while not handle.calls:
            await asyncio.sleep(0)
        # What its router would note.
        where = Whereabouts(lambda: [_Unreachable()], is_sent=True)
        SENT_CALLS.note(handle.deployment_name, Session.read(handle.sessions[0]).request, where)
        return await reading

    graph.encoder, graph.generator = FakeHandle(encode=passed_on), FakeHandle(generate=generate)
    setattr(graph, stage, FakeHandle(**{"prepare" if stage == "preprocessor" else "encode": out_of_reach_once}))
    assert asyncio.run(read()) == answer("a", "b")
    assert [response.is_cancelled for _, _, response in getattr(graph, stage).calls] == [True, False]
    assert not SENT_CALLS._watched


@pytest.mark.parametrize(("node_of_earlier", "num_prepared"), [("lost", 2), ("other", 1)])
def test_results_of_earlier_stages_on_a_silent_node_count_as_lost(node_of_earlier: str, num_prepared: int) -> None:

    def sent(handle: FakeHandle, node: str) -> None:
        """Its router's part."""
        session = Session.read(handle.sessions[-1])
        SENT_CALLS.note(
            handle.deployment_name, session.request, Whereabouts(lambda: [_Unreachable(node)], is_sent=True)
        )

    async def generate(_given: object, *_begun: object) -> AsyncGenerator[Item, None]:
        first, last = answer("a", "b")
        if len(generator.calls) > 1:
            yield last
            return
        sent(preprocessor, node_of_earlier)
        sent(generator, "lost")
        yield first
        raise StageSilentError(stage="generator")

    preprocessor, generator = FakeHandle(prepare=lambda *_: "prepared"), FakeHandle(generate=generate)
    handles: Any = (preprocessor, FakeHandle(), generator)
    request = _request(TextPart("hi"))
    assert asyncio.run(_items(Pipeline(*handles, LocalHandoff(), model="m"), request)) == answer("a", "b")
    assert len(preprocessor.calls) == num_prepared
    assert not SENT_CALLS._watched


class _Unreachable:
    def __init__(self, node_id: str = "node") -> None:
        self.node_id = node_id

    async def get_queue_len(self, *, deadline_s: float) -> int:
        await asyncio.Event().wait()
        return 0
