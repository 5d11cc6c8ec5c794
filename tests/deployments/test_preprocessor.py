"""The preprocessing stage: its results and its rejections."""

import asyncio
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.messages import Prepared, Rejected
from deployments.metrics import (
    CACHE_BYTES,
    CACHE_HITS,
    CACHE_MISSES,
    HANDED_OVER,
    HANDED_OVER_EACH,
    QUEUE_WAIT,
    STAGE_DURATION,
)
from deployments.outgoing.fetch import Fetcher
from deployments.preprocessor import Preprocessor
from deployments.settings.app import FetchArgs
from deployments.upstreams.pictures import PortableImage
from llava_core.checkpoints.describe import load_preparer
from llava_core.errors import EngineError, ImageError, RequestError
from llava_core.images.loading import ImageLimits
from llava_core.lru import LruCache
from llava_core.prompts.tokenize import Tokenized
from llava_core.types import (
    CompletionRequest,
    GenerationRequest,
    ImagePart,
    ImageUrl,
    Message,
    PreparedImage,
    PreparedRequest,
    SamplingParams,
    TextPart,
)
from tests.deployments.fakes import FakeRecorder, collector_paused
from tests.deployments.pictures import plain


@pytest.fixture
def preprocessor(tiny_checkpoint: Path) -> Preprocessor:
    return _preprocessor(load_preparer(tiny_checkpoint))


def _preprocessor(preparer: Any, **options: Any) -> Preprocessor:
    return Preprocessor({"m": preparer}, **{"cache": LruCache(0), **options})


def _request(*parts: TextPart | ImagePart | ImageUrl) -> GenerationRequest:
    return GenerationRequest("id", (Message("user", parts),), SamplingParams())


def test_a_request_becomes_ids_and_tiles(preprocessor: Preprocessor) -> None:
    prepared = asyncio.run(preprocessor.prepare(_request(ImagePart(plain()), TextPart("hi")), "m"))
    assert isinstance(prepared, Prepared)
    assert len(prepared.request.images) == 1
    assert set(prepared.elapsed.stage_ms) == {"preprocess"}


def test_a_bad_picture_is_a_value_not_an_exception(preprocessor: Preprocessor) -> None:
    rejected = asyncio.run(preprocessor.prepare(_request(ImagePart(b"no picture")), "m"))
    assert isinstance(rejected, Rejected)
    assert isinstance(rejected.error, ImageError)
    assert rejected.error.param == "messages[0].content[0].image_url"


def test_a_refused_request_is_freed_without_the_garbage_collector(preprocessor: Preprocessor) -> None:
    """It may hold megabytes, and the collector may take minutes."""

    async def refuse() -> None:
        request = _request(ImagePart(b"no picture"))
        rejected = await preprocessor.prepare(request, "m")
        assert isinstance(rejected, Rejected)
        references = weakref.ref(request), weakref.ref(rejected.error)
        del request, rejected
        # The thread that prepared it may still be about to let go.
        await _until(lambda: [reference() for reference in references] == [None, None])

    with collector_paused():
        asyncio.run(asyncio.wait_for(refuse(), 30))


class _Pictures(Fetcher):
    """Returns the same picture for every address."""

    def __init__(self) -> None:
        super().__init__(FetchArgs())
        self.asked: list[str] = []

    async def fetch(self, address: str, param: str) -> bytes:
        self.asked.append(address)
        return plain()


def test_a_picture_given_by_url_is_fetched_and_timed(tiny_checkpoint: Path) -> None:
    pictures = _Pictures()
    recorder = FakeRecorder()
    preprocessor = _preprocessor(load_preparer(tiny_checkpoint), fetcher=pictures, recorder=recorder)
    by_address = asyncio.run(preprocessor.prepare(_request(ImageUrl("https://example.com/a.png"), TextPart("hi")), "m"))
    by_value = asyncio.run(preprocessor.prepare(_request(ImagePart(plain()), TextPart("hi")), "m"))
    assert isinstance(by_address, Prepared)
    assert isinstance(by_value, Prepared)
    assert by_address.request.prompt_ids == by_value.request.prompt_ids
    assert [image.digest for image in by_address.request.images] == [image.digest for image in by_value.request.images]
    assert set(by_address.elapsed.stage_ms) == {"fetch", "preprocess"}
    assert pictures.asked == ["https://example.com/a.png"]
    assert len(recorder.observed[STAGE_DURATION, ("fetch",)]) == 1
    assert len(recorder.observed[STAGE_DURATION, ("preprocess",)]) == 2


