"""The encoding stage: features for tiles, repeated pictures, one request's failure, cancellation."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deployments.graph.handoff import LocalHandoff
from deployments.messages import Elapsed, Encoded, Prepared, Rejected, unpack
from deployments.metrics import (
    CACHE_BYTES,
    CACHE_HITS,
    CACHE_MISSES,
    HANDED_OVER,
    HANDED_OVER_EACH,
    IMAGES,
    QUEUE_WAIT,
    STAGE_DURATION,
)
from deployments.settings.stages import VisionEncoderArgs
from deployments.vision_encoder import VisionEncoder
from llava_core.checkpoints.load import LoadOptions, load_tower
from llava_core.errors import EngineError, ImageError
from llava_core.types import ImageFeatures, PreparedImage, PreparedRequest, SamplingParams, Size
from llava_core.vision.clip import ClipTower
from llava_core.vision.encode import encode_images, encode_through
from tests.deployments.fakes import FakeRecorder
from tests.tiny import IMAGE_SIZE


@pytest.fixture(scope="module")
def tower(tiny_checkpoint: Path) -> ClipTower:
    return load_tower(tiny_checkpoint, LoadOptions(dtype="float32"))


def _image(shade: int) -> PreparedImage:
    return PreparedImage(str(shade), Size(5, 5), np.full((1, IMAGE_SIZE, IMAGE_SIZE, 3), shade, np.uint8))


def _prepared(*images: PreparedImage) -> Prepared:
    return Prepared(PreparedRequest("id", (1, 2, 3), images, SamplingParams()), Elapsed())


def test_tiles_are_replaced_by_features(tower: ClipTower) -> None:
    images = [_image(10), _image(200)]
    encoded = asyncio.run(VisionEncoder(tower, LocalHandoff()).encode(_prepared(*images)))
    assert isinstance(encoded, Encoded)
    assert encoded.request.images == ()
    assert encoded.request.prompt_ids == (1, 2, 3)
    for packed, expected in zip(encoded.features, encode_images(tower, images), strict=True):
        assert packed.digest == expected.digest
        assert torch.equal(unpack(packed).features, expected.features)
    assert set(encoded.elapsed.stage_ms) == {"transfer", "encode"}


def test_a_repeated_picture_is_encoded_once_even_if_concurrent(tower: ClipTower) -> None:
    encoder, runs = VisionEncoder(tower, LocalHandoff(), cache_bytes=10**6), []
    hook = tower.register_forward_pre_hook(lambda _module, inputs: runs.append(len(inputs[0])))

    async def several() -> list[Encoded | Rejected]:
        together = [encoder.encode(_prepared(_image(shade))) for shade in (10, 10, 200)]
        return [*await asyncio.gather(*together), await encoder.encode(_prepared(_image(200), _image(10)))]

    answers = asyncio.run(several())
    hook.remove()
    assert runs == [1, 1]
    assert (encoder.cache.num_hits, encoder.cache.num_misses) == (3, 2)
    shades = [[10], [10], [200], [200, 10]]
    for answer, expected in zip(answers, shades, strict=True):
        assert isinstance(answer, Encoded)
        # The same without a cache, bit for bit.
        plain = asyncio.run(VisionEncoder(tower, LocalHandoff()).encode(_prepared(*map(_image, expected))))
        assert isinstance(plain, Encoded)
        for ours, theirs in zip(answer.features, plain.features, strict=True):
            assert (ours.digest, ours.dtype, ours.size) == (theirs.digest, theirs.dtype, theirs.size)
            assert ours.data.tobytes() == theirs.data.tobytes()


def test_tiles_to_be_encoded_are_reported_to_the_autoscaler(tower: ClipTower, monkeypatch: pytest.MonkeyPatch) -> None:
    is_begun, may_end = threading.Event(), threading.Event()

    def encode_later(*given: Any) -> dict[str, Any]:
        is_begun.set()
        may_end.wait(10)
        return encode_through(*given)

    encoder = VisionEncoder(tower, LocalHandoff(), cache_bytes=10**6)

    async def reports() -> list[dict[str, float]]:
        await encoder.encode(_prepared(_image(7)))
        idle = await encoder.record_autoscaling_stats()
        monkeypatch.setattr("llava_core.vision.encode.encode_through", encode_later)
        # One of four is in the cache, and another request waits with two.
        jobs = [_prepared(*map(_image, shades)) for shades in ((7, 8, 9, 10), (11, 12))]
        running = [asyncio.create_task(encoder.encode(job)) for job in jobs]
        await asyncio.to_thread(is_begun.wait, 10)
        busy = await encoder.record_autoscaling_stats()
        may_end.set()
        await asyncio.gather(*running)
        return [idle, busy, await encoder.record_autoscaling_stats()]

    idle, busy, after = asyncio.run(reports())
    assert (idle["queued_tiles"], idle["held_requests"]) == (after["queued_tiles"], after["held_requests"]) == (0, 0)
    assert (busy["queued_tiles"], busy["held_requests"]) == (5, 2)
    assert all(0 < each["busy"] <= 1 for each in (idle, busy, after))
    assert set(busy) == {*VisionEncoderArgs().autoscaling.targets, "held_requests"}


class _Store(LocalHandoff):
    """Stands in for Ray's store: holds what was put into it, by opaque references."""

    def __init__(self) -> None:
        self.objects: dict[object, np.ndarray] = {}

    def share(self, data: np.ndarray) -> object:
        ref = object()
        self.objects[ref] = data
        return ref


