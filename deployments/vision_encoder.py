"""The second stage: tiles through the vision tower, to features before the projector. For requests with pictures only.

Knows no prompts and no decoder. Imports torch only where it computes.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from deployments.handoff import Handoff
from deployments.messages import Encoded, PackedFeatures, Prepared, Rejected, pack, without_tiles
from deployments.watchdog import Watchdog
from llava_core.errors import EngineError
from llava_core.types import PreparedRequest

if TYPE_CHECKING:
    from llava_core.vision.towers import VisionTower

logger = logging.getLogger(__name__)


class VisionEncoder:
    """One tower, one thread: requests are encoded in the order they come, all pictures of one request together."""

    def __init__(self, tower: VisionTower, handoff: Handoff) -> None:
        self._tower = tower
        self._handoff = handoff
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

        with self._watchdog.work():
            return tuple(pack(features) for features in encode_images(self._tower, request.images))
