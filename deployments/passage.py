"""One request's way through the three stages, again from where it was each time that a replica is lost.

Responses are passed on un-awaited, so pictures and features go from replica to replica. What it takes to go on with an
answer elsewhere is kept until it is complete: the request and what the first two stages have made of it, in the stores
of their machines, and here the tokens that have come. Who may try again, and when, is quarantine.py's.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from deployments.affinity import session_of
from deployments.errors import EARLIER, StageLostError
from deployments.handoff import Handoff
from deployments.messages import Item, Rejected, is_last
from deployments.progress import Progress
from deployments.ray_errors import ray_errors_as_ours
from deployments.signs_of_life import listen
from deployments.stage_call import Handle, StageCall, UnaryCall, unless_out_of_reach
from llava_core.types import GREEDY_BELOW, AnyRequest


@dataclass(frozen=True)
class Stages:
    """Configured handles of the three, how they hand over, and the model that they are asked for."""

    prepare: Handle
    encode: Handle
    generate: Handle
    handoff: Handoff
    model: str


class Passage:
    """`close` it at the end, which cancels the request on every stage unless its answer is complete."""

    def __init__(self, stages: Stages, request: AnyRequest, on_sent: Callable[[], None]) -> None:
        """`on_sent` is called when the request has left this process, and may be so again."""
        self._stages = stages
        self._on_sent = on_sent
        self._session = self._session_of_last = session_of(request)
        self._has_images = request.num_images > 0
        self._progress = Progress(request.sampling.n)
        self._kept = stages.handoff.keep(repeatable(request))
        # Of the first two stages, whose results live as long as their responses do; and what to give the last one.
        self._calls: list[UnaryCall] = []
        self._given: object = None
        # Whether the last item has come.
        self.is_complete = False

    async def request(self) -> AnyRequest:
        """What is on its way."""
        return await self._stages.handoff.kept(self._kept)

    async def begin(self) -> tuple[Item | None, AsyncGenerator[Item, None]]:
        """The first item that has not come yet, and those after it. Raises StageLostError also where a stage only tells
        of one."""
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
        # The last stage's replica has lost nothing.
        self._session_of_last = self._session_of_last.anew
        if is_new:
            raise first.error
        # What had been made of it was lost with the machine where it was.
        return await self.begin()

    def close(self) -> None:
        """Nobody waits for it any more."""
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
            finally:
                call.close(is_over=self.is_complete)

    async def _prepared(self) -> object:
        """What to give the last stage, made anew where it is not there any more."""
        if self._given is not None:
            return self._given
        self._forget()
        stages, handoff = self._stages, self._stages.handoff
        with ray_errors_as_ours(EARLIER):
            # Of a text, replicas of the first stage keep nothing.
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
        """What has been made of it so far."""
        self._end_calls(is_over=False)
        self._given, self.is_complete = None, False

    def _end_calls(self, *, is_over: bool) -> None:
        for call in reversed(self._calls):
            call.close(is_over=is_over)
        self._calls.clear()


def repeatable(request: AnyRequest) -> AnyRequest:
    """With a seed where chance decides, so that whichever replica goes on with an answer draws what the first would."""
    sampling = request.sampling
    if sampling.seed is not None or sampling.temperature < GREEDY_BELOW:
        return request
    return replace(request, sampling=replace(sampling, seed=secrets.randbits(63)))
