"""The second stage: runs tiles through the vision tower, up to the features before the projector. Only for requests
with pictures.

Recent features are kept where the next stage can read them, so a conversation about one picture encodes it once and
sends its features to each node once. Knows no prompts and no decoder. Imports torch only where it computes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from deployments.busy import BusyTime
from deployments.graph.handoff import Handoff
from deployments.messages import Encoded, PackedFeatures, Prepared, Rejected, pack, without_tiles
from deployments.metrics import (
    IMAGES,
    QUEUE_WAIT,
    QUEUED_TILES,
    STAGE_DURATION,
    Recorder,
    Unrecorded,
    cache_readings,
    record_handed_over,
)
from deployments.scaling import BUSY, HELD_REQUESTS
from deployments.watchdog import Watchdog
from llava_core.errors import EngineError
from llava_core.lru import LruCache
from llava_core.stages.shared_cores import Cores, OwnCores
from llava_core.types import ImageFeatures, PreparedRequest

if TYPE_CHECKING:
    from llava_core.vision.towers import VisionTower

logger = logging.getLogger(__name__)


class VisionEncoder:
    """One tower, one thread: requests are encoded in order of arrival, so no two of them encode a picture at once."""

    def __init__(
        self,
        tower: VisionTower,
        handoff: Handoff,
        *,
        cache_bytes: int = 0,
        cores: Cores | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """`cores` are released whenever a request's pictures are done."""
        self.cache: LruCache[PackedFeatures] = LruCache(cache_bytes)
        self._tower = tower
        self._handoff = handoff
        self._cores = OwnCores() if cores is None else cores
        self._recorder = recorder or Unrecorded()
        self._busy = BusyTime()
        self._queued_tiles = self._num_held = 0
        self._recorder.watch(lambda: cache_readings(self.cache, "features"))
        self._recorder.watch(lambda: [(QUEUED_TILES, self._queued_tiles, ())])
        self._thread = ThreadPoolExecutor(1, "tower")
        self._watchdog = Watchdog("vision encoder")

    async def encode(self, given: object) -> Encoded | Rejected:
        """Returns the features of every picture; passes on a request that was already rejected."""
        handed = await self._handoff.take(given)
        if isinstance(handed, Rejected):
            return handed
        assert isinstance(handed, Prepared), type(handed)
        elapsed = handed.elapsed.arrived()
        self._recorder.observe(STAGE_DURATION, elapsed.transfer_s(handed.elapsed), "transfer")
        work = partial(self._encode, handed.request, time.perf_counter())
        num_tiles = sum(len(image.tiles) for image in handed.request.images if image.digest not in self.cache)
        self._queued_tiles += num_tiles
        self._num_held += 1
        try:
            features = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (RuntimeError, ValueError) as error:
            # RuntimeError includes torch running out of memory: only this request fails, the replica keeps serving.
            logger.exception("request %s could not be encoded", handed.request.request_id)
            return Rejected(EngineError(f"the pictures could not be encoded: {error}"))
        finally:
            self._queued_tiles -= num_tiles
            self._num_held -= 1
        return Encoded(without_tiles(handed.request), features, elapsed.finished("encode"))

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises here."""
        self._watchdog.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, which scales on it (scaling.py). Reports the tiles not yet encoded, except those of cached
        pictures, and the share of time for which the tower was busy since the last call."""
        return {"queued_tiles": self._queued_tiles, BUSY: self._busy.share(), HELD_REQUESTS: self._num_held}

    def _encode(self, request: PreparedRequest, asked: float) -> tuple[PackedFeatures, ...]:
        from llava_core.vision.encode import encode_through

        began = time.perf_counter()
        self._recorder.observe(QUEUE_WAIT, began - asked, "encode")
        self._recorder.observe(IMAGES, len(request.images))
        try:
            with self._watchdog.work(), self._busy.work():
                put: list[int] = []
                encoded = encode_through(self._tower, request.images, self.cache, partial(self._share, put))
        finally:
            self._cores.release()
        self._recorder.observe(STAGE_DURATION, time.perf_counter() - began, "encode")
        # Features that are not an object of their own are sent with each request.
        sent = sum(each.data.nbytes for each in encoded.values() if isinstance(each.data, np.ndarray))
        record_handed_over(self._recorder, "encode_generate", sum(put) + sent)
        return tuple(replace(encoded[image.digest], size=image.size) for image in request.images)

    def _share(self, put: list[int], features: ImageFeatures) -> PackedFeatures:
        """Returns new features in the form that is cached; appends their bytes to `put` if they became an object of
        their own."""
        # Packing copies nothing.
        packed = pack(features)
        given = self._handoff.share(packed.data)
        if given is not packed.data:
            put.append(packed.data.nbytes)
        return replace(packed, data=given)
