"""The last stage: projector, splice and decoder behind the engine; streams text in chunks as it is generated.

A request that an earlier stage rejected is answered with that rejection. Knows no HTTP and no pictures, only features.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from deployments.graph.handoff import Handoff
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
from deployments.scaling import HELD_REQUESTS
from deployments.watchdog import Watchdog
from llava_core.errors import EngineError, LlavaError
from llava_core.types import BegunAnswer, EngineRequest, PreparedRequest, TokenDelta, Usage

if TYPE_CHECKING:
    from llava_core.engine.async_engine import AsyncEngine

logger = logging.getLogger(__name__)


class Generator:
    """Many answers at once from one engine."""

    def __init__(
        self,
        engine: AsyncEngine,
        handoff: Handoff,
        *,
        token_bytes: Callable[[int], bytes] = lambda _: b"",
        recorder: Recorder | None = None,
    ) -> None:
        """`token_bytes` is called for the tokens that log-probabilities name."""
        self._engine = engine
        self._token_bytes = token_bytes
        self._handoff = handoff
        self._recorder = recorder or Unrecorded()
        # The engine itself limits how long a step may take.
        self._watchdog = Watchdog("generator")
        self._numbers = count()

    async def generate(self, given: object, begun: Sequence[BegunAnswer] = ()) -> AsyncGenerator[Item, None]:
        """Yields deltas, the last of which carries `usage`; or a rejection, as the first or last item. Closing early
        aborts the request.

        Answers that another replica has `begun` are resumed; `usage` still covers all of them."""
        try:
            handed = await self._taken(given)
        except LlavaError as error:
            handed = Rejected(error)
        if isinstance(handed, Rejected):
            yield handed
            return
        assert isinstance(handed, Prepared | Encoded), type(handed)
        elapsed = handed.elapsed.arrived()
        self._recorder.observe(STAGE_DURATION, elapsed.transfer_s(handed.elapsed), "transfer")
        request = self._to_engine(handed, begun)
        ended: list[Usage] = []
        try:
            async with aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason is not None:
                        self._watchdog.succeeded()
                        self._record(delta)
                        delta = _ended(delta, ended, request.begun, handed.request, elapsed)
                    yield self._spelled(delta) if delta.logprobs else delta
        except LlavaError as error:
            if isinstance(error, EngineError):
                logger.warning("request %s ended with %s: %s", request.request_id, type(error).__name__, error)
                self._watchdog.failed()
            yield Rejected(error)

    async def _taken(self, given: object) -> object:
        """The previous stage's result, with the features themselves in place of references to them."""
        handed = await self._handoff.take(given)
        if not isinstance(handed, Encoded):
            return handed
        data = await asyncio.gather(*(self._handoff.shared(each.data) for each in handed.features))
        features = tuple(replace(each, data=each_data) for each, each_data in zip(handed.features, data, strict=True))
        return replace(handed, features=features)

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises here."""
        self._engine.check_health()
        self._watchdog.check()

    def _to_engine(self, handed: Prepared | Encoded, begun: Sequence[BegunAnswer]) -> EngineRequest:
        features = handed.features if isinstance(handed, Encoded) else ()
        request = engine_request(handed.request, features, begun)
        # The first attempt of a retried request may still be running here, if only the connection broke.
        return replace(request, request_id=f"{request.request_id}/{next(self._numbers)}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, which scales on it (scaling.py). Reports the prompt tokens waiting for prefill, and the
        shares of its blocks and of its slots that the engine uses; the share of slots exceeds 1 when answers wait."""
        stats = self._engine.stats
        return {
            "queued_prefill_tokens": stats.num_unread,
            "kv_cache_use": stats.used_blocks / stats.num_blocks,
            "slot_use": (stats.num_running + stats.num_waiting) / self._engine.max_running,
            HELD_REQUESTS: self._engine.num_requests,
        }

    def _spelled(self, delta: TokenDelta) -> TokenDelta:
        """Adds the bytes of every token that the delta names, for receivers without a tokenizer."""
        named = {token for each in delta.logprobs for token in (each.token, *(token for token, _ in each.top))}
        return replace(delta, token_bytes={token: self._token_bytes(token) for token in named})

    def _record(self, last: TokenDelta) -> None:
        """Records what an answer's last delta reports. The answers to one prompt share one prefill, counted once."""
        for stage, milliseconds in last.stage_ms.items():
            metric, label = (QUEUE_WAIT, "generate") if stage == "queue" else (STAGE_DURATION, stage)
            self._recorder.observe(metric, milliseconds / 1e3, label)
        if last.usage is not None and last.index == 0:
            self._recorder.count(PROMPT_TOKENS, by=last.usage.prompt_tokens)
            self._recorder.count(IMAGE_TOKENS, by=last.usage.image_tokens)
            self._recorder.count(PREFIX_HIT_TOKENS, by=last.usage.cached_tokens)


def _ended(
    delta: TokenDelta,
    ended: list[Usage],
    begun: Sequence[BegunAnswer],
    request: PreparedRequest,
    elapsed: Elapsed,
) -> TokenDelta:
    """Completes the last delta of an answer. Only that of the request's last answer carries the usage of all answers,
    the time per stage and the image transforms."""
    assert delta.usage is not None, "an engine's last delta carries its usage"
    ended.append(delta.usage)
    over = [len(answer.token_ids) for answer in begun if answer.is_over]
    if len(ended) + len(over) < request.sampling.n:
        return replace(delta, usage=None, stage_ms={})
    stage_ms = {**elapsed.stage_ms, **delta.stage_ms}
    return replace(delta, usage=_together(ended, sum(over)), stage_ms=stage_ms, transforms=request.transforms)


def _together(usages: list[Usage], elsewhere: int) -> Usage:
    """Adds up usages. The prompt counts once; its cached tokens are those that the first answer to prefill it found.
    `elsewhere` is the number of tokens of answers that had finished before the request came here."""
    return replace(
        usages[0],
        completion_tokens=elsewhere + sum(usage.completion_tokens for usage in usages),
        cached_tokens=min(usage.cached_tokens for usage in usages),
    )
