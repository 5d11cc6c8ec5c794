"""The generator stage on scripted and real engines: times, rejections, pacing, freeing of abandoned answers."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.errors import StageLostError
from deployments.generator import Generator
from deployments.graph.handoff import LocalHandoff
from deployments.messages import Elapsed, Encoded, Item, PackedFeatures, Prepared, Rejected, is_last, pack
from deployments.metrics import IMAGE_TOKENS, PREFIX_HIT_TOKENS, PROMPT_TOKENS, QUEUE_WAIT, STAGE_DURATION
from deployments.settings.stages import GeneratorArgs
from llava_core.checkpoints.load import LoadOptions, load_language_side
from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.engine.async_engine import AsyncEngine
from llava_core.engine.config import EngineConfig
from llava_core.engine.engine import Engine
from llava_core.errors import EngineError, ImageError, OverloadedError
from llava_core.types import (
    EngineRequest,
    ImageFeatures,
    PreparedRequest,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
    Usage,
)
from llava_core.views import ImageTransform
from tests.deployments.fakes import FakeRecorder, answer

FULL = OverloadedError("full", limit="engine")


class ScriptedEngine:
    """Stands in for an engine: yields the deltas, then raises `error` if there is one."""

    def __init__(self, deltas: list[TokenDelta], error: Exception | None = None, *, num_requests: int = 1) -> None:
        self.deltas, self.error, self.num_requests = deltas, error, num_requests
        self.num_open = 0

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        self.num_open += 1
        try:
            for delta in self.deltas:
                yield delta
            if self.error is not None:
                raise self.error
        finally:
            self.num_open -= 1

    def check_health(self) -> None:
        if self.error is not None:
            raise self.error


def _prepared(**sampling: Any) -> Prepared:
    return Prepared(PreparedRequest("id", (1, 5, 6), (), SamplingParams(**sampling)), Elapsed({"preprocess": 1.0}))


def _collect(engine: Any, given: object, **options: Any) -> list[Item]:
    async def collect() -> list[Item]:
        return [item async for item in Generator(engine, LocalHandoff(), **options).generate(given)]

    return asyncio.run(collect())


def test_the_last_delta_reports_the_times_of_all_stages() -> None:
    items = _collect(ScriptedEngine(answer("a", "b")), _prepared())
    assert [item.text for item in items if isinstance(item, TokenDelta)] == ["a", "b"]
    assert isinstance(items[0], TokenDelta)
    assert isinstance(items[-1], TokenDelta)
    assert items[0].stage_ms == {}
    assert set(items[-1].stage_ms) == {"preprocess", "transfer", "prefill"}


def test_each_answer_is_measured_and_a_shared_prompt_counts_once() -> None:
    recorder, times = FakeRecorder(), {"queue": 1.0, "prefill": 20.0, "decode": 300.0}
    deltas = [
        TokenDelta("id", "", finish_reason="stop", usage=Usage(11, 2, 4, 3), stage_ms=times, index=index)
        for index in range(2)
    ]
    _collect(ScriptedEngine(deltas), _prepared(n=2), recorder=recorder)
    _collect(ScriptedEngine([], FULL), _prepared(), recorder=recorder)
    assert recorder.observed[QUEUE_WAIT, ("generate",)] == [0.001] * 2
    assert recorder.observed[STAGE_DURATION, ("prefill",)] == [0.02] * 2
    assert recorder.observed[STAGE_DURATION, ("decode",)] == [0.3] * 2
    assert len(recorder.observed[STAGE_DURATION, ("transfer",)]) == 2
    tokens = {PROMPT_TOKENS: 11, IMAGE_TOKENS: 4, PREFIX_HIT_TOKENS: 3}
    assert recorder.counted == {(counter, ()): number for counter, number in tokens.items()}


def test_a_rejection_is_the_only_item_and_never_reaches_the_engine() -> None:
    engine = ScriptedEngine(answer("a"))
    rejected = Rejected(ImageError("bad"))
    assert _collect(engine, rejected) == [rejected]
    assert engine.num_open == 0


@pytest.mark.parametrize(("error", "num_records"), [(FULL, 0), (EngineError("broken"), 1)])
def test_an_engine_error_is_the_last_item(error: Exception, num_records: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "deployments"):
        items = _collect(ScriptedEngine([TokenDelta("id", "a", (1,))], error), _prepared())
    assert [type(item) for item in items] == [TokenDelta, Rejected]
    assert len(caplog.records) == num_records
    assert all(record.exc_info is None for record in caplog.records)


def test_leaving_early_frees_the_engine() -> None:
    engine = ScriptedEngine([TokenDelta("id", "a", (1,)), TokenDelta("id", "b", (2,))])

    async def leave() -> int:
        async with aclosing(Generator(engine, LocalHandoff()).generate(_prepared())) as items:  # type: ignore[arg-type]
            await anext(items)
        return engine.num_open

    assert asyncio.run(leave()) == 0


def test_health_is_that_of_the_engine() -> None:
    async def check(engine: ScriptedEngine) -> None:
        await Generator(engine, LocalHandoff()).check_health()  # type: ignore[arg-type]

    asyncio.run(check(ScriptedEngine([])))
    with pytest.raises(EngineError, match="dead"):
        asyncio.run(check(ScriptedEngine([], EngineError("dead"))))


@pytest.mark.parametrize(("error", "is_well"), [(EngineError("broken"), False), (FULL, True)])
def test_repeated_failures_are_unhealthy_until_an_answer_succeeds(error: Exception, *, is_well: bool) -> None:
    engine = ScriptedEngine([], error)
    engine.check_health = lambda: None  # type: ignore[method-assign]

    async def run() -> None:
        generator = Generator(engine, LocalHandoff())  # type: ignore[arg-type]
        for _ in range(5):
            assert len([item async for item in generator.generate(_prepared())]) == 1
        with contextlib.nullcontext() if is_well else pytest.raises(EngineError, match="the last 5 requests"):
            await generator.check_health()
        engine.deltas, engine.error = answer("a"), None
        assert len([item async for item in generator.generate(_prepared())]) == 1
        await generator.check_health()

    asyncio.run(run())


def test_references_to_features_are_resolved_for_the_engine() -> None:
    rows = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    packed = pack(ImageFeatures("a", rows))
    asked: list[EngineRequest] = []

    class Store(LocalHandoff):
        async def shared(self, given: object) -> Any:
            return {"reference": packed.data}[str(given)]

    class Engine(ScriptedEngine):
        def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
            asked.append(request)
            return super().generate(request)

    async def run() -> None:
        encoded = Encoded(_prepared().request, (replace(packed, data="reference"),) * 2, Elapsed())
        async for _ in Generator(Engine([]), Store()).generate(encoded):  # type: ignore[arg-type]
            pass

    asyncio.run(run())
    assert [torch.equal(each.features, rows) for each in asked[0].features] == [True, True]


def test_features_whose_owner_has_died_are_a_rejection() -> None:
    class Broken(LocalHandoff):
        async def shared(self, given: object) -> Any:
            raise StageLostError("gone")

    async def run() -> list[Item]:
        encoded = Encoded(_prepared().request, (PackedFeatures("a", "float32", "reference"),), Elapsed())
        return [item async for item in Generator(ScriptedEngine([]), Broken()).generate(encoded)]  # type: ignore[arg-type]

    [item] = asyncio.run(run())
    assert isinstance(item, Rejected)
    assert isinstance(item.error, StageLostError)


def test_a_failed_handoff_is_a_rejection() -> None:
    class Broken(LocalHandoff):
        async def take(self, given: object) -> object:
            raise StageLostError("gone")

    async def run() -> list[Item]:
        return [item async for item in Generator(ScriptedEngine([]), Broken()).generate(object())]  # type: ignore[arg-type]

    [item] = asyncio.run(run())
    assert isinstance(item, Rejected)
    assert isinstance(item.error, StageLostError)


def _with_engine(folder: Path, use: Callable[[Generator, AsyncEngine], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        side = load_language_side(folder, LoadOptions(dtype="float32"))
        engine = AsyncEngine(Engine(side, load_tokenizer(folder), EngineConfig(max_running=2)))
        try:
            return await use(Generator(engine, LocalHandoff()), engine)
        finally:
            engine.close()

    return asyncio.run(run())


def test_a_real_engine_counts_tokens(tiny_checkpoint: Path) -> None:
    async def use(generator: Generator, _engine: AsyncEngine) -> Usage | None:
        items = [item async for item in generator.generate(_prepared(max_tokens=5, ignore_eos=True))]
        assert isinstance(items[-1], TokenDelta)
        return items[-1].usage

    assert _with_engine(tiny_checkpoint, use) == Usage(3, 5)


def test_a_real_engines_load_is_reported_to_the_autoscaler(tiny_checkpoint: Path) -> None:
    language = load_language_side(tiny_checkpoint, LoadOptions(dtype="float32"))
    config = EngineConfig(max_running=2, cache_tokens=256, block_size=16)

    async def reports() -> list[dict[str, float]]:
        inner = Engine(language, load_tokenizer(tiny_checkpoint), config)
        engine = AsyncEngine(inner)
        generator = Generator(engine, LocalHandoff())
        idle = await generator.record_autoscaling_stats()
        # The state after a step that started two of three requests and prefilled half of one's prompt.
        stats = inner.stats
        stats.num_running, stats.num_waiting, stats.num_unread, stats.used_blocks = 2, 1, 40, 4
        busy = await generator.record_autoscaling_stats()
        request = _prepared(max_tokens=2, ignore_eos=True)
        items = [item async for item in generator.generate(request)]
        assert is_last(items[-1])
        after = await generator.record_autoscaling_stats()
        engine.close()
        return [idle, busy, after]

    idle, busy, after = asyncio.run(reports())
    assert set(idle) == {*GeneratorArgs().autoscaling.targets, "held_requests"}
    assert set(idle.values()) == set(after.values()) == {0}
    assert busy == {"queued_prefill_tokens": 40, "kv_cache_use": 0.25, "slot_use": 1.5, "held_requests": 0}


def test_cancelling_a_stream_frees_a_real_engine(tiny_checkpoint: Path) -> None:
    async def use(generator: Generator, engine: AsyncEngine) -> int:
        async def read() -> None:
            async for _ in generator.generate(_prepared(max_tokens=400, ignore_eos=True)):
                started.set()

        started = asyncio.Event()
        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return engine.num_requests

    assert _with_engine(tiny_checkpoint, use) == 0


def test_the_end_of_the_last_answer_reports_the_total_usage() -> None:
    """The prompt was prefilled once, and the second answer found it in the cache."""
    ends = [
        TokenDelta("id", "a", (1,), "stop", Usage(9, 3, 4, 8), {"decode": 1.0}, index=1),
        TokenDelta("id", "b", (1,)),
        TokenDelta("id", "c", (1,), "length", Usage(9, 5, 4, 0), {"decode": 2.0}, index=0),
    ]
    items = _collect(ScriptedEngine(ends), _prepared(n=2))
    assert [is_last(item) for item in items] == [False, False, True]
    first, _, last = items
    assert isinstance(first, TokenDelta)
    assert isinstance(last, TokenDelta)
    assert (first.finish_reason, first.usage, first.stage_ms) == ("stop", None, {})
    assert last.usage == Usage(9, 8, 4, 0)
    assert last.stage_ms["decode"] == 2.0


def test_tokens_named_by_log_probabilities_have_their_bytes() -> None:
    delta = TokenDelta("id", "a", (7,), logprobs=(TokenLogprob(7, -1.0, ((8, -0.5), (7, -1.0))),))
    items = _collect(ScriptedEngine([delta, *answer("b")]), _prepared(), token_bytes=lambda token: b"%d" % token)
    assert [item.token_bytes for item in items if isinstance(item, TokenDelta)] == [{7: b"7", 8: b"8"}, {}]


def test_image_transforms_are_reported_with_the_last_delta() -> None:
    seen = (None, ImageTransform(format="DICOM", photometric="MONOCHROME2", bits=12))
    prepared = _prepared()
    given = replace(prepared, request=replace(prepared.request, transforms=seen))
    items = _collect(ScriptedEngine(answer("a", "b")), given)
    assert [getattr(item, "transforms", None) for item in items] == [(), *[()] * (len(items) - 2), seen]
