"""Requests whose replica died: done again, most of them alone; content that kills again is refused for a while.

What was on a replica that died is either what has killed it or was beside that. One at a time tells which, because
nothing else that has been lost is on the next replica then. Only an answer that had begun, whose prompt and pictures
have done no harm, goes on at once, beside others; and only the first time. Kept by each gateway for itself: digests,
never content. Knows neither stages nor HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Literal, NoReturn, TypeVar

from deployments.errors import ContentRefusedError, StageLostError, StageSilentError
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
# Whether a client had got a piece of its answer when that was lost.
Phase = Literal["waiting", "streaming"]
# However harmless a request looks, it has to do with it when so many replicas die under it.
_MOST_AGAIN = 3


class Quarantine:
    """Refuses for `refused_s` seconds what a request that has killed was about, up to `max_entries` digests.

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
        self._turns = _Turns()
        self._recorder = recorder or Unrecorded()
        self._recorder.watch(self._readings)

    async def check(self, request: AnyRequest) -> None:
        """Raises ContentRefusedError. Costs nothing while there is nothing to refuse."""
        self._forget()
        if self._refused and not self._refused.keys().isdisjoint(await asyncio.to_thread(digests, request)):
            raise ContentRefusedError

    def case(self, request: Callable[[], Awaitable[AnyRequest]]) -> Case:
        """For one request, which is asked for only where it is lost."""
        return Case(self, request)

    def turn(self, lost: StageLostError, *, is_harmless: bool) -> contextlib.AbstractAsyncContextManager[_WasAlone]:
        """For the block that does it again. Raises `lost` where too many wait for that."""
        if is_harmless:
            return self._turns.beside()
        if self._num_waiting >= self._max_waiting:
            raise lost
        return self._alone()

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[_WasAlone]:
        self._num_waiting += 1
        try:
            async with self._turns.alone() as was_alone:
                yield was_alone
        finally:
            self._num_waiting -= 1

    async def check_again(self, request: Callable[[], Awaitable[AnyRequest]], stage: str, phase: Phase) -> None:
        """Before it is done again, which is counted. Raises ContentRefusedError where one like this has been found out
        meanwhile."""
        if self._refused:
            await self.check(await request())
        self._recorder.count(RETRIES, stage, phase)

    async def refuse(self, request: AnyRequest) -> None:
        """What this is about, from now on."""
        found = await asyncio.to_thread(digests, request)
        until = self._clock() + self._refused_s
        logger.warning("refused for %g s, having been on replicas that died: %s", self._refused_s, sorted(found))
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


class Case:
    """One request, and how often its replica died."""

    def __init__(self, quarantine: Quarantine, request: Callable[[], Awaitable[AnyRequest]]) -> None:
        self._quarantine = quarantine
        self._request = request
        self._num_lost = 0

    async def run(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """What the attempt gives; it is made again where it raises StageLostError. Raises as `again` does."""
        try:
            return await attempt()
        except StageLostError as error:
            lost = error
        return await self.again(attempt, lost, phase="waiting")

    async def again(self, attempt: Callable[[], Awaitable[Result]], lost: StageLostError, *, phase: Phase) -> Result:
        """What another attempt gives.

        Raises ContentRefusedError when that is lost as well though nothing else that was lost is beside it, or when
        there have been too many, StageSilentError where it was only not heard of; `lost` when too many wait.
        """
        while True:
            self._num_lost += 1
            if self._num_lost > _MOST_AGAIN:
                await self._give_up(lost)
            # What has silenced a host was no content.
            is_harmless = isinstance(lost, StageSilentError) or (phase == "streaming" and self._num_lost == 1)
            async with self._quarantine.turn(lost, is_harmless=is_harmless) as was_alone:
                await self._quarantine.check_again(self._request, lost.stage, phase)
                logger.info("done again, having lost its %s while %s: loss %d", lost.stage, phase, self._num_lost)
                try:
                    return await attempt()
                except StageLostError as error:
                    if was_alone():
                        await self._give_up(error)
                    lost = error

    async def _give_up(self, lost: StageLostError) -> NoReturn:
        if isinstance(lost, StageSilentError):
            raise lost
        await self._quarantine.refuse(await self._request())
        raise ContentRefusedError from lost


_WasAlone = Callable[[], bool]


class _Turns:
    """Who of what was lost is on its way to another replica: one alone, or any number of those that look harmless."""

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()
        self._num_beside = self._num_came = 0
        self._nobody_beside = asyncio.Event()
        self._nobody_beside.set()

    @contextlib.asynccontextmanager
    async def beside(self) -> AsyncIterator[_WasAlone]:
        """Waits for nobody, because somebody has stopped in mid-sentence."""
        self._num_came += 1
        self._num_beside += 1
        self._nobody_beside.clear()
        try:
            yield lambda: False
        finally:
            self._num_beside -= 1
            if not self._num_beside:
                self._nobody_beside.set()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[_WasAlone]:
        """Waits until nothing else that was lost is on its way. More may come; whether that was so can be asked."""
        async with self._one_at_a_time:
            await self._nobody_beside.wait()
            before = self._num_came
            yield lambda: self._num_came == before


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
