"""The first stage: pictures decoded and tiled, prompts rendered and tokenized, limits checked. On a CPU, without torch.

Wraps llava_core.prepare and adds nothing to it but threads and the clock.
"""

import asyncio
import logging

from deployments.messages import Elapsed, Prepared, Rejected
from llava_core.errors import LlavaError
from llava_core.prepare import Preparer
from llava_core.types import GenerationRequest

logger = logging.getLogger(__name__)


class Preprocessor:
    """Prepares several requests at once, each on a thread of its own."""

    def __init__(self, preparer: Preparer) -> None:
        self._preparer = preparer

    async def prepare(self, request: GenerationRequest) -> Prepared | Rejected:
        """Ids and tiles, or what is wrong with the request."""
        elapsed = Elapsed()
        try:
            prepared = await asyncio.to_thread(self._preparer.prepare, request)
        except LlavaError as error:
            return Rejected(error)
        return Prepared(prepared, elapsed.finished("preprocess"))

    async def ping(self) -> None:
        """Returns when requests would be answered."""
