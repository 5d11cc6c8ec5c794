"""The engine's thread as seen from asyncio: streams, early exits, refusals, health."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from llava_core.engine.async_engine import AsyncEngine, _Mailbox, merge
from llava_core.engine.engine import Engine
from llava_core.engine.request import RequestFailure
from llava_core.errors import EngineError, OverloadedError, PromptTooLongError
from llava_core.types import EngineRequest, TokenDelta
from tests.llava_core.engine.conftest import make_request
from tests.llava_core.engine.test_engine import run

BuildEngine = Callable[..., Engine]


async def collect(engine: AsyncEngine, request: EngineRequest) -> list[int]:
    return [token async for delta in engine.generate(request) for token in delta.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_concurrent_readers_each_get_their_own_answer(build_engine: BuildEngine) -> None:
    requests = [make_request(f"r{i}", seed=i, max_tokens=5 + i) for i in range(8)]
    expected = [run(build_engine(), request)[request.request_id] for request in requests]

    async def main() -> list[list[int]]:
        engine = AsyncEngine(build_engine(max_running=4))
        try:
            return await asyncio.gather(*(collect(engine, request) for request in requests))
        finally:
            engine.close()

    assert asyncio.run(main()) == expected


def test_callbacks_run_before_every_step_and_when_idle(build_engine: BuildEngine) -> None:
    calls: list[str] = []

    async def main() -> int:
        inner = build_engine()
        engine = AsyncEngine(inner, before_step=lambda: calls.append("step"), when_idle=lambda: calls.append("idle"))
        await collect(engine, make_request("a", max_tokens=5))
        await until(lambda: calls[-1] == "idle")
        engine.close()
        return inner.stats.num_steps

    num_steps = asyncio.run(main())
    assert calls.count("step") == num_steps
    first = calls.index("step")
    assert set(calls[:first]) == {"idle"}
    assert "idle" not in calls[first : first + 5], "while there is work, the cores are not given back"


def test_finished_refused_and_cancelled_requests_leave_the_batch(build_engine: BuildEngine) -> None:
    async def main() -> Engine:
        inner = build_engine()
        engine = AsyncEngine(inner)
        await collect(engine, make_request("a", max_tokens=5))
        with pytest.raises(PromptTooLongError):
            await collect(engine, make_request("long", max_tokens=100_000))
        stream = engine.generate(make_request("b", max_tokens=400))
        await anext(stream)
        await stream.aclose()
        await until(lambda: not inner.has_work)
        # This answer comes only after all pending messages to the engine have been handled.
        await collect(engine, make_request("c", max_tokens=5))
        engine.close()
        return inner

    stats = asyncio.run(main()).stats
    assert stats.scheduled_requests == stats.num_steps > 0
    assert (stats.batch_size, stats.num_running, stats.used_blocks) == (1, 0, 0)


def test_only_a_stream_closed_early_is_aborted(build_engine: BuildEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = build_engine()
    aborted: list[str] = []
    abort = inner.abort
    monkeypatch.setattr(inner, "abort", lambda name: (aborted.append(name), abort(name)))

    async def main() -> None:
        engine = AsyncEngine(inner)
        await collect(engine, make_request("whole", n=2))
        with pytest.raises(PromptTooLongError):
            await collect(engine, make_request("refused", max_tokens=100_000))
        stream = engine.generate(make_request("left", max_tokens=400))
        await anext(stream)
        await stream.aclose()
        await until(lambda: not inner.has_work)
        engine.close()

    asyncio.run(main())
    assert aborted == ["left"]


def test_closing_a_stream_early_frees_the_request(build_engine: BuildEngine) -> None:
    async def main() -> None:
        inner = build_engine()
        engine = AsyncEngine(inner)
        stream = engine.generate(make_request("a", max_tokens=400))
        await anext(stream)
        assert inner.num_running == 1
        await stream.aclose()
        assert engine.num_requests == 0
        await until(lambda: not inner.has_work)
        engine.close()

    asyncio.run(main())


def test_an_id_can_be_reused_once_its_request_has_finished(build_engine: BuildEngine) -> None:
    async def main() -> None:
        engine = AsyncEngine(build_engine())
        first = await collect(engine, make_request("a"))
        assert await collect(engine, make_request("a")) == first
        engine.close()

    asyncio.run(main())


def test_the_reader_gets_the_original_error_of_a_refusal(build_engine: BuildEngine) -> None:
    async def main() -> None:
        engine = AsyncEngine(build_engine(max_running=1, max_waiting=1))
        with pytest.raises(PromptTooLongError):
            await collect(engine, make_request("long", max_tokens=100_000))
        streams = [engine.generate(make_request(f"r{i}", max_tokens=300)) for i in range(4)]
        results = await asyncio.gather(*(anext(stream) for stream in streams[:1]), return_exceptions=True)
        assert isinstance(results[0], TokenDelta)
        others = [asyncio.ensure_future(anext(stream)) for stream in streams[1:]]
        done, pending = await asyncio.wait(others, timeout=20, return_when=asyncio.FIRST_EXCEPTION)
        assert any(isinstance(task.exception(), OverloadedError) for task in done)
        for task in pending:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        engine.close()

    asyncio.run(main())


def test_a_dead_thread_fails_its_readers_and_the_health_check(
    build_engine: BuildEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = build_engine()

    def explode() -> list[TokenDelta]:
        raise MemoryError("no room")

    monkeypatch.setattr(inner, "step", explode)

    async def main() -> None:
        engine = AsyncEngine(inner)
        engine.check_health()
        with pytest.raises(EngineError, match="has stopped: MemoryError: no room"):
            await collect(engine, make_request("a"))
        await until(lambda: not engine._thread.is_alive())
        with pytest.raises(EngineError, match="dead"):
            engine.check_health()
        async with asyncio.timeout(20):
            with pytest.raises(EngineError, match="has stopped"):
                await collect(engine, make_request("late"))

    asyncio.run(main())


def test_a_request_after_closing_is_refused(build_engine: BuildEngine) -> None:
    async def main() -> None:
        engine = AsyncEngine(build_engine())
        engine.close()
        async with asyncio.timeout(20):
            for name in ("a", "b"):
                with pytest.raises(EngineError, match="has stopped"):
                    await collect(engine, make_request(name))

    asyncio.run(main())


def test_all_answers_of_one_request_come_in_one_stream(build_engine: BuildEngine) -> None:
    async def main() -> dict[int, list[int]]:
        engine = AsyncEngine(build_engine())
        answers: dict[int, list[int]] = {}
        async for delta in engine.generate(make_request("a", n=3, temperature=1.0, seed=5)):
            answers.setdefault(delta.index, []).extend(delta.token_ids)
        engine.close()
        return answers

    assert {index: len(tokens) for index, tokens in asyncio.run(main()).items()} == {0: 12, 1: 12, 2: 12}


def test_piled_up_deltas_merge_per_answer_and_a_failure_wins() -> None:
    deltas = [TokenDelta("a", "x", (1,)), TokenDelta("a", "z", (3,), index=1), TokenDelta("a", "y", (2,), "stop")]
    assert merge([*deltas]) == [TokenDelta("a", "xy", (1, 2), "stop"), TokenDelta("a", "z", (3,), index=1)]
    with pytest.raises(EngineError, match="gone"):
        merge([deltas[0], RequestFailure("a", EngineError("gone"))])


def test_deltas_respect_the_gap_and_the_last_comes_at_once() -> None:
    first, second, third, last = (TokenDelta("a", str(i), (i,)) for i in range(4))
    finished = replace(last, finish_reason="stop")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        mailbox = _Mailbox(loop)
        mailbox.put(first)
        assert await mailbox.take() == [first]
        mailbox.rest(0.05)
        rest_started = loop.time()
        mailbox.put(second)
        mailbox.put(third)
        assert await mailbox.take() == [second, third]
        assert loop.time() - rest_started >= 0.05
        mailbox.rest(3600)
        mailbox.put(last)
        mailbox.put(finished)
        async with asyncio.timeout(20):
            assert await mailbox.take() == [last, finished]

    asyncio.run(main())


def test_a_failure_is_delivered_at_once() -> None:
    async def main() -> None:
        mailbox = _Mailbox(asyncio.get_running_loop())
        mailbox.rest(3600)
        mailbox.put(RequestFailure("a", EngineError("broken")))
        async with asyncio.timeout(20):
            assert len(await mailbox.take()) == 1

    asyncio.run(main())


def test_many_requests_get_fewer_and_larger_deltas(build_engine: BuildEngine) -> None:
    async def main() -> list[list[int]]:
        engine = AsyncEngine(build_engine(max_running=4), delta_gap_s=3600.0)

        async def sizes(number: int) -> list[int]:
            request = make_request(f"r{number}", seed=number, max_tokens=20)
            return [len(delta.token_ids) async for delta in engine.generate(request)]

        try:
            # The gap is capped at 0.2 s, long enough for these answers to be written.
            return await asyncio.gather(*(sizes(number) for number in range(3)))
        finally:
            engine.close()

    for sizes in asyncio.run(main()):
        assert sum(sizes) == 20
        assert len(sizes) < 10
