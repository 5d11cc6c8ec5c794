"""Requests whose replica died: done again once, each alone; content that kills again is refused for a while.

What was on a replica that died is either what has killed it or was beside that. One at a time tells which, because
nothing else that has been lost is on the next replica then. Kept by each gateway for itself: digests, never content.
Knows neither stages nor HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

from deployments.errors import ContentRefusedError, StageLostError
from deployments.metrics import QUARANTINED, RETRIES, Reading, Recorder, Unrecorded
from llava_core.types import (
    AnyRequest,
    CompletionRequest,
    GenerationRequest,
    ImagePart,
    ImageUrl,
    RenderedRequest,
    TextPart,
)

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Quarantine:
    """Refuses for `refused_s` seconds what a request that was lost twice was about, up to `max_entries` digests.

    At most `max_waiting` lost requests wait to be done again; others end with StageLostError."""

    def __init__(
        self,
        refused_s: float,
        *,
        max_entries: int = 4096,
        max_waiting: int = 64,
        clock: Callable[[], float] = time.monotonic,
        recorder: Recorder | None = None,
    ) -> None:
        self._refused_s = refused_s
        self._max_entries = max_entries
        self._max_waiting = max_waiting
        self._clock = clock
        # Until when, by digest, in this order.
        self._refused: OrderedDict[str, float] = OrderedDict()
        self._num_waiting = 0
        self._one_at_a_time = asyncio.Lock()
        self._recorder = recorder or Unrecorded()
        self._recorder.watch(self._readings)

    async def check(self, request: AnyRequest) -> None:
        """Raises ContentRefusedError. Costs nothing while there is nothing to refuse."""
        self._forget()
        if self._refused and not self._refused.keys().isdisjoint(await asyncio.to_thread(digests, request)):
            raise ContentRefusedError

    async def run(
        self, attempt: Callable[[], Awaitable[Result]], request: Callable[[], Awaitable[AnyRequest]]
    ) -> Result:
        """What the attempt gives; it is made again where it raises StageLostError. `request` is asked for only then.

        Raises ContentRefusedError when the second one is lost as well.
        """
        try:
            return await attempt()
        except StageLostError as error:
            if self._num_waiting >= self._max_waiting:
                raise
            lost = error
        async with self._turn():
            content = await request()
            # One like this may have been found out meanwhile.
            await self.check(content)
            self._recorder.count(RETRIES)
            try:
                return await attempt()
            except StageLostError:
                self._refuse(await asyncio.to_thread(digests, content))
                raise ContentRefusedError from lost

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        self._num_waiting += 1
        try:
            async with self._one_at_a_time:
                yield
        finally:
            self._num_waiting -= 1

    def _refuse(self, found: set[str]) -> None:
        until = self._clock() + self._refused_s
        logger.warning("refused for %g s, having been on two replicas that died: %s", self._refused_s, sorted(found))
        for digest in found:
            self._refused[digest] = until
            self._refused.move_to_end(digest)
        while len(self._refused) > self._max_entries:
            self._refused.popitem(last=False)

    def _readings(self) -> list[Reading]:
        """From a thread of its own, so it only counts."""
        now = self._clock()
        return [(QUARANTINED, sum(until > now for until in tuple(self._refused.values())), ())]

    def _forget(self) -> None:
        while self._refused and next(iter(self._refused.values())) <= self._clock():
            self._refused.popitem(last=False)


def digests(request: AnyRequest) -> set[str]:
    """SHA-256 of each picture, or of its address where it is still to be fetched; without pictures, of the prompt."""
    found = {hashlib.sha256(picture).hexdigest() for picture in pictures(request)}
    if found:
        return found
    # `repr`, because a text may hold halves of characters, which have no bytes.
    prompt = (request.system, request.messages) if isinstance(request, GenerationRequest) else request.prompt
    return {hashlib.sha256(repr(prompt).encode()).hexdigest()}


def pictures(request: AnyRequest) -> Iterator[bytes]:
    """The bytes of each picture, in order, or of its address where it is still to be fetched."""
    if isinstance(request, CompletionRequest):
        return
    if isinstance(request, RenderedRequest):
        yield from (part.data for part in request.images)
        return
    for part in (part for message in request.messages for part in message.parts):
        if isinstance(part, ImagePart):
            yield part.data
        elif isinstance(part, ImageUrl):
            yield repr(part.url).encode()
        else:
            assert isinstance(part, TextPart)
