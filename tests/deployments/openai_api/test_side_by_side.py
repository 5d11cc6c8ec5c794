"""Streams of several prompts as one: indices, usage, errors, and that every stream is freed."""

import asyncio
import weakref
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from deployments.messages import Item, Rejected
from deployments.openai_api.side_by_side import side_by_side
from llava_core.errors import EngineError, RequestError
from llava_core.types import CompletionRequest, SamplingParams, TokenDelta, Usage
from tests.deployments.fakes import ScriptedEngine, answer, collector_paused


def _stream(engine: ScriptedEngine) -> AsyncGenerator[Item, None]:
    return engine.stream(CompletionRequest("id", "x", SamplingParams()), lambda: None)


def _items(*engines: ScriptedEngine, num_answers: int = 1) -> list[Item]:
    async def run() -> list[Item]:
        return [item async for item in side_by_side([_stream(engine) for engine in engines], num_answers)]

    return asyncio.run(run())


def test_answers_have_an_index_and_the_last_reports_the_total_usage() -> None:
    first, second = ScriptedEngine(answer("a", "b")), ScriptedEngine(answer("c", "d", "e"))
    items = _items(first, second)
    texts = {index: "".join(item.text for item in items if _delta(item).index == index) for index in (0, 1)}
    assert texts == {0: "ab", 1: "cde"}
    assert [_delta(item).usage for item in items[:-1]] == [None] * 4
    assert _delta(items[-1]).usage == Usage(22, 5, 8)
    assert _delta(items[-1]).stage_ms == {"prefill": 2.0}
    assert [_delta(item).finish_reason for item in items].count("stop") == 2
    assert first.num_left_early == second.num_left_early == 0


def _delta(item: Item) -> TokenDelta:
    assert isinstance(item, TokenDelta)
    return item


def test_answers_to_one_prompt_have_consecutive_indices() -> None:
    def engine(text: str) -> ScriptedEngine:
        *others, last = answer(text, text, index=1)
        return ScriptedEngine([*others, last])

    items = _items(engine("a"), engine("b"), num_answers=2)
    assert {(_delta(item).index, _delta(item).text) for item in items} == {(0, "a"), (1, "a"), (2, "b"), (3, "b")}


def test_ended_streams_are_freed_without_the_garbage_collector() -> None:
    async def run() -> list[weakref.ref[AsyncGenerator[Item, None]]]:
        streams = [_stream(ScriptedEngine(answer("a"))) for _ in range(2)]
        async for _ in side_by_side(streams, 1):
            pass
        return [weakref.ref(stream) for stream in streams]

    with collector_paused():
        assert [stream() for stream in asyncio.run(run())] == [None, None]


def test_a_slow_stream_does_not_delay_the_others() -> None:
    async def run() -> None:
        slow, fast = ScriptedEngine(hangs=True), ScriptedEngine(answer("a", "b"))
        async with aclosing(side_by_side([_stream(slow), _stream(fast)], 1)) as items:
            assert [_delta(await anext(items)).text for _ in range(2)] == ["a", "b"]
            assert slow.num_open == 1
        # Abandoned and freed.
        assert slow.num_open == 0
        assert slow.num_left_early == 1

    asyncio.run(run())


def test_a_rejection_is_the_last_item_and_cancels_the_others() -> None:
    rejected, other = Rejected(RequestError("too long", param="prompt")), ScriptedEngine(hangs=True)
    assert _items(other, ScriptedEngine([rejected])) == [rejected]
    assert (other.num_open, other.num_left_early) == (0, 1)


def test_an_error_cancels_the_others_and_is_raised() -> None:
    other, broken = ScriptedEngine(hangs=True), EngineError("broken")
    with pytest.raises(EngineError, match="broken"):
        _items(other, ScriptedEngine([broken]), ScriptedEngine([broken]))
    assert (other.num_open, other.num_left_early) == (0, 1)
