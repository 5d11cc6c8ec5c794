"""An abandoned task ends, however it handles its cancellation."""

import asyncio

import pytest

from deployments.waiting import abandon


def test_all_tasks_have_ended_on_return_and_their_errors_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[str] = []

    async def waiting(name: str, error: Exception | None) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            # A while after its cancellation.
            await asyncio.sleep(0.01)
            ended.append(name)
            if error is not None:
                raise error

    async def failing() -> None:
        raise ValueError

    async def run() -> None:
        tasks = [asyncio.create_task(waiting("a", None)), asyncio.create_task(waiting("b", KeyError()))]
        over = asyncio.create_task(failing())
        await asyncio.wait([over])
        await abandon(*tasks, over)
        assert all(task.done() for task in tasks)

    asyncio.run(run())
    assert sorted(ended) == ["a", "b"]
    assert not caplog.records
