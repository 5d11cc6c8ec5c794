"""Items and frames become a response: refusals, keep-alive frames, and freeing what clients abandon."""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from starlette.types import Message

from deployments.errors import DeadlineError, RequestTooLargeError, WorkerFailedError
from deployments.http.request_context import request_context
from deployments.llava_protocol.frames import SERVER_ERROR, Frame, error_frame
from deployments.llava_protocol.generation import Echo
from deployments.llava_protocol.streaming import from_items, respond, told, too_long
from deployments.messages import Item, Rejected
from llava_core.errors import EngineError, LlavaError, OverloadedError, PromptTooLongError, RequestError
from llava_core.types import TokenDelta
from tests.deployments.fakes import answer

ECHO = Echo("P:", (" ",))


async def _items(*items: Item) -> AsyncGenerator[Item, None]:
    for item in items:
        yield item


def _frames_of(*items: Item) -> list[Frame]:
    async def collect() -> list[Frame]:
        return [frame async for frame in from_items(ECHO, _items(*items))]

    return asyncio.run(collect())


def test_every_text_contains_the_previous_ones() -> None:
    assert [frame.text for frame in _frames_of(*answer("a ", "b", " c"))] == ["P:a", "P:a b", "P:a b c"]


def test_an_item_without_text_yields_no_frame_unless_it_is_the_last() -> None:
    empty = TokenDelta("id", "", (1,))
    assert [frame.text for frame in _frames_of(empty, empty, *answer("x", ""))] == ["P:x", "P:x"]
    # An empty answer is valid.
    assert [frame.text for frame in _frames_of(empty, *answer(""))] == ["P:"]


def test_a_prompt_that_is_too_long_is_answered_with_a_notice_and_counted() -> None:
    with request_context() as context:
        assert _frames_of(Rejected(PromptTooLongError("600 tokens"))) == [too_long(ECHO)]
    assert context.error_code == "context_length_exceeded"
    assert too_long(ECHO) == Frame("P:Exceeds max token length. Please start a new conversation, thanks.", 0)


def test_an_error_during_an_answer_is_one_more_frame() -> None:
    first, last = _frames_of(TokenDelta("id", "x", (1,)), Rejected(EngineError("broken")))
    assert (first.text, last.text, last.error_code) == ("P:x", SERVER_ERROR, 1)


def test_an_error_of_a_worker_is_the_last_frame() -> None:
    async def failing() -> AsyncGenerator[Frame, None]:
        yield Frame("P:x")
        raise WorkerFailedError("cut_off", "gone")

    async def collect() -> list[int]:
        return [frame.error_code async for frame in told(failing())]

    assert asyncio.run(collect()) == [0, 3]


class _Client:
    def __init__(self) -> None:
        self.start: Message = {}
        self.pieces: list[bytes] = []
        self.hangs_up = asyncio.Event()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
        else:
            self.pieces.append(message["body"])

    async def receive(self) -> Message:
        await self.hangs_up.wait()
        return {"type": "http.disconnect"}

    async def run(self, response: Any) -> None:
        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, self.receive, self.send)

    async def received(self, count: int) -> None:
        while len(self.pieces) < count:
            await asyncio.sleep(0)


async def _yielding(frames: Sequence[Frame]) -> AsyncGenerator[Frame, None]:
    for frame in frames:
        yield frame


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OverloadedError("full", limit="engine", retry_after_s=7), 429),
        (DeadlineError("late"), 504),
        (RequestTooLargeError("large"), 413),
        (RequestError("bad"), 200),
        (EngineError("broken"), 200),
        (WorkerFailedError("silent", ""), 200),
    ],
)
def test_errors_unknown_to_the_reference_have_their_own_status(error: LlavaError, status: int) -> None:
    response = asyncio.run(respond(ECHO, _yielding([error_frame(error)]), "r", explains=False))
    assert response.status_code == status
    assert response.headers.get("retry-after") == ("7" if status == 429 else None)


def test_the_last_frame_is_repeated_while_nothing_is_generated() -> None:
    async def run() -> list[Any]:
        client, may_go_on = _Client(), [asyncio.Event(), asyncio.Event()]

        async def slow() -> AsyncGenerator[Frame, None]:
            await may_go_on[0].wait()
            yield Frame("P:x")
            await may_go_on[1].wait()
            yield Frame("P:x y")

        running = asyncio.create_task(client.run(await respond(ECHO, slow(), "r", explains=False, beat_s=0.01)))
        # Before its first token, the text is the prompt.
        await client.received(2)
        may_go_on[0].set()
        await client.received(len(client.pieces) + 3)
        may_go_on[1].set()
        await running
        return [json.loads(piece[:-1])["text"] for piece in client.pieces if piece]

    texts = asyncio.run(run())
    assert texts[:2] == ["P:", "P:"]
    assert texts[-1] == "P:x y"
    assert texts.count("P:x") >= 2
    # The text never becomes shorter.
    assert texts == sorted(texts, key=len)


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_client_disconnect_cancels_the_answer(*, has_begun: bool) -> None:
    async def run() -> bool:
        client, is_left = _Client(), False

        async def endless() -> AsyncGenerator[Frame, None]:
            nonlocal is_left
            try:
                if has_begun:
                    yield Frame("P:x")
                await asyncio.Event().wait()
            finally:
                is_left = True

        running = asyncio.create_task(client.run(await respond(ECHO, endless(), "r", explains=False, beat_s=0.01)))
        await client.received(1)
        client.hangs_up.set()
        await running
        return is_left

    assert asyncio.run(run())
