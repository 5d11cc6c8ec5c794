"""From a request's items to its response: in one piece or as events, errors told in the client's own terms.

Imports neither torch nor Ray, and does not know what was asked: an Answer knows how its parts look.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments import sse
from deployments.answer import Answer
from deployments.http_errors import HttpError, describe, error_body, error_response
from deployments.messages import Item, Rejected, is_last
from deployments.reply_form import ReplyForm
from llava_core.errors import EngineError
from llava_core.types import TokenDelta

logger = logging.getLogger(__name__)


async def respond(answer: Answer, items: AsyncGenerator[Item, None], request_id: str) -> Response:
    """Nothing is sent before the first item: whatever is wrong by then gets a status of its own."""
    items = _settled(items, request_id)
    first = await anext(items)
    if isinstance(first, Rejected):
        await items.aclose()
        return refusal(answer.form, first, request_id)
    if not answer.form.stream:
        return await _in_one_piece(answer, first, items, request_id)
    return _EventStream(_events(answer, first, items, request_id), items)


def refusal(form: ReplyForm, rejected: Rejected, request_id: str) -> Response:
    """The response to a request that a stage has rejected."""
    return error_response(_describe_for(form, rejected), request_id)


async def _settled(items: AsyncGenerator[Item, None], request_id: str) -> AsyncGenerator[Item, None]:
    """The items; whatever goes wrong becomes the last of them.

    Reads to the very end, because a stream that is dropped before is a cancellation to the stage that writes it.
    """
    is_complete = False
    async with aclosing(items):
        try:
            async for item in items:
                is_complete = is_last(item)
                yield item
            if not is_complete:
                raise EngineError("the stream ended before the answer did")
        except Exception as error:
            # The last resort: the client is owed an answer whatever happened.
            if describe(error).is_unexpected or is_complete:
                logger.exception("request %s failed", request_id)
            if not is_complete:
                yield Rejected(error)


async def _in_one_piece(
    answer: Answer, first: TokenDelta, items: AsyncGenerator[Item, None], request_id: str
) -> Response:
    deltas = [first]
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Rejected):
                return refusal(answer.form, item, request_id)
            deltas.append(item)
    return JSONResponse(answer.completion(deltas))


async def _events(
    answer: Answer, first: TokenDelta, items: AsyncGenerator[Item, None], request_id: str
) -> AsyncGenerator[bytes, None]:
    """Several events that are due together go out as one piece: every piece costs the graph a hop."""
    if piece := b"".join(map(sse.event, answer.first_chunks())) + _piece(answer, first):
        yield piece
    async for item in items:
        if isinstance(item, Rejected):
            yield sse.event(error_body(_describe_for(answer.form, item), request_id))
        elif piece := _piece(answer, item):
            yield piece


def _piece(answer: Answer, delta: TokenDelta) -> bytes:
    return b"".join(map(sse.event, answer.chunks(delta))) + (sse.DONE if is_last(delta) else b"")


def _describe_for(form: ReplyForm, rejected: Rejected) -> HttpError:
    """The error in the client's own terms."""
    error = describe(rejected.error)
    return error.at(form.locate(error.param))


class _EventStream(StreamingResponse):
    """Closes its source however it ends, begun or not: a client that hangs up is noticed by the stages at once."""

    def __init__(self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[Item, None]) -> None:
        super().__init__(events, media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)
        self._events, self._source = events, source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            logger.info("the client hung up")
        finally:
            await self._events.aclose()
            await self._source.aclose()
