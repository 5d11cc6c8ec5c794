"""Comments while a stream is silent, and nowhere else."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from starlette.types import Message

from deployments.http import sse
from deployments.http.heartbeats import Heartbeat
from deployments.messages import Item, Rejected
from deployments.openai_api.chat_response import ChatAnswer
from deployments.openai_api.reply_form import ReplyForm
from deployments.openai_api.responding import respond
from llava_core.errors import EngineError
from tests.deployments.fakes import ScriptedEngine, answer

SECONDS = 0.01


class _Client:
    """The client of one response: what it received, and a way to wait for the next comments."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.is_complete = False

    async def send(self, message: Message) -> None:
        assert not self.is_complete, "nothing follows the last piece"
        if message["type"] == "http.response.body":
            self.pieces.append(message["body"])
            self.is_complete = not message.get("more_body", False)

    async def receive(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def comments(self, count: int) -> None:
        already = self.pieces.count(sse.COMMENT)
        while self.pieces.count(sse.COMMENT) < already + count:
            await asyncio.sleep(0)

    async def run(self, response: Any) -> None:
        await response({"type": "http", "asgi": {"spec_version": "2.4"}}, self.receive, self.send)


def _answer(*, stream: bool = True) -> ChatAnswer:
    return ChatAnswer("id", "m", ReplyForm(stream=stream))


async def _slow(go_on: Callable[[], Any], *items: Item) -> AsyncGenerator[Item, None]:
    for item in items:
        await go_on()
        yield item


def test_a_waiting_stream_begins_and_sends_heartbeats_until_the_first_item() -> None:
    async def run() -> list[bytes]:
        client = _Client()
        items = _slow(lambda: client.comments(2), *answer("Hel", "lo"))
        # The first item waits for comments, so this returns only if the response begins without an item.
        response = await respond(_answer(), items, "r", SECONDS)
        await client.run(response)
        assert client.is_complete
        return client.pieces

    pieces = asyncio.run(run())
    events = [piece for piece in pieces if piece not in (sse.COMMENT, b"")]
    assert pieces[:2] == [sse.COMMENT] * 2
    assert b"Hel" in events[0]
    assert events[-1].endswith(sse.DONE)


def test_an_error_after_the_stream_has_begun_is_its_last_event() -> None:
    async def run() -> list[bytes]:
        client = _Client()
        items = _slow(lambda: client.comments(1), Rejected(EngineError("broken")))
        response = await respond(_answer(), items, "r", SECONDS)
        await client.run(response)
        assert response.status_code == 200
        return client.pieces

    *_, last, end = asyncio.run(run())
    assert b"engine_error" in last
    assert end == b""


def test_an_early_error_keeps_its_status() -> None:
    async def items() -> AsyncGenerator[Item, None]:
        yield Rejected(EngineError("broken"))

    assert asyncio.run(respond(_answer(), items(), "r", SECONDS)).status_code == 500


def test_a_stream_that_is_not_waiting_has_no_heartbeats() -> None:
    async def run() -> list[bytes]:
        client = _Client()

        async def at_once() -> None:
            await asyncio.sleep(0)

        await client.run(await respond(_answer(), _slow(at_once, *answer("a", "b")), "r", 60))
        return client.pieces

    assert sse.COMMENT not in asyncio.run(run())


@pytest.mark.parametrize("begun", [False, True])
def test_a_client_disconnect_frees_a_waiting_stream(*, begun: bool) -> None:
    engine = ScriptedEngine(hangs=True)

    async def run() -> None:
        client = _Client()

        async def serve() -> None:
            items = engine.stream(None, lambda: None)  # type: ignore[arg-type]
            await client.run(await respond(_answer(), items, "r", SECONDS if begun else 60))

        task = asyncio.create_task(serve())
        if begun:
            await client.comments(1)
        while not engine.num_open:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert (engine.num_open, engine.num_left_early) == (0, 1)


def test_no_heartbeats_before_a_response_or_after_it() -> None:
    async def run() -> None:
        client = _Client()
        heart = Heartbeat(client.send, SECONDS)
        async with heart.beating():
            await asyncio.sleep(5 * SECONDS)
            assert client.pieces == []
            await heart.send({"type": "http.response.start", "status": 200, "headers": []})
            await client.comments(1)
            await heart.send({"type": "http.response.body", "body": b"", "more_body": False})
            num_pieces = len(client.pieces)
            await asyncio.sleep(5 * SECONDS)
            assert len(client.pieces) == num_pieces
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_a_disconnected_client_stops_only_the_heartbeats() -> None:
    async def run() -> None:
        num_tried = 0

        async def send(message: Message) -> None:
            nonlocal num_tried
            if message["type"] == "http.response.body":
                num_tried += 1
                raise OSError

        heart = Heartbeat(send, SECONDS)
        async with heart.beating():
            await heart.send({"type": "http.response.start", "status": 200, "headers": []})
            while not num_tried:
                await asyncio.sleep(0)
        assert num_tried == 1

    asyncio.run(run())
