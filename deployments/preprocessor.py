"""The first stage: pictures decoded and tiled, prompts rendered and tokenized, limits checked. On a CPU, without torch.

Wraps llava_core.prepare and adds nothing to it but threads, the clock and a watchdog.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deployments.messages import Elapsed, Prepared, Rejected
from deployments.metrics import QUEUE_WAIT, STAGE_DURATION, Recorder, Unrecorded, cache_readings
from deployments.watchdog import Watchdog
from llava_core.errors import LlavaError
from llava_core.prepare import Preparer
from llava_core.types import AnyRequest, Tokenized

Result = TypeVar("Result")


class Preprocessor:
    """Prepares up to `num_threads` requests at once: as many decoded pictures are in memory, whoever hangs up."""

    def __init__(self, preparer: Preparer, *, num_threads: int = 4, recorder: Recorder | None = None) -> None:
        self._preparer = preparer
        self._threads = ThreadPoolExecutor(num_threads, "prepare")
        self._watchdog = Watchdog("preprocessor")
        self._recorder = recorder or Unrecorded()
        self._recorder.watch(lambda: cache_readings(preparer.cache, "tiles"))

    async def prepare(self, request: AnyRequest) -> Prepared | Rejected:
        """Ids and tiles, or what is wrong with the request."""
        elapsed = Elapsed()
        prepared = await self._in_thread(lambda: self._preparer.prepare(request))
        return prepared if isinstance(prepared, Rejected) else Prepared(prepared, elapsed.finished("preprocess"))

    async def tokenize(self, request: AnyRequest) -> Tokenized | Rejected:
        """Ids alone, or what is wrong with the request."""
        return await self._in_thread(lambda: self._preparer.tokenize(request))

    async def detokenize(self, ids: Sequence[int]) -> str | Rejected:
        """The text of these ids, or that some do not exist."""
        return await self._in_thread(lambda: self._preparer.detokenize(ids))

    async def check_health(self) -> None:
        """For Serve, which replaces a replica that raises here."""
        self._watchdog.check()

    async def _in_thread(self, work: Callable[[], Result]) -> Result | Rejected:
        """A thread cannot be stopped: a request that is cancelled keeps its place until its thread is done with it."""
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
