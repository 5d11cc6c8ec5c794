"""One request's passage through the three stages, resumed from where it was each time a replica is lost.

Responses are passed on un-awaited, so pictures and features travel from replica to replica. Everything needed to resume
elsewhere is kept until the answer is complete: the request and the results of the first two stages in the object stores
of their nodes, and the tokens received so far in this process. quarantine.py decides who may retry, and when.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from deployments.errors import EARLIER, StageLostError, StageSilentError
from deployments.graph.affinity import session_of
from deployments.graph.handoff import Handoff
from deployments.graph.progress import Progress
from deployments.graph.ray_errors import ray_errors_as_ours
from deployments.graph.signs_of_life import listen
from deployments.graph.stage_call import Handle, StageCall, UnaryCall, unless_out_of_reach
from deployments.messages import Item, Rejected, is_last
from llava_core.types import GREEDY_BELOW, AnyRequest


@dataclass(frozen=True)
class Stages:
    """Configured handles of the three stages, how results are passed between them, and the model that is asked for."""

    prepare: Handle
    encode: Handle
    generate: Handle
    handoff: Handoff
    model: str


class Passage:
    """Must be closed with `close`, which cancels the request on every stage unless its answer is complete."""

    def __init__(self, stages: Stages, request: AnyRequest, on_sent: Callable[[], None]) -> None:
        """`on_sent` is called each time the request has left this process: again after a retry from the first stage."""
        self._stages = stages
        self._on_sent = on_sent
        self._session = self._session_of_last = session_of(request)
        self._has_images = request.num_images > 0
        self._progress = Progress(request.sampling.n)
        self._kept = stages.handoff.keep(repeatable(request))
        # Calls of the first two stages, whose results live as long as their responses do.
        self._calls: list[UnaryCall] = []
        # What to pass to the last stage; None until the first two have been called.
        self._given: object = None
        # Whether the last item has been received.
        self.is_complete = False

    async def request(self) -> AnyRequest:
        """The request, fetched back from where it is kept."""
        return await self._stages.handoff.kept(self._kept)

    async def begin(self) -> tuple[Item | None, AsyncGenerator[Item, None]]:
        """Start, or resume after a loss: the next item, None where there is none, and the stream of those after it.

        Raises StageLostError, also when a stage reports the loss as a rejection.
        """
        is_new = self._given is None
        items = self._items()
        try:
            first = await unless_out_of_reach(anext(items, None), self._calls)
        except StageLostError as lost:
            if lost.stage == EARLIER:
                self._forget()
            raise
        if not (isinstance(first, Rejected) and isinstance(first.error, StageLostError)):
            return first, items
        await items.aclose()
        self._forget()
        # The features were lost, not the last stage's replica: it must not become a suspect (suspects.py).
        self._session_of_last = self._session_of_last.anew
        if is_new:
            raise first.error
        # The earlier results were lost with the node that held them: make them again.
        return await self.begin()

    def close(self) -> None:
        """Release what is kept, and cancel the request unless its answer is complete."""
        self._end_calls(is_over=self.is_complete)

    async def _items(self) -> AsyncGenerator[Item, None]:
        given = [await self._prepared()]
        if begun := self._progress.begun:
            given.append(begun)
        with ray_errors_as_ours("generator"):
            call = StageCall("generator", self._stages.generate, self._session_of_last, *given)
            try:
                async with aclosing(listen(call.response, call.check_silent)) as items:
                    async for item in items:
                        if not isinstance(item, Rejected):
                            self._progress.note(item)
                        self.is_complete = is_last(item)
                        yield item
            except StageSilentError:
                # The results of earlier stages are probably out of reach too if they are on the same node. Making them
                # again now is cheaper than waiting for them, which would take another SILENCE_S.
                if (node := call.node()) and node in {earlier.node() for earlier in self._calls}:
                    self._forget()
                raise
            finally:
                call.close(is_over=self.is_complete)

    async def _prepared(self) -> object:
        """What to pass to the last stage; calls the first two stages if there is nothing yet, or no longer."""
        if self._given is not None:
            return self._given
        self._forget()
        stages, handoff = self._stages, self._stages.handoff
        with ray_errors_as_ours(EARLIER):
            # A text has no affinity: replicas of the first stage cache nothing for it.
            session = self._session if self._has_images else self._session.keyless
            prepare = UnaryCall(EARLIER, stages.prepare, session, self._kept, stages.model, handoff=handoff)
            self._calls.append(prepare)
            if self._has_images:
                encode = UnaryCall(EARLIER, stages.encode, session, prepare.response, handoff=handoff)
                self._calls.append(encode)
            self._given = await self._calls[-1].given
        self._on_sent()
        return self._given

    def _forget(self) -> None:
        """Drop the results of the first two stages."""
        self._end_calls(is_over=False)
        self._given, self.is_complete = None, False

    def _end_calls(self, *, is_over: bool) -> None:
        for call in reversed(self._calls):
            call.close(is_over=is_over)
        self._calls.clear()


def repeatable(request: AnyRequest) -> AnyRequest:
    """The request with a seed if it samples without one, so that a replica which resumes it draws the same tokens."""
    sampling = request.sampling
    if sampling.seed is not None or sampling.temperature < GREEDY_BELOW:
        return request
    return replace(request, sampling=replace(sampling, seed=secrets.randbits(63)))
