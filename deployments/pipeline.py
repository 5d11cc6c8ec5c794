"""The graph as the gateway sees it: a request into three stages, one stream of items out, every stage freed at the end.

How a request passes through the stages is passage.py's, and who may pass again quarantine.py's. Knows no HTTP and no
formats.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, closing
from functools import partial
from typing import Any

from deployments.affinity import new_session, session_of
from deployments.errors import StageLostError
from deployments.handoff import Handoff
from deployments.messages import Item, Rejected
from deployments.passage import Passage, Stages
from deployments.quarantine import Quarantine
from deployments.ray_errors import ray_errors_as_ours
from deployments.stage_call import Handle, UnaryCall, unless_out_of_reach
from deployments.upstream_pictures import PortableImage
from llava_core.prompts.tokenize import Tokenized
from llava_core.types import AnyRequest, GenerationRequest


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
        self._tokenize = handoff.calling(preprocessor, "tokenize")
        self._detokenize = handoff.calling(preprocessor, "detokenize")
        self._stages = Stages(
            handoff.calling(preprocessor, "prepare"),
            handoff.calling(encoder, "encode"),
            handoff.streaming(generator, "generate"),
            handoff,
            model,
        )

    async def stream(
        self, request: AnyRequest, on_sent: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Item, None]:
        """Items up to the last one; `on_sent` is called once the request has left this process.

        What loses a replica goes on with another, as often as quarantine.py allows. Leaving before the last item, by
        closing or cancelling, cancels the request on every stage. Raises errors of ours for what Ray does to calls, and
        whatever else a stage has raised.
        """
        await self._quarantine.check(request)
        passage = Passage(self._stages, request, on_sent)
        # Megabytes of pictures.
        del request
        case = self._quarantine.case(passage.request)
        with closing(passage):
            first, items = await case.run(passage.begin)
            while True:
                try:
                    async with aclosing(items):
                        if first is not None:
                            yield first
                        async for item in items:
                            yield item
                    return
                except StageLostError as error:
                    if passage.is_complete:
                        return
                    lost = error
                first, items = await case.again(passage.begin, lost, phase="streaming")

    async def tokenize(self, request: AnyRequest) -> Tokenized | Rejected:
        """What the first stage makes of a prompt, or its rejection. Raises errors of ours as `stream` does."""
        session = session_of(request)
        if not request.num_images:
            session = session.keyless
        call = partial(UnaryCall, "preprocessor", self._tokenize, session, handoff=self._handoff)
        tokenized: Tokenized | Rejected = await _asked(call, request, self._handoff, self._quarantine, self._model)
        return tokenized

    async def detokenize(self, ids: Sequence[int]) -> str | Rejected:
        """The text of these ids. Raises errors of ours as `stream` does."""
        call = partial(UnaryCall, "preprocessor", self._detokenize, new_session(), handoff=self._handoff)
        text: str | Rejected = await _ask(call, ids, self._model)
        return text


class PictureStage:
    """The first stage, as far as it is asked about pictures that a server of others will read."""

    def __init__(self, preprocessor: Handle, handoff: Handoff, quarantine: Quarantine) -> None:
        self._stage = handoff.calling(preprocessor, "portable_images")
        self._handoff = handoff
        self._quarantine = quarantine

    async def __call__(self, request: GenerationRequest) -> tuple[PortableImage, ...] | Rejected:
        """The pictures, or what is wrong with one. Raises errors of ours as `Pipeline.stream` does."""
        call = partial(UnaryCall, "preprocessor", self._stage, session_of(request), handoff=self._handoff)
        pictures: tuple[PortableImage, ...] | Rejected = await _asked(call, request, self._handoff, self._quarantine)
        return pictures


async def _asked(
    call: Callable[..., UnaryCall], request: AnyRequest, handoff: Handoff, quarantine: Quarantine, *more: object
) -> Any:
    """What a call about a request returns; it is made again where it loses its replica."""
    await quarantine.check(request)
    kept = handoff.keep(request)
    return await quarantine.case(partial(handoff.kept, kept)).run(partial(_ask, call, kept, *more))


async def _ask(call: Callable[..., UnaryCall], *given: object) -> Any:
    """What one call returns, which ends when whoever waits for it leaves."""
    with ray_errors_as_ours("preprocessor"):
        asked = call(*given)
        is_answered = False
        try:
            result = await unless_out_of_reach(asked.response, [asked])
            is_answered = True
            return result
        finally:
            asked.close(is_over=is_answered)
