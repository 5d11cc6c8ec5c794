"""The second stage: tiles through the vision tower, to features before the projector. For requests with pictures only.

What was encoded lately is kept, so a conversation about one picture encodes it once. Knows no prompts and no decoder.
Imports torch only where it computes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from deployments.handoff import Handoff
from deployments.messages import Encoded, PackedFeatures, Prepared, Rejected, pack, without_tiles
from deployments.shared_cores import Cores, OwnCores
from deployments.watchdog import Watchdog
from llava_core.errors import EngineError
from llava_core.lru import LruCache
from llava_core.types import PreparedRequest

if TYPE_CHECKING:
    from torch import Tensor

    from llava_core.vision.towers import VisionTower

logger = logging.getLogger(__name__)
_REPORT_S = 60.0


class VisionEncoder:
    """One tower, one thread: requests are encoded in the order they come, so equal pictures never run side by side."""

    def __init__(
        self, tower: VisionTower, handoff: Handoff, *, cache_bytes: int = 0, cores: Cores | None = None
    ) -> None:
        """`cores` is told when a request's pictures are done."""
        self.cache: LruCache[Tensor] = LruCache(cache_bytes)
        self._tower = tower
        self._handoff = handoff
        self._cores = OwnCores() if cores is None else cores
        self._report_at = time.monotonic() + _REPORT_S
        self._thread = ThreadPoolExecutor(1, "tower")
        self._watchdog = Watchdog("vision encoder")

    async def encode(self, given: object) -> Encoded | Rejected:
        """Features of every picture; a request that was rejected before is passed on as it is."""
        handed = await self._handoff.take(given)
        if isinstance(handed, Rejected):
            return handed
        assert isinstance(handed, Prepared), type(handed)
        elapsed = handed.elapsed.arrived()
        try:
            features = await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, handed.request)
        except (RuntimeError, ValueError) as error:
            # RuntimeError is also torch's lack of memory: this request ends, the replica goes on.
            logger.exception("request %s could not be encoded", handed.request.request_id)
            return Rejected(EngineError(f"the pictures could not be encoded: {error}"))
        return Encoded(without_tiles(handed.request), features, elapsed.finished("encode"))

    async def check_health(self) -> None:
        """For Serve, which replaces a replica that raises here."""
        self._watchdog.check()

    def _encode(self, request: PreparedRequest) -> tuple[PackedFeatures, ...]:
        from llava_core.vision.encode import encode_images

        try:
            with self._watchdog.work():
                # Packing copies nothing: what is kept and what is handed over are the same bytes.
                return tuple(pack(features) for features in encode_images(self._tower, request.images, self.cache))
        finally:
            self._cores.release()
            self._report()

    def _report(self) -> None:
        """Once a minute while there is work: whether the cache is of any use, and whether it is full."""
        now, cache = time.monotonic(), self.cache
        if now >= self._report_at:
            self._report_at = now + _REPORT_S
            hits, looked_up = cache.num_hits, cache.num_hits + cache.num_misses
            logger.info("feature cache: %d of %d pictures since the start, %d bytes", hits, looked_up, cache.num_bytes)
