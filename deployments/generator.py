"""The last stage: projector, splice and decoder behind the engine; text comes out in chunks as it is written.

A request that was rejected on the way is answered with its rejection. Knows no HTTP and no pictures, only features.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from deployments.handoff import Handoff
from deployments.messages import Elapsed, Encoded, Item, Prepared, Rejected, engine_request
from deployments.metrics import (
    IMAGE_TOKENS,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    QUEUE_WAIT,
    STAGE_DURATION,
    Recorder,
    Unrecorded,
)
from deployments.watchdog import Watchdog
from llava_core.errors import EngineError, LlavaError
from llava_core.types import EngineRequest, TokenDelta

if TYPE_CHECKING:
    from llava_core.engine.async_engine import AsyncEngine

logger = logging.getLogger(__name__)


class Generator:
    """Many answers at once from one engine."""

    def __init__(self, engine: AsyncEngine, handoff: Handoff, *, recorder: Recorder | None = None) -> None:
        self._engine = engine
        self._handoff = handoff
        self._recorder = recorder or Unrecorded()
        # How long a step may take is the engine's own concern.
        self._watchdog = Watchdog("generator")

    async def generate(self, given: object) -> AsyncGenerator[Item, None]:
        """Deltas up to one with `finish_reason`; or, first or last, a rejection. Leaving early aborts the request."""
        try:
            handed = await self._handoff.take(given)
        except LlavaError as error:
            handed = Rejected(error)
        if isinstance(handed, Rejected):
            yield handed
            return
        assert isinstance(handed, Prepared | Encoded), type(handed)
        elapsed = handed.elapsed.arrived()
        self._recorder.observe(STAGE_DURATION, elapsed.transfer_s(handed.elapsed), "transfer")
        request = _to_engine(handed)
        try:
            async with aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason is not None:
                        self._watchdog.succeeded()
                        self._record(delta)
                    yield _with_times(delta, elapsed)
        except LlavaError as error:
            if isinstance(error, EngineError):
                logger.warning("request %s ended with %s: %s", request.request_id, type(error).__name__, error)
                self._watchdog.failed()
            yield Rejected(error)

    async def check_health(self) -> None:
        """For Serve, which replaces a replica that raises here."""
        self._engine.check_health()
        self._watchdog.check()

    def _record(self, last: TokenDelta) -> None:
        """What an answer's last delta tells. Several answers to a prompt have read it once."""
        for stage, milliseconds in last.stage_ms.items():
            metric, label = (QUEUE_WAIT, "generate") if stage == "queue" else (STAGE_DURATION, stage)
            self._recorder.observe(metric, milliseconds / 1e3, label)
        if last.usage is not None and last.index == 0:
            self._recorder.count(PROMPT_TOKENS, by=last.usage.prompt_tokens)
            self._recorder.count(IMAGE_TOKENS, by=last.usage.image_tokens)
            self._recorder.count(PREFIX_HIT_TOKENS, by=last.usage.cached_tokens)


def _to_engine(handed: Prepared | Encoded) -> EngineRequest:
    return engine_request(handed.request, handed.features if isinstance(handed, Encoded) else ())


def _with_times(delta: TokenDelta, elapsed: Elapsed) -> TokenDelta:
    """The last delta tells where the time went in the stages before as well."""
    if delta.finish_reason is None:
        return delta
    return replace(delta, stage_ms={**elapsed.stage_ms, **delta.stage_ms})
