"""One call of a stage for a request: where it is, whether its result can still arrive, and its cleanup.

When a replica dies, Ray fails its calls. When its host becomes unreachable, the calls just hang, and Ray considers the
replica alive for as long as the head can reach it. So a caller that has waited for long asks the replica whether it is
there. Knows what a call is, not what stages do.
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

from deployments.errors import StageSilentError, StageUnavailableError
from deployments.graph.affinity import Session
from deployments.graph.handoff import Handoff
from deployments.graph.sent_calls import SENT_CALLS, Replica, Whereabouts
from deployments.graph.signs_of_life import SILENCE_S
from deployments.waiting import abandon

logger = logging.getLogger(__name__)
Handle = DeploymentHandle[Any]
Result = TypeVar("Result")
# How long a stage may take before its replica is asked whether it is there, and the interval between such questions.
ASKED_AFTER_S = SILENCE_S / 2
# A stream that was sent this long ago should have given a sign of life.
_FIRST_SIGNS_S = SILENCE_S / 2


class StageCall:
    """The constructor makes the call, which goes to the replica that the session's key prefers (routing.py).

    Must be closed with `close`. `stage` is the label for metrics and errors."""

    def __init__(self, stage: str, handle: Handle, session: Session, *given: object) -> None:
        self._stage = stage
        self._key = handle.deployment_name, session.request
        with contextlib.ExitStack() as undo:
            SENT_CALLS.watch(*self._key)
            undo.callback(SENT_CALLS.forget, *self._key)
            # `options` copies the handle in microseconds; the copy shares its router.
            self.response: Any = handle.options(session_id=str(session)).remote(*given)
            undo.pop_all()
        self._before: Whereabouts | None = None

    def is_begun(self) -> bool:
        """Whether a replica is known to have started executing the call."""
        return False

    def node(self) -> str | None:
        """The id of the node whose replica the call was sent to; None before that."""
        where = SENT_CALLS.where(*self._key)
        return next((replica.node_id for replica in where.replicas()), None) if where.is_sent else None

    async def check(self) -> None:
        """Check from time to time, while waiting, that the result can still arrive.

        Raises StageSilentError when the call's replica does not answer, or answers but has not begun between two
        checks, because its arguments do not reach it; StageUnavailableError when the call has not been sent and none of
        the replicas that could take it answers.
        """
        where = SENT_CALLS.where(*self._key)
        are_silent = await _are_silent(where.replicas())
        if SENT_CALLS.where(*self._key) is not where:
            # The call moved to another replica in the meantime.
            return
        if are_silent and not where.is_sent:
            raise StageUnavailableError("no replica of one of the service's stages can be reached")
        if are_silent:
            raise self._silent("does not answer")
        if where.is_sent and not self.is_begun() and where is self._before:
            raise self._silent("answers, but has not begun: its arguments do not reach it")
        self._before = where

    async def check_silent(self) -> None:
        """Like `check`, for a stream that has been silent for too long: once sent, it should give signs of life."""
        where = SENT_CALLS.where(*self._key)
        if not where.is_sent:
            await self.check()
        elif time.monotonic() - where.since >= _FIRST_SIGNS_S:
            raise self._silent("does not answer")

    def _silent(self, what: str) -> StageSilentError:
        logger.warning("the replica of %s that holds a call %s", self._key[0], what)
        return StageSilentError(stage=self._stage)

    def close(self, *, is_over: bool) -> None:
        """Stop watching the call, and cancel it unless it `is_over`."""
        if not is_over:
            self.response.cancel()
        SENT_CALLS.forget(*self._key)


class UnaryCall(StageCall):
    """A call of a method that returns a single result, which goes to another stage or to the gateway."""

    def __init__(self, stage: str, handle: Handle, session: Session, *given: object, handoff: Handoff) -> None:
        super().__init__(stage, handle, session, *given)
        self._handoff = handoff
        # What to pass to another stage instead of the response; available once a replica has begun.
        self.given = asyncio.ensure_future(handoff.give(self.response))

    def is_made(self) -> bool:
        """Whether the call has produced a result or an error."""
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
        # Retrieves the exception, which perhaps nobody has awaited.
        self.given.add_done_callback(lambda given: given.cancelled() or given.exception())
        super().close(is_over=is_over)


async def unless_out_of_reach(wanted: Awaitable[Result], calls: Sequence[UnaryCall]) -> Result:
    """Await `wanted`, which depends on the results of `calls`, each of which takes the result of the one before.

    Raises what `StageCall.check` raises when a result can no longer arrive. Cancelling this also cancels `wanted`."""
    watch, coming = asyncio.ensure_future(_watch(calls)), asyncio.ensure_future(wanted)
    try:
        await asyncio.wait([watch, coming], return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            watch.result()
        return await coming
    finally:
        await abandon(watch, coming)


async def _watch(calls: Sequence[UnaryCall]) -> None:
    """Checks the first unfinished call every ASKED_AFTER_S. Returns once all calls have returned."""
    while True:
        await asyncio.sleep(ASKED_AFTER_S)
        owing = next((call for call in calls if not call.is_made()), None)
        if owing is None:
            return
        await owing.check()


async def _are_silent(replicas: Collection[Replica]) -> bool:
    """Whether there are replicas, all considered alive by Ray, and none answers within SILENCE_S."""
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
        # The replica is dead, and Ray fails its calls by itself.
        return False
    except RayError:
        # It answered, with an error: something is wrong with it, but it is reachable.
        logger.exception("a replica failed to report its queue length")
    return True