def test_a_picture_given_by_url_is_tokenized_like_its_bytes(tiny_checkpoint: Path) -> None:
    preprocessor = _preprocessor(load_preparer(tiny_checkpoint), fetcher=_Pictures())
    by_address = asyncio.run(
        preprocessor.tokenize(_request(ImageUrl("https://example.com/a.png"), TextPart("hi")), "m")
    )
    assert isinstance(by_address, Tokenized)
    assert by_address == asyncio.run(preprocessor.tokenize(_request(ImagePart(plain()), TextPart("hi")), "m"))


def test_pictures_for_upstreams_are_fetched_and_checked_without_a_local_model() -> None:
    limits = ImageLimits(max_pixels=2400)
    preprocessor = Preprocessor({}, cache=LruCache(0), fetcher=_Pictures(), image_limits=limits)
    request = _request(TextPart(""), ImageUrl("https://example.com/a.png"), ImagePart(plain("blue")))
    found = asyncio.run(preprocessor.portable_images(request))
    assert found == (PortableImage("image/png", plain()), PortableImage("image/png", plain("blue")))
    rejected = asyncio.run(preprocessor.portable_images(_request(ImagePart(plain(size=(60, 41))))))
    assert isinstance(rejected, Rejected)
    assert isinstance(rejected.error, ImageError)
    assert (rejected.error.code, rejected.error.param) == ("image_too_large", "messages[0].content[0].image_url")
    unfetched = asyncio.run(Preprocessor({}, cache=LruCache(0)).portable_images(request))
    assert isinstance(unfetched, Rejected)
    assert isinstance(unfetched.error, ImageError)
    assert unfetched.error.code == "image_url_not_allowed"


def test_nothing_is_fetched_for_a_request_that_is_refused_anyway(tiny_checkpoint: Path) -> None:
    pictures = _Pictures()
    preprocessor = _preprocessor(load_preparer(tiny_checkpoint), fetcher=pictures)
    many = [ImageUrl(f"https://example.com/{index}.png") for index in range(9)]
    rejected = asyncio.run(preprocessor.prepare(_request(*many), "m"))
    assert isinstance(rejected, Rejected)
    assert isinstance(rejected.error, RequestError)
    assert rejected.error.code == "too_many_images"
    assert pictures.asked == []


def test_without_settings_nothing_is_fetched(preprocessor: Preprocessor) -> None:
    rejected = asyncio.run(preprocessor.prepare(_request(TextPart("hi"), ImageUrl("https://example.com/a.png")), "m"))
    assert isinstance(rejected, Rejected)
    assert isinstance(rejected.error, ImageError)
    assert (rejected.error.code, rejected.error.param) == ("image_url_not_allowed", "messages[0].content[1].image_url")


def test_requests_are_prepared_concurrently(preprocessor: Preprocessor) -> None:
    async def several() -> list[Prepared | Rejected]:
        return await asyncio.gather(*(preprocessor.prepare(_request(TextPart(str(index))), "m") for index in range(8)))

    prepared = asyncio.run(several())
    assert all(isinstance(each, Prepared) for each in prepared)
    assert len({each.request.prompt_ids for each in prepared if isinstance(each, Prepared)}) == 8


def test_durations_and_cache_use_are_measured(tiny_checkpoint: Path) -> None:
    recorder = FakeRecorder()
    cache = LruCache[PreparedImage](10**6)
    preprocessor = _preprocessor(load_preparer(tiny_checkpoint, cache=cache), cache=cache, recorder=recorder)
    for parts in ([ImagePart(plain())], [ImagePart(plain())], [TextPart("hi")], [ImagePart(b"no picture")]):
        asyncio.run(preprocessor.prepare(_request(*parts), "m"))
    assert len(recorder.observed[QUEUE_WAIT, ("preprocess",)]) == 4
    assert len(recorder.observed[STAGE_DURATION, ("preprocess",)]) == 3
    readings = recorder.readings()
    assert (readings[CACHE_HITS, ("tiles",)], readings[CACHE_MISSES, ("tiles",)]) == (1, 2)
    assert readings[CACHE_BYTES, ("tiles",)] > 0
    # One tile for each picture that could be read, cached or not; a text-only request passes none on.
    tile = readings[CACHE_BYTES, ("tiles",)]
    assert recorder.observed[HANDED_OVER_EACH, ("preprocess_encode",)] == [tile, tile]
    assert recorder.counted[HANDED_OVER, ("preprocess_encode",)] == 2 * tile


