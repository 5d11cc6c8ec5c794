"""The first stage: fetches, decodes and tiles pictures, tokenizes prompts and checks limits. On the CPU, without torch,
for all models.

Wraps llava_core.prepare, adding only fetching, threads, timing and a watchdog.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deployments.messages import Elapsed, Prepared, Rejected
from deployments.metrics import QUEUE_WAIT, STAGE_DURATION, Recorder, Unrecorded, cache_readings, record_handed_over
from deployments.outgoing.fetch import Fetcher
from deployments.settings.app import FetchArgs
from deployments.upstreams.pictures import PortableImage, portable_images
from deployments.watchdog import Watchdog
from llava_core.errors import LlavaError
from llava_core.images.loading import ImageLimits
from llava_core.lru import LruCache
from llava_core.prepare import Preparer
from llava_core.prompts.tokenize import Tokenized
from llava_core.types import AnyRequest, GenerationRequest, PreparedImage

Result = TypeVar("Result")


class Preprocessor:
    """Prepares up to `num_threads` requests at once, which bounds the decoded pictures in memory, whoever hangs up."""

    def __init__(
        self,
        preparers: Mapping[str, Preparer],
        *,
        cache: LruCache[PreparedImage],
        num_threads: int = 4,
        image_limits: ImageLimits | None = None,
        fetcher: Fetcher | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """`preparers` are by model name and keep tiles in `cache`. `image_limits` apply to pictures for upstream
        servers."""
        self._preparers = preparers
        self._image_limits = image_limits or ImageLimits()
        self._fetcher = fetcher or Fetcher(FetchArgs())
        self._threads = ThreadPoolExecutor(num_threads, "prepare")
        self._watchdog = Watchdog("preprocessor")
        self._recorder = recorder or Unrecorded()
        self._recorder.watch(lambda: cache_readings(cache, "tiles"))

    async def prepare(self, request: AnyRequest, model: str) -> Prepared | Rejected:
        """Returns token ids and tiles, or what is wrong with the request."""
        elapsed, preparer = Elapsed(), self._preparers[model]
        fetched = await self._fetched(request, preparer)
        if isinstance(fetched, Rejected):
            return fetched
        if fetched is not request:
            elapsed = elapsed.finished("fetch")
        prepared = await self._in_thread(lambda: preparer.prepare(fetched))
        if isinstance(prepared, Rejected):
            return prepared
        if prepared.images:
            num_bytes = sum(image.tiles.nbytes for image in prepared.images)
            record_handed_over(self._recorder, "preprocess_encode", num_bytes)
        return Prepared(prepared, elapsed.finished("preprocess"))

    async def tokenize(self, request: AnyRequest, model: str) -> Tokenized | Rejected:
        """Returns token ids only, or what is wrong with the request."""
        preparer = self._preparers[model]
        fetched = await self._fetched(request, preparer)
        if isinstance(fetched, Rejected):
            return fetched
        return await self._in_thread(lambda: preparer.tokenize(fetched))

    async def detokenize(self, ids: Sequence[int], model: str) -> str | Rejected:
        """Returns the text of these ids, or that some of them do not exist."""
        return await self._in_thread(lambda: self._preparers[model].detokenize(ids))

    async def portable_images(self, request: GenerationRequest) -> tuple[PortableImage, ...] | Rejected:
        """Returns the request's pictures for an upstream server, or what is wrong with one of them."""
        fetched = await self._fetched(request)
        if isinstance(fetched, Rejected):
            return fetched
        assert isinstance(fetched, GenerationRequest)
        return await self._in_thread(lambda: portable_images(fetched, self._image_limits))

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises here."""
        self._watchdog.check()

    async def _fetched(self, request: AnyRequest, preparer: Preparer | None = None) -> AnyRequest | Rejected:
        """Returns the request with every picture in it. Fetches nothing for a request that will be refused anyway."""
        if not isinstance(request, GenerationRequest) or not request.has_addresses:
            return request
        began = time.perf_counter()
        try:
            if preparer is not None:
                preparer.check(request)
            fetched = await self._fetcher.fetch_images(request)
        except LlavaError as error:
            return Rejected(error)
        self._recorder.observe(STAGE_DURATION, time.perf_counter() - began, "fetch")
        return fetched

    async def _in_thread(self, work: Callable[[], Result]) -> Result | Rejected:
        """Runs `work` in a thread. A thread cannot be stopped, so a cancelled request waits here until it is done."""
        job = self._threads.submit(self._watched, work, time.perf_counter())
        result = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(result)
        except LlavaError as error:
            return Rejected(error)
        except asyncio.CancelledError:
            if not job.cancel():
                await asyncio.wait([result])
            raise

    def _watched(self, work: Callable[[], Result], asked: float) -> Result:
        began = time.perf_counter()
        self._recorder.observe(QUEUE_WAIT, began - asked, "preprocess")
        with self._watchdog.work():
            result = work()
        self._recorder.observe(STAGE_DURATION, time.perf_counter() - began, "preprocess")
        return result
