"""The graph as the gateway sees it: a request into three stages, one stream of items out, every stage freed at the end.

How a request passes through the stages is passage.py's, and who may pass again quarantine.py's. Knows no HTTP and no
formats.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, closing
from functools import partial
from typing import Any

from deployments.affinity import session_of
from deployments.errors import StageLostError
from deployments.handoff import Handoff
from deployments.messages import Item, Rejected
from deployments.passage import Handle, Passage, Stages, towards
from deployments.quarantine import Quarantine
from deployments.ray_errors import ray_errors_as_ours
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
        stage = towards(self._tokenize, session if request.num_images else session.keyless)
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
        stage = towards(self._stage, session_of(request))
        pictures: tuple[PortableImage, ...] | Rejected = await _asked(stage, request, self._handoff, self._quarantine)
        return pictures


async def _asked(stage: Handle, request: AnyRequest, handoff: Handoff, quarantine: Quarantine, *more: object) -> Any:
    """One call about a request, done again once where it loses its replica."""
    await quarantine.check(request)
    kept = handoff.keep(request)
    return await quarantine.case(partial(handoff.kept, kept)).run(partial(_ask, stage, kept, *more))


async def _ask(stage: Handle, *given: object) -> Any:
    """One call, which ends when whoever waits for it leaves."""
    with ray_errors_as_ours("preprocessor"):
        call: Any = stage.remote(*given)
        is_answered = False
        try:
            result = await call
            is_answered = True
            return result
        finally:
            if not is_answered:
                call.cancel()
