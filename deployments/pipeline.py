"""The graph as the gateway sees it: a request into three stages, one stream of items out, every stage freed at the end.

Responses are passed on un-awaited, so pictures and features go from replica to replica. Knows no HTTP and no formats.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.affinity import affinity_key
from deployments.errors import StageLostError
from deployments.handoff import Handoff
from deployments.messages import Item, Rejected, is_last
from deployments.quarantine import Quarantine
from deployments.ray_errors import ray_errors_as_ours
from deployments.upstream_pictures import PortableImage
from llava_core.types import AnyRequest, GenerationRequest, Tokenized

Handle = DeploymentHandle[Any]


class Pipeline:
    """Three stages and how requests for one model pass through them. Handles are configured here, once."""

    def __init__(
        self,
        preprocessor: Handle,
        encoder: Handle,
        generator: Handle,
        handoff: Handoff,
        quarantine: Quarantine | None = None,
        *,
        model: str,
    ) -> None:
        self._handoff = handoff
        self._model = model
        self._quarantine = quarantine or Quarantine(refused_s=600)
        self._prepare = handoff.calling(preprocessor, "prepare")
        self._tokenize = handoff.calling(preprocessor, "tokenize")
        self._detokenize = handoff.calling(preprocessor, "detokenize")
        self._encode = handoff.calling(encoder, "encode")
        self._generate = handoff.streaming(generator, "generate")

    async def stream(
        self, request: AnyRequest, on_sent: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Item, None]:
        """Items up to the last one; `on_sent` is called once the request has left this process.

        What loses a replica before its first item is done again (quarantine.py). Leaving before the last item, by
        closing or cancelling, cancels the request on every stage. Raises errors of ours for what Ray does to calls, and
        whatever else a stage has raised.
        """
        await self._quarantine.check(request)
        kept, has_images, key = self._handoff.keep(request), request.num_images > 0, affinity_key(request)
        # Megabytes of pictures.
        del request
        begin = partial(_begun, partial(self._attempt, kept, key, on_sent, has_images=has_images))
        first, items = await self._quarantine.run(begin, partial(self._handoff.kept, kept))
        # From here on nothing is done again.
        del kept, begin
        async with aclosing(items):
            if first is not None:
                yield first
            async for item in items:
                yield item

    async def _attempt(
        self, kept: object, key: str, on_sent: Callable[[], None], *, has_images: bool
    ) -> AsyncGenerator[Item, None]:
        # Held until the end: the results of the first two live as long as their responses do.
        calls: list[Any] = []
        is_complete = False
        try:
            with ray_errors_as_ours():
                # Of a text, replicas of the first stage keep nothing.
                calls.append(_towards(self._prepare, key if has_images else "").remote(kept, self._model))
                del kept
                if has_images:
                    calls.append(_towards(self._encode, key).remote(calls[-1]))
                given = await self._handoff.give(calls[-1])
                on_sent()
                calls.append(_towards(self._generate, key).remote(given))
                async for item in calls[-1]:
                    is_complete = is_last(item)
                    yield item
        finally:
            if not is_complete:
                for call in reversed(calls):
                    call.cancel()

    async def tokenize(self, request: AnyRequest) -> Tokenized | Rejected:
        """What the first stage makes of a prompt, or its rejection. Raises errors of ours as `stream` does."""
        stage = _towards(self._tokenize, affinity_key(request) if request.num_images else "")
        tokenized: Tokenized | Rejected = await _asked(stage, request, self._handoff, self._quarantine, self._model)
        return tokenized

    async def detokenize(self, ids: Sequence[int]) -> str | Rejected:
        """The text of these ids. Raises errors of ours as `stream` does."""
        text: str | Rejected = await _ask(self._detokenize, ids, self._model)
        return text


class PictureStage:
    """The first stage, as far as it is asked about pictures that a server of others will read."""

    def __init__(self, preprocessor: Handle, handoff: Handoff, quarantine: Quarantine) -> None:
        self._stage = handoff.calling(preprocessor, "portable_images")
        self._handoff = handoff
        self._quarantine = quarantine

    async def __call__(self, request: GenerationRequest) -> tuple[PortableImage, ...] | Rejected:
        """The pictures, or what is wrong with one. Raises errors of ours as `Pipeline.stream` does."""
        stage = _towards(self._stage, affinity_key(request))
        pictures: tuple[PortableImage, ...] | Rejected = await _asked(stage, request, self._handoff, self._quarantine)
        return pictures


async def _asked(stage: Handle, request: AnyRequest, handoff: Handoff, quarantine: Quarantine, *more: object) -> Any:
    """One call about a request, done again once where it loses its replica."""
    await quarantine.check(request)
    kept = handoff.keep(request)
    return await quarantine.run(partial(_ask, stage, kept, *more), partial(handoff.kept, kept))


def _towards(stage: Handle, key: str) -> Handle:
    """For a call that prefers the replica of this key (routing.py): a copy with the same router, in microseconds."""
    return stage.options(session_id=key) if key else stage


async def _begun(attempt: Callable[[], AsyncGenerator[Item, None]]) -> tuple[Item | None, AsyncGenerator[Item, None]]:
    """The first item, and what comes after it. Raises StageLostError also where a stage only tells of one."""
    items = attempt()
    first = await anext(items, None)
    if isinstance(first, Rejected) and isinstance(first.error, StageLostError):
        await items.aclose()
        raise first.error
    return first, items


async def _ask(stage: Handle, *given: object) -> Any:
    """One call, which ends when whoever waits for it leaves."""
    with ray_errors_as_ours():
        call: Any = stage.remote(*given)
        is_answered = False
        try:
            result = await call
            is_answered = True
            return result
        finally:
            if not is_answered:
                call.cancel()
