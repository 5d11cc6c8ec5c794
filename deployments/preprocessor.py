"""The first stage: pictures fetched, decoded and tiled, prompts tokenized, limits checked. On a CPU, without torch.

Wraps llava_core.prepare and adds nothing to it but what fetches, threads, the clock and a watchdog.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from deployments.fetch import Fetcher
from deployments.messages import Elapsed, Prepared, Rejected
from deployments.metrics import QUEUE_WAIT, STAGE_DURATION, Recorder, Unrecorded, cache_readings
from deployments.settings import FetchArgs
from deployments.watchdog import Watchdog
from llava_core.errors import LlavaError
from llava_core.prepare import Preparer
from llava_core.types import GenerationRequest, PreparedRequest


class Preprocessor:
    """Prepares up to `num_threads` requests at once: as many decoded pictures are in memory, whoever hangs up."""

    def __init__(
        self,
        preparer: Preparer,
        *,
        num_threads: int = 4,
        fetcher: Fetcher | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._preparer = preparer
        self._fetcher = fetcher or Fetcher(FetchArgs())
        self._threads = ThreadPoolExecutor(num_threads, "prepare")
        self._watchdog = Watchdog("preprocessor")
        self._recorder = recorder or Unrecorded()
        self._recorder.watch(lambda: cache_readings(preparer.cache, "tiles"))

    async def prepare(self, request: GenerationRequest) -> Prepared | Rejected:
        """Ids and tiles, or what is wrong with the request.

        A thread cannot be stopped: a request that is cancelled keeps its place until its thread is done with it.
        """
        elapsed = Elapsed()
        if request.has_addresses:
            try:
                # Nothing is fetched for a request that will be refused all the same.
                self._preparer.check(request)
                request = await self._fetcher.fetch_images(request)
            except LlavaError as error:
                return Rejected(error)
            elapsed = elapsed.finished("fetch")
        job = self._threads.submit(self._work, request, time.perf_counter())
        result = asyncio.wrap_future(job)
        try:
            prepared = await asyncio.shield(result)
        except LlavaError as error:
            return Rejected(error)
        except asyncio.CancelledError:
            if not job.cancel():
                await asyncio.wait([result])
            raise
        return Prepared(prepared, elapsed.finished("preprocess"))

    async def check_health(self) -> None:
        """For Serve, which replaces a replica that raises here."""
        self._watchdog.check()

    def _work(self, request: GenerationRequest, asked: float) -> PreparedRequest:
        began = time.perf_counter()
        self._recorder.observe(QUEUE_WAIT, began - asked, "preprocess")
        with self._watchdog.work():
            prepared = self._preparer.prepare(request)
        self._recorder.observe(STAGE_DURATION, time.perf_counter() - began, "preprocess")
        return prepared
