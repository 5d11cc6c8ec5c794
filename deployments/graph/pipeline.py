"""The graph as the gateway sees it: a request goes into three stages, one stream of items comes out, and every stage is
released at the end.

passage.py takes a request through the stages, and quarantine.py decides which requests are retried. Knows neither HTTP
nor response formats.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, closing
from functools import partial
from typing import Any

from deployments.errors import StageLostError
from deployments.graph.affinity import new_session, session_of
from deployments.graph.handoff import Handoff
from deployments.graph.passage import Passage, Stages
from deployments.graph.quarantine import Quarantine
from deployments.graph.ray_errors import ray_errors_as_ours
from deployments.graph.stage_call import Handle, UnaryCall, unless_out_of_reach
from deployments.messages import Item, Rejected
from deployments.upstreams.pictures import PortableImage
from llava_core.prompts.tokenize import Tokenized
from llava_core.types import AnyRequest, GenerationRequest


class Pipeline:
    """The three stages that requests for one model go through. Handles are configured here, once."""

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
        """Yield items up to the last one. `on_sent` is called each time the request has left this process.

        A request that loses its replica resumes on another, as often as quarantine.py allows. Closing or cancelling the
        stream before the last item cancels the request on every stage. Ray's errors are raised as ours (ray_errors.py),
        and any other error of a stage as it is.
        """
        await self._quarantine.check(request)
        passage = Passage(self._stages, request, on_sent)
        # It may hold megabytes of pictures, and the passage has put them in the object store.
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
        """The prompt's tokens as the first stage makes them, or its rejection. Raises as `stream` does."""
        session = session_of(request)
        if not request.num_images:
            session = session.keyless
        call = partial(UnaryCall, "preprocessor", self._tokenize, session, handoff=self._handoff)
        tokenized: Tokenized | Rejected = await _asked(call, request, self._handoff, self._quarantine, self._model)
        return tokenized

    async def detokenize(self, ids: Sequence[int]) -> str | Rejected:
        """The text of these token ids, or the rejection. Raises as `stream` does."""
        call = partial(UnaryCall, "preprocessor", self._detokenize, new_session(), handoff=self._handoff)
        text: str | Rejected = await _ask(call, ids, self._model)
        return text


class PictureStage:
    """The first stage's method that makes pictures portable for an upstream server."""

    def __init__(self, preprocessor: Handle, handoff: Handoff, quarantine: Quarantine) -> None:
        self._stage = handoff.calling(preprocessor, "portable_images")
        self._handoff = handoff
        self._quarantine = quarantine

    async def __call__(self, request: GenerationRequest) -> tuple[PortableImage, ...] | Rejected:
        """The pictures, or a rejection that names the bad one. Raises as `Pipeline.stream` does."""
        call = partial(UnaryCall, "preprocessor", self._stage, session_of(request), handoff=self._handoff)
        pictures: tuple[PortableImage, ...] | Rejected = await _asked(call, request, self._handoff, self._quarantine)
        return pictures


async def _asked(
    call: Callable[..., UnaryCall], request: AnyRequest, handoff: Handoff, quarantine: Quarantine, *more: object
) -> Any:
    """The result of a call about a request. The call is retried when it loses its replica."""
    await quarantine.check(request)
    kept = handoff.keep(request)
    return await quarantine.case(partial(handoff.kept, kept)).run(partial(_ask, call, kept, *more))


async def _ask(call: Callable[..., UnaryCall], *given: object) -> Any:
    """The result of one call. Cancelling this cancels the call."""
    with ray_errors_as_ours("preprocessor"):
        asked = call(*given)
        is_answered = False
        try:
            result = await unless_out_of_reach(asked.response, [asked])
            is_answered = True
            return result
        finally:
            asked.close(is_over=is_answered)
