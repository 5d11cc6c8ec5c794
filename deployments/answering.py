"""From a request's items to its response: in one piece or as events, errors told in the client's own terms.

Imports neither torch nor Ray, and does not know what was asked: an Answer knows how its parts look.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments import sse
from deployments.answer import Answer
from deployments.heartbeats import Heartbeat
from deployments.http_errors import HttpError, describe, error_body, error_response
from deployments.messages import Item, Rejected, is_last
from deployments.reply_form import ReplyForm
from llava_core.errors import EngineError
from llava_core.types import TokenDelta

logger = logging.getLogger(__name__)
_HEARTBEAT_S = 15.0


async def respond(
    answer: Answer, items: AsyncGenerator[Item, None], request_id: str, heartbeat_s: float = _HEARTBEAT_S
) -> Response:
    """Nothing is sent before the first item: whatever is wrong by then gets a status of its own. Only a stream that
    waits for longer than `heartbeat_s` begins without one, and is told what is wrong as an event."""
    items = _settled(items, request_id)
    first = asyncio.ensure_future(anext(items))
    try:
        await asyncio.wait([first], timeout=heartbeat_s if answer.form.stream else None)
    except asyncio.CancelledError:
        await _abandon(first)
        raise
    if answer.form.stream and not _is_refused(first):
        return _EventStream(_events(answer, first, items, request_id), first, items, heartbeat_s)
    item = first.result()
    if isinstance(item, Rejected):
        await items.aclose()
        return refusal(answer.form, item, request_id)
    return await _in_one_piece(answer, item, items, request_id)


def _is_refused(first: asyncio.Future[Item]) -> bool:
    return first.done() and isinstance(first.result(), Rejected)


async def _abandon(first: asyncio.Future[Item]) -> None:
    """So that the generator it comes from can be closed."""
    first.cancel()
    await asyncio.wait([first])


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
    answer: Answer, first: asyncio.Future[Item], items: AsyncGenerator[Item, None], request_id: str
) -> AsyncGenerator[bytes, None]:
    """Several events that are due together go out as one piece: every piece costs the graph a hop."""
    piece = _piece(answer, await first, request_id)
    if piece := b"".join(map(sse.event, answer.first_chunks())) + piece:
        yield piece
    async for item in items:
        if piece := _piece(answer, item, request_id):
            yield piece


def _piece(answer: Answer, item: Item, request_id: str) -> bytes:
    if isinstance(item, Rejected):
        return sse.event(error_body(_describe_for(answer.form, item), request_id))
    return b"".join(map(sse.event, answer.chunks(item))) + (sse.DONE if is_last(item) else b"")


def _describe_for(form: ReplyForm, rejected: Rejected) -> HttpError:
    """The error in the client's own terms."""
    error = describe(rejected.error)
    return error.at(form.locate(error.param))


class _EventStream(StreamingResponse):
    """Closes its source however it ends, begun or not: a client that hangs up is noticed by the stages at once."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        first: asyncio.Future[Item],
        source: AsyncGenerator[Item, None],
        heartbeat_s: float,
    ) -> None:
        super().__init__(events, media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)
        self._events, self._first, self._source = events, first, source
        self._heartbeat_s = heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        heartbeat = Heartbeat(send, self._heartbeat_s)
        try:
            async with heartbeat.beating():
                await super().__call__(scope, receive, heartbeat.send)
        except ClientDisconnect:
            logger.info("the client hung up")
        finally:
            await _abandon(self._first)
            await self._events.aclose()
            await self._source.aclose()
