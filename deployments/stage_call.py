"""One call of a stage for a request: where it is, whether its result can still come, and its end.

A replica that dies ends its calls, and Ray tells. One whose host cannot be reached any more ends nothing, and to Ray it
is alive as long as the head reaches it. So whoever waits for long asks. Knows what a call is, not what stages do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Collection, Sequence
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayError
from ray.serve.handle import DeploymentHandle

from deployments.affinity import Session
from deployments.errors import StageSilentError, StageUnavailableError
from deployments.handoff import Handoff
from deployments.sent_calls import SENT_CALLS, Replica, Whereabouts
from deployments.signs_of_life import SILENCE_S
from deployments.waiting import abandon

logger = logging.getLogger(__name__)
Handle = DeploymentHandle[Any]
Result = TypeVar("Result")
# How long a stage may take before it is asked whether it is there, and again after as long.
ASKED_AFTER_S = SILENCE_S / 2
# A stream that was sent so long ago has had time for signs of life.
_FIRST_SIGNS_S = SILENCE_S / 2


class StageCall:
    """Begins at once, to the replica that the session's key prefers (routing.py). `close` it.

    `stage` is for metrics."""

    def __init__(self, stage: str, handle: Handle, session: Session, *given: object) -> None:
        self._stage = stage
        self._key = handle.deployment_name, session.request
        with contextlib.ExitStack() as undo:
            SENT_CALLS.watch(*self._key)
            undo.callback(SENT_CALLS.forget, *self._key)
            # A copy with the same router, in microseconds.
            self.response: Any = handle.options(session_id=str(session)).remote(*given)
            undo.pop_all()
        self._before: Whereabouts | None = None

    def is_begun(self) -> bool:
        """Whether a replica is known to be at work on it."""
        return False

    async def check(self) -> None:
        """For whoever waits, every now and then: raises StageSilentError where its replica says nothing any more, or
        is there and does not begin, because what it is to work on does not get there; StageUnavailableError where no
        replica that could take it says anything."""
        where = SENT_CALLS.where(*self._key)
        are_silent = await _are_silent(where.replicas())
        if SENT_CALLS.where(*self._key) is not where:
            # It has moved on while they were asked.
            return
        if are_silent and not where.is_sent:
            raise StageUnavailableError("no replica of a stage of the service can be reached")
        if are_silent:
            raise self._silent("says nothing")
        if where.is_sent and not self.is_begun() and where is self._before:
            raise self._silent("is there, but what it is to work on does not get there")
        self._before = where

    async def check_silent(self) -> None:
        """As `check`, for a stream that gives signs of life once it is sent, and has given none for too long."""
        where = SENT_CALLS.where(*self._key)
        if not where.is_sent:
            await self.check()
        elif time.monotonic() - where.since >= _FIRST_SIGNS_S:
            raise self._silent("says nothing")

    def _silent(self, what: str) -> StageSilentError:
        logger.warning("the replica of %s that has a call %s", self._key[0], what)
        return StageSilentError(stage=self._stage)

    def close(self, *, is_over: bool) -> None:
        """Nobody waits for it any more; it is cancelled where it is not over."""
        if not is_over:
            self.response.cancel()
        SENT_CALLS.forget(*self._key)


class UnaryCall(StageCall):
    """Of a method that returns once, to a stage or to the gateway."""

    def __init__(self, stage: str, handle: Handle, session: Session, *given: object, handoff: Handoff) -> None:
        super().__init__(stage, handle, session, *given)
        self._handoff = handoff
        # What to give another stage in its place; there is one as soon as a replica has begun.
        self.given = asyncio.ensure_future(handoff.give(self.response))

    def is_made(self) -> bool:
        """Whether there is a result, or an error."""
        if not self.given.done():
            return False
        has_failed = self.given.cancelled() or self.given.exception() is not None
        return has_failed or self._handoff.is_made(self.given.result())

    def is_begun(self) -> bool:
        """See StageCall."""
        return self.given.done()

    def close(self, *, is_over: bool) -> None:
        """See StageCall."""
        self.given.cancel()
        # Perhaps nobody has waited for it.
        self.given.add_done_callback(lambda given: given.cancelled() or given.exception())
        super().close(is_over=is_over)


async def unless_out_of_reach(wanted: Awaitable[Result], calls: Sequence[UnaryCall]) -> Result:
    """What is wanted, which takes what these calls return, and each of them what the one before does. Raises as
    `StageCall.check` does where that cannot come any more. Whoever leaves takes along what is wanted."""
    watch, coming = asyncio.ensure_future(_watch(calls)), asyncio.ensure_future(wanted)
    try:
        await asyncio.wait([watch, coming], return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            watch.result()
        return await coming
    finally:
        await abandon(watch, coming)


async def _watch(calls: Sequence[UnaryCall]) -> None:
    """Until all have returned."""
    while True:
        await asyncio.sleep(ASKED_AFTER_S)
        owing = next((call for call in calls if not call.is_made()), None)
        if owing is None:
            return
        await owing.check()


async def _are_silent(replicas: Collection[Replica]) -> bool:
    """Whether none of them says anything, of some that Ray takes for alive."""
    asked = [asyncio.ensure_future(_answers(replica)) for replica in replicas]
    if not asked:
        return False
    try:
        async with asyncio.timeout(SILENCE_S):
            for answer in asyncio.as_completed(asked):
                if await answer:
                    return False
    except TimeoutError:
        return True
    finally:
        await abandon(*asked)
    return False


async def _answers(replica: Replica) -> bool:
    try:
        await replica.get_queue_len(deadline_s=SILENCE_S)
    except RayActorError:
        # Of one that is gone Ray tells those who wait for it.
        return False
    except RayError:
        # Whatever is wrong with it, it is there.
        logger.exception("a replica cannot say what it has to do")
    return True