def test_a_pictures_features_are_put_into_the_store_once(tower: ClipTower) -> None:
    store, recorder = _Store(), FakeRecorder()
    encoder = VisionEncoder(tower, store, cache_bytes=10**6, recorder=recorder)
    answers = [asyncio.run(encoder.encode(_prepared(_image(10), _image(10)))) for _ in range(5)]
    [(ref, data)] = store.objects.items()
    for answer in answers:
        assert isinstance(answer, Encoded)
        assert [each.data for each in answer.features] == [ref, ref]
    assert recorder.counted[HANDED_OVER, ("encode_generate",)] == data.nbytes
    assert recorder.observed[HANDED_OVER_EACH, ("encode_generate",)] == [data.nbytes, 0, 0, 0, 0]
    # A cache of size 0 holds no reference either.
    uncached = VisionEncoder(tower, store)
    for _ in range(2):
        asyncio.run(uncached.encode(_prepared(_image(10))))
    assert len(store.objects) == 3


def test_inline_features_count_towards_every_transfer(tower: ClipTower) -> None:
    recorder = FakeRecorder()
    encoder = VisionEncoder(tower, LocalHandoff(), cache_bytes=10**6, recorder=recorder)
    for _ in range(2):
        asyncio.run(encoder.encode(_prepared(_image(10))))
    first, second = recorder.observed[HANDED_OVER_EACH, ("encode_generate",)]
    assert first == second > 0
    assert recorder.counted[HANDED_OVER, ("encode_generate",)] == first + second


def test_without_a_cache_nothing_is_kept(tower: ClipTower) -> None:
    encoder = VisionEncoder(tower, LocalHandoff())
    asyncio.run(encoder.encode(_prepared(_image(10))))
    assert encoder.cache.num_bytes == 0


def test_durations_and_cache_use_are_measured(tower: ClipTower) -> None:
    recorder = FakeRecorder()
    encoder = VisionEncoder(tower, LocalHandoff(), cache_bytes=10**6, recorder=recorder)
    for shades in ((10,), (10, 200)):
        asyncio.run(encoder.encode(_prepared(*map(_image, shades))))
    asyncio.run(encoder.encode(_prepared(_odd())))
    assert recorder.observed[IMAGES, ()] == [1, 2, 1]
    assert len(recorder.observed[QUEUE_WAIT, ("encode",)]) == 3
    assert len(recorder.observed[STAGE_DURATION, ("transfer",)]) == 3
    # No time is recorded for a failed request.
    assert len(recorder.observed[STAGE_DURATION, ("encode",)]) == 2
    readings = recorder.readings()
    assert (readings[CACHE_HITS, ("features",)], readings[CACHE_MISSES, ("features",)]) == (1, 3)
    assert readings[CACHE_BYTES, ("features",)] == encoder.cache.num_bytes > 0


def test_a_rejection_is_passed_on(tower: ClipTower) -> None:
    rejected = Rejected(ImageError("bad"))
    assert asyncio.run(VisionEncoder(tower, LocalHandoff()).encode(rejected)) is rejected


def test_a_tower_failure_fails_one_request_and_is_logged(tower: ClipTower, caplog: pytest.LogCaptureFixture) -> None:
    encoder = VisionEncoder(tower, LocalHandoff())

    async def both() -> list[Encoded | Rejected]:
        return await asyncio.gather(encoder.encode(_prepared(_odd())), encoder.encode(_prepared(_image(1))))

    bad, good = asyncio.run(both())
    assert isinstance(bad, Rejected)
    assert isinstance(bad.error, EngineError)
    assert isinstance(good, Encoded)
    [record] = [record for record in caplog.records if record.exc_info]
    assert record.getMessage() == "request id could not be encoded"


def test_a_tower_that_always_fails_is_unhealthy_until_it_works(tower: ClipTower) -> None:
    encoder = VisionEncoder(tower, LocalHandoff())

    async def run() -> None:
        for _ in range(5):
            await encoder.check_health()
            await encoder.encode(_prepared(_odd()))
        with pytest.raises(EngineError, match="vision encoder: the last 5 requests have failed"):
            await encoder.check_health()
        await encoder.encode(_prepared(_image(1)))
        await encoder.check_health()

    asyncio.run(run())


def _odd() -> PreparedImage:
    return PreparedImage("odd", Size(5, 5), np.zeros((1, 5, 5, 3), np.uint8))


def test_a_request_cancelled_while_queued_is_never_encoded(tower: ClipTower, monkeypatch: pytest.MonkeyPatch) -> None:
    is_begun, may_end = threading.Event(), threading.Event()
    encoded: list[str] = []

    def encode(
        _tower: ClipTower, images: Sequence[PreparedImage], _cache: object, keep: Callable[[ImageFeatures], object]
    ) -> dict[str, object]:
        encoded.extend(image.digest for image in images)
        is_begun.set()
        may_end.wait(10)
        return {image.digest: keep(ImageFeatures(image.digest, torch.ones(1, 1))) for image in images}

    monkeypatch.setattr("llava_core.vision.encode.encode_through", encode)
    encoder = VisionEncoder(tower, LocalHandoff())

    async def cancel() -> None:
        first, second, third = (asyncio.create_task(encoder.encode(_prepared(_image(shade)))) for shade in (1, 2, 3))
        await asyncio.to_thread(is_begun.wait, 10)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        may_end.set()
        await asyncio.gather(first, third)

    asyncio.run(cancel())
    assert encoded == ["1", "3"]
