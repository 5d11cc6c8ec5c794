"""The asynchronous client over sockets: only its own code; what both clients share is tested with the blocking one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.messages import Rejected
from llava_core.client import (
    AnswerInterruptedError,
    AsyncClient,
    BadRequestError,
    ConnectionFailedError,
    InvalidResponseError,
    Question,
    RateLimitError,
    Retries,
    TimeoutExceededError,
)
from llava_core.client import asynchronous as module
from llava_core.errors import EngineError, RequestError
from llava_core.types import GenerationRequest, ImagePart, Message, TextPart, Usage
from tests.deployments.fakes import ScriptedEngine, answer
from tests.deployments.pictures import plain
from tests.sockets import SSE_HEAD, chunked, scripted, serving_engine, whole

RED = plain()
EVENT = b'data: {"choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": null}]}\n\n'
ANSWERED = whole("200 OK", b'{"choices": [{"index": 0, "message": {"content": "yes"}, "finish_reason": "stop"}]}')
BUSY = whole("429 Too Many Requests", b'{"error": {"message": "full", "code": "overloaded"}}', "retry-after: 2")


def run(url: str, work: Callable[[AsyncClient], Awaitable[Any]], **options: Any) -> Any:
    async def with_client() -> Any:
        async with AsyncClient(url, **options) as client:
            return await work(client)

    return asyncio.run(with_client())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def streamed(client: AsyncClient) -> str:
    async with client.stream("?") as stream:
        return "".join([delta.text async for delta in stream])


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that clients asked for, without really waiting."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(module, "sleep", sleep)
    return waited


def test_whole_and_streamed_answers_are_equal() -> None:
    engine = ScriptedEngine(answer("Hel", "lo"))

    async def work(client: AsyncClient) -> None:
        reply = await client.ask("What?", RED)
        async with client.stream("What?", RED) as stream:
            assert [delta.text async for delta in stream if delta.text] == ["Hel", "lo"]
        assert (reply.text, reply.usage, reply.finish_reason) == ("Hello", Usage(11, 2, image_tokens=4), "stop")
        assert (stream.reply.text, stream.reply.usage, stream.reply.finish_reason) == (
            reply.text,
            reply.usage,
            reply.finish_reason,
        )
        assert set(stream.reply.stage_ms) == set(reply.stage_ms) == {"prefill", "total"}
        assert await client.models() == ["m"]
        assert await client.is_healthy()

    with serving_engine(engine) as url:
        run(url, work)
    expected = (Message("user", (ImagePart(RED), TextPart("What?"))),)
    assert [request.messages for request in engine.requests if isinstance(request, GenerationRequest)] == [expected] * 2


def test_a_conversation_sends_its_history() -> None:
    engine = ScriptedEngine(answer("Hel", "lo"))

    async def work(client: AsyncClient) -> None:
        talk = client.conversation("Be brief.")
        await talk.ask("One?", RED)
        async with talk.stream("Two?") as stream:
            assert "".join([delta.text async for delta in stream]) == "Hello"
        assert len(talk.messages) == 4
        engine.items = [Rejected(RequestError("bad"))]
        with pytest.raises(BadRequestError):
            await talk.ask("Three?")
        assert len(talk.messages) == 4

    with serving_engine(engine) as url:
        run(url, work)
    last = engine.requests[-1]
    assert isinstance(last, GenerationRequest)
    assert last.system == "Be brief."
    assert [message.role for message in last.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert last.num_images == 1


@pytest.mark.parametrize("cancels", [False, True])
def test_closing_a_stream_or_cancelling_its_task_frees_the_request(*, cancels: bool) -> None:
    engine = ScriptedEngine(answer("a", "b")[:1], hangs=True)

    async def work(client: AsyncClient) -> None:
        begun = asyncio.Event()

        async def read() -> None:
            async with client.stream("?") as stream:
                async for _ in stream:
                    begun.set()
                    if not cancels:
                        return

        task = asyncio.create_task(read())
        await asyncio.wait_for(begun.wait(), 30)
        if cancels:
            task.cancel()
        await asyncio.wait([task])
        await until(lambda: engine.num_open == 0)

    with serving_engine(engine) as url:
        run(url, work)
    assert engine.num_left_early == 1


class Silent:
    """A server that never answers, and counts its connections."""

    def __init__(self) -> None:
        self.num_open = self.num_begun = 0

    async def hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_begun += 1
        self.num_open += 1
        await reader.read()
        self.num_open -= 1
        writer.close()

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        async with await asyncio.start_server(self.hold, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with AsyncClient(f"http://127.0.0.1:{port}") as client:
                yield client


def test_cancelling_a_question_closes_the_connection() -> None:
    async def work() -> None:
        silent = Silent()
        async with silent.client() as client:
            task = asyncio.create_task(client.ask("?"))
            await until(lambda: silent.num_open == 1)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            await until(lambda: silent.num_open == 0)

    asyncio.run(work())


def test_cancelling_a_batch_stops_running_and_pending_questions() -> None:
    async def work() -> None:
        silent = Silent()
        async with silent.client() as client:
            batch = client.batch([Question(str(index)) for index in range(10)], concurrency=3)
            first = asyncio.ensure_future(anext(batch))
            await until(lambda: silent.num_open == 3)
            first.cancel()
            await asyncio.wait([first])
            await until(lambda: silent.num_open == 0)
        assert silent.num_begun == 3

    asyncio.run(work())


def test_retry_after_is_respected_up_to_the_retry_limit(waits: list[float]) -> None:
    with scripted(BUSY, b"", ANSWERED) as server:
        assert run(server.url, lambda client: client.ask("?")).text == "yes"
    assert 2 <= waits[0] <= 2.5
    assert (len(waits), len(server.requests)) == (2, 3)
    with scripted(BUSY) as server, pytest.raises(RateLimitError):
        run(server.url, streamed, retries=Retries(most=1))
    assert len(server.requests) == 2


def test_a_broken_stream_is_not_retried(waits: list[float]) -> None:
    engine = ScriptedEngine([*answer("Hel", "lo")[:1], EngineError("broken")])
    with serving_engine(engine) as url, pytest.raises(AnswerInterruptedError) as raised:
        run(url, streamed)
    assert (raised.value.code, raised.value.text) == ("engine_error", "Hel")
    for ending in (b"", b"0\r\n\r\n"):
        with scripted(SSE_HEAD + chunked(EVENT) + ending) as server, pytest.raises(AnswerInterruptedError) as cut:
            run(server.url, streamed)
        assert (cut.value.text, len(server.requests)) == ("Hel", 1)
    assert (len(engine.requests), waits) == (1, [])


def test_errors_are_the_same_as_the_blocking_clients(waits: list[float]) -> None:
    with scripted(whole("200 OK", b"garbage")) as server, pytest.raises(InvalidResponseError):
        run(server.url, lambda client: client.ask("?"))
    with pytest.raises(ConnectionFailedError):
        run("http://127.0.0.1:9", lambda client: client.ask("?"), retries=Retries(most=0))
    assert not run("http://127.0.0.1:9", lambda client: client.is_healthy())
    engine = ScriptedEngine(hangs=True)
    with serving_engine(engine) as url, pytest.raises(TimeoutExceededError) as late:
        run(url, lambda client: client.ask("?", deadline_s=0.3))
    assert late.value.code == "deadline_exceeded"
    assert waits == []


def test_a_batch_reports_errors_per_item(tmp_path: Path) -> None:
    questions = [Question("a", (RED,)), Question("b", (tmp_path / "none.png",)), Question("c", options={"top_p": 9})]

    async def work(client: AsyncClient) -> list[str]:
        return [
            result.reply.text if result.reply else type(result.error).__name__
            async for result in client.batch(questions, concurrency=2)
        ]

    with serving_engine(ScriptedEngine(answer("yes"))) as url:
        assert run(url, work) == ["yes", "RequestError", "BadRequestError"]