class _Slow:
    """A preparer that works until it is told to end."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.begun: list[str] = []

    def prepare(self, request: GenerationRequest) -> PreparedRequest:
        self.begun.append(request.request_id)
        assert self.may_end.wait(10)
        return PreparedRequest(request.request_id, (1,), (), request.sampling)


def test_a_cancelled_request_keeps_its_slot_until_its_thread_ends() -> None:
    slow = _Slow()
    preprocessor = _preprocessor(slow, num_threads=1)

    async def run() -> None:
        first, waiting, third = (asyncio.create_task(preprocessor.prepare(_request(TextPart(x)), "m")) for x in "123")
        await _until(lambda: bool(slow.begun))
        first.cancel()
        waiting.cancel()
        # A waiting request is dropped at once; a running one continues, and no other begins.
        await asyncio.wait([waiting])
        assert not first.done()
        assert len(slow.begun) == 1
        slow.may_end.set()
        done = await asyncio.gather(first, waiting, third, return_exceptions=True)
        assert [type(each) for each in done] == [asyncio.CancelledError, asyncio.CancelledError, Prepared]
        assert len(slow.begun) == 2

    asyncio.run(run())


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def test_each_model_is_prepared_with_its_own_settings(tiny_checkpoint: Path) -> None:
    cache = LruCache[PreparedImage](10**6)
    preparers = {name: load_preparer(tiny_checkpoint, template=name, cache=cache) for name in ("llava_v0", "vicuna_v1")}
    preprocessor = Preprocessor(preparers, cache=cache)
    request = _request(ImagePart(plain()), TextPart("hi"))

    async def run() -> None:
        prepared = {name: await preprocessor.prepare(request, name) for name in preparers}
        for name, each in prepared.items():
            assert isinstance(each, Prepared)
            assert each.request.prompt == preparers[name].prepare(request).prompt
            tokenized = await preprocessor.tokenize(request, name)
            assert isinstance(tokenized, Tokenized)
            assert len(tokenized.ids) == len(each.request.prompt_ids)
        assert len({each.request.prompt for each in prepared.values() if isinstance(each, Prepared)}) == 2

    asyncio.run(run())
    # The second model finds the pictures that were decoded for the first.
    assert cache.num_misses == 1


def test_only_failures_that_are_not_the_clients_make_it_unhealthy(preprocessor: Preprocessor) -> None:
    class Broken:
        def prepare(self, _request: GenerationRequest) -> PreparedRequest:
            raise ZeroDivisionError("oops")

    async def run(broken: Preprocessor) -> None:
        for _ in range(5):
            await preprocessor.prepare(_request(ImagePart(b"no picture")), "m")
            with pytest.raises(ZeroDivisionError):
                await broken.prepare(_request(TextPart("hi")), "m")
        await preprocessor.check_health()
        with pytest.raises(EngineError, match="preprocessor"):
            await broken.check_health()

    asyncio.run(run(_preprocessor(Broken())))


def test_prompts_are_tokenized_and_ids_detokenized(preprocessor: Preprocessor) -> None:
    async def run() -> None:
        tokenized = await preprocessor.tokenize(CompletionRequest("id", "hi", SamplingParams()), "m")
        assert isinstance(tokenized, Tokenized)
        assert await preprocessor.detokenize(tokenized.ids, "m") == "<s>hi"
        assert isinstance(await preprocessor.tokenize(_request(ImagePart(b"no picture")), "m"), Rejected)
        assert isinstance(await preprocessor.detokenize([10**6], "m"), Rejected)

    asyncio.run(run())
