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
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.affinity import Session, session_of
from deployments.errors import StageLostError
from deployments.handoff import Handoff
from deployments.messages import Item, Rejected, is_last
from deployments.progress import Progress
from deployments.ray_errors import ray_errors_as_ours
from deployments.sent_calls import SENT_CALLS
from deployments.signs_of_life import listen
from llava_core.types import GREEDY_BELOW, AnyRequest

Handle = DeploymentHandle[Any]


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
        self._session = session_of(request)
        self._has_images = request.num_images > 0
        self._progress = Progress(request.sampling.n)
        self._kept = stages.handoff.keep(repeatable(request))
        # Of the first two stages, whose results live as long as their responses do; and what to give the last one.
        self._calls: list[Any] = []
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
        first = await anext(items, None)
        if not (isinstance(first, Rejected) and isinstance(first.error, StageLostError)):
            return first, items
        await items.aclose()
        self._forget()
        if is_new:
            raise first.error
        # What had been made of it was lost with the machine where it was.
        return await self.begin()

    def close(self) -> None:
        """Nobody waits for it any more."""
        if not self.is_complete:
            self._forget()

    async def _items(self) -> AsyncGenerator[Item, None]:
        given = await self._prepared()
        begun = self._progress.begun
        stage = self._stages.generate
        listening = SENT_CALLS.listening(stage.deployment_name, self._session.request)
        with ray_errors_as_ours("generator"), listening as is_sent:
            generate = towards(stage, self._session)
            call: Any = generate.remote(given, begun) if begun else generate.remote(given)
            try:
                async with aclosing(listen(call, "generator", is_sent=is_sent)) as items:
                    async for item in items:
                        if not isinstance(item, Rejected):
                            self._progress.note(item)
                        self.is_complete = is_last(item)
                        yield item
            finally:
                if not self.is_complete:
                    call.cancel()

    async def _prepared(self) -> object:
        """What to give the last stage, made anew where it is not there any more."""
        if self._given is not None:
            return self._given
        self._forget()
        with ray_errors_as_ours("earlier"):
            # Of a text, replicas of the first stage keep nothing.
            prepare = towards(self._stages.prepare, self._session if self._has_images else self._session.keyless)
            self._calls.append(prepare.remote(self._kept, self._stages.model))
            if self._has_images:
                self._calls.append(towards(self._stages.encode, self._session).remote(self._calls[-1]))
            self._given = await self._stages.handoff.give(self._calls[-1])
        self._on_sent()
        return self._given

    def _forget(self) -> None:
        """What has been made of it so far."""
        for call in reversed(self._calls):
            call.cancel()
        self._calls, self._given, self.is_complete = [], None, False


def repeatable(request: AnyRequest) -> AnyRequest:
    """With a seed where chance decides, so that whichever replica goes on with an answer draws what the first would."""
    sampling = request.sampling
    if sampling.seed is not None or sampling.temperature < GREEDY_BELOW:
        return request
    return replace(request, sampling=replace(sampling, seed=secrets.randbits(63)))


def towards(stage: Handle, session: Session) -> Handle:
    """For a call that prefers the replica of this key (routing.py): a copy with the same router, in microseconds."""
    return stage.options(session_id=str(session))
