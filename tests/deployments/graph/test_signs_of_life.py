"""Signs of life between slow items, and detection of silence, in streams of milliseconds."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from deployments.errors import StageSilentError
from deployments.graph.signs_of_life import StillHere, listen, with_signs


async def _numbers(*pauses: float) -> AsyncGenerator[int, None]:
    for number, pause in enumerate(pauses):
        await asyncio.sleep(pause)
        yield number


def test_signs_are_inserted_during_pauses_and_items_are_unchanged() -> None:
    async def run() -> list[int | StillHere]:
        return [item async for item in with_signs(_numbers(0, 0.2, 0), every_s=0.02)]

    items = asyncio.run(run())
    assert [item for item in items if not isinstance(item, StillHere)] == [0, 1, 2]
    assert items[0] == 0
    assert items[-1] == 2
    assert 3 <= items.count(StillHere()) <= 10


def test_an_error_is_passed_through_and_ends_the_stream() -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        raise ZeroDivisionError

    async def run() -> None:
        items = with_signs(failing())
        assert await anext(items) == 1
        with pytest.raises(ZeroDivisionError):
            await anext(items)

    asyncio.run(run())


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_leaving_closes_the_underlying_stream(how: str) -> None:
    ended: list[str] = []

    async def endless() -> AsyncGenerator[int, None]:
        try:
            yield 0
            await asyncio.Event().wait()
        finally:
            ended.append("items")

    async def read(seen: asyncio.Event) -> None:
        async with aclosing(with_signs(endless(), every_s=0.01)) as items:
            async for item in items:
                if isinstance(item, StillHere):
                    seen.set()
                    if how == "closed":
                        return

    async def run() -> None:
        seen = asyncio.Event()
        task = asyncio.create_task(read(seen))
        await seen.wait()
        if how == "cancelled":
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() == (how == "cancelled")
        assert ended == ["items"]

    asyncio.run(run())


async def _lose() -> None:
    raise StageSilentError


def test_signs_count_as_activity_and_are_not_passed_on() -> None:
    async def run() -> list[int]:
        signed = with_signs(_numbers(0, 0.5, 0), every_s=0.02)
        return [item async for item in listen(signed, _lose, silence_s=0.25)]

    assert asyncio.run(run()) == [0, 1, 2]


def test_silence_raises_the_error_of_the_callback() -> None:
    async def run() -> None:
        heard = listen(_numbers(0, 60), _lose, silence_s=0.05)
        assert await anext(heard) == 0
        with pytest.raises(StageSilentError):
            await anext(heard)

    asyncio.run(run())


def test_silence_is_tolerated_while_the_callback_raises_nothing() -> None:
    """For example, a stage may have to be scaled up from zero."""
    num_asked = 0

    async def ask() -> None:
        nonlocal num_asked
        num_asked += 1

    async def run() -> list[int]:
        return [item async for item in listen(_numbers(0.3, 0), ask, silence_s=0.05)]

    assert asyncio.run(run()) == [0, 1]
    assert 1 < num_asked < 6


def test_a_slow_reader_does_not_count_as_silence() -> None:
    async def run() -> list[int]:
        heard = []
        async for item in listen(_numbers(0, 0), _lose, silence_s=0.05):
            await asyncio.sleep(0.1)
            heard.append(item)
        return heard

    assert asyncio.run(run()) == [0, 1]
