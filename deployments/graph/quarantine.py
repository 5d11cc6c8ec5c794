"""Requests whose replica died: retried, most of them one at a time; content that kills again is refused for a while.

A request on a replica that died either killed it or merely ran beside the one that did. Retrying one at a time tells
which, because no other lost request is then on the next replica. Only an answer that had begun, whose prompt and
pictures have therefore done no harm, resumes at once, beside others, and only the first time. Each gateway keeps its
own record: digests, never content. Knows neither stages nor HTTP.
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
# Whether the client had received part of its answer when the replica was lost.
Phase = Literal["waiting", "streaming"]
# A request under which more replicas than this die is to blame, however harmless it looks.
_MOST_AGAIN = 3


class Quarantine:
    """Refuses for `refused_s` seconds the content of requests that have killed replicas, up to `max_entries` digests.

    At most `max_waiting` lost requests wait to be retried; others end with StageLostError."""

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
        # When each refusal ends, by digest, earliest first.
        self._refused: OrderedDict[str, float] = OrderedDict()
        self._num_waiting = 0
        self._turns = _Turns()
        self._recorder = recorder or Unrecorded()
        self._recorder.watch(self._readings)

    async def check(self, request: AnyRequest) -> None:
        """Raises ContentRefusedError for refused content. Costs nothing while nothing is refused."""
        self._forget()
        if self._refused and not self._refused.keys().isdisjoint(await asyncio.to_thread(digests, request)):
            raise ContentRefusedError

    def case(self, request: Callable[[], Awaitable[AnyRequest]]) -> Case:
        """The case of one request; `request` is called only if a replica is lost."""
        return Case(self, request)

    def turn(self, lost: StageLostError, *, is_harmless: bool) -> contextlib.AbstractAsyncContextManager[_WasAlone]:
        """A context manager around the retry of a request. Raises `lost` when too many wait for theirs."""
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
        """Called before each retry, which it counts. Raises ContentRefusedError if the content has meanwhile been
        refused."""
        if self._refused:
            await self.check(await request())
        self._recorder.count(RETRIES, stage, phase)

    async def refuse(self, request: AnyRequest) -> None:
        """Refuses the content of this request from now on."""
        found = await asyncio.to_thread(digests, request)
        until = self._clock() + self._refused_s
        logger.warning("refused for %g s, having been on replicas that died: %s", self._refused_s, sorted(found))
        for digest in found:
            self._refused[digest] = until
            self._refused.move_to_end(digest)
        while len(self._refused) > self._max_entries:
            self._refused.popitem(last=False)

    def _readings(self) -> list[Reading]:
        """Called from another thread, so it only reads."""
        now = self._clock()
        return [(QUARANTINED, sum(until > now for until in tuple(self._refused.values())), ())]

    def _forget(self) -> None:
        while self._refused and next(iter(self._refused.values())) <= self._clock():
            self._refused.popitem(last=False)


class Case:
    """One request, and how many replicas it has lost."""

    def __init__(self, quarantine: Quarantine, request: Callable[[], Awaitable[AnyRequest]]) -> None:
        self._quarantine = quarantine
        self._request = request
        self._num_lost = 0

    async def run(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """Returns the attempt's result, retrying when it raises StageLostError. Raises as `again` does."""
        try:
            return await attempt()
        except StageLostError as error:
            lost = error
        return await self.again(attempt, lost, phase="waiting")

    async def again(self, attempt: Callable[[], Awaitable[Result]], lost: StageLostError, *, phase: Phase) -> Result:
        """Returns the result of another attempt.

        Raises ContentRefusedError when a retry is lost although no other lost request ran beside it, or when there were
        too many losses; StageSilentError instead where the replica was only silent; `lost` when too many requests wait.
        """
        while True:
            self._num_lost += 1
            if self._num_lost > _MOST_AGAIN:
                await self._give_up(lost)
            # No content can silence a host.
            is_harmless = isinstance(lost, StageSilentError) or (phase == "streaming" and self._num_lost == 1)
            async with self._quarantine.turn(lost, is_harmless=is_harmless) as was_alone:
                await self._quarantine.check_again(self._request, lost.stage, phase)
                logger.info("retrying after losing the %s while %s: loss %d", lost.stage, phase, self._num_lost)
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
    """Which lost requests are being retried: a single one, or any number that look harmless."""

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()
        self._num_beside = self._num_came = 0
        self._nobody_beside = asyncio.Event()
        self._nobody_beside.set()

    @contextlib.asynccontextmanager
    async def beside(self) -> AsyncIterator[_WasAlone]:
        """Enters at once, because an answer has stopped in mid-sentence."""
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
        """Waits until no other lost request is being retried. Harmless ones may still join; the function that it yields
        tells whether none has."""
        async with self._one_at_a_time:
            await self._nobody_beside.wait()
            before = self._num_came
            yield lambda: self._num_came == before


def digests(request: AnyRequest) -> set[str]:
    """SHA-256 of each picture, or of its address if it is not fetched yet; without pictures, of the prompt."""
    found = {hashlib.sha256(picture).hexdigest() for picture in pictures(request)}
    if found:
        return found
    # `repr`, because a text may hold lone surrogates, which cannot be encoded.
    prompt = (request.system, request.messages) if isinstance(request, GenerationRequest) else request.prompt
    return {hashlib.sha256(repr(prompt).encode()).hexdigest()}


def pictures(request: AnyRequest) -> Iterator[bytes]:
    """The bytes of each picture, in order, or of its address if it is not fetched yet."""
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
