"""From a request's items to its response: in one piece or as events, with errors in the client's own terms.

Imports neither torch nor Ray, and does not know what was asked: a Reply knows how to format its parts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments.http import sse
from deployments.http.errors import HttpError, describe, error_body, error_response
from deployments.http.heartbeats import Heartbeat, comment
from deployments.messages import Item, Rejected, is_last
from deployments.openai_api.reply_form import ReplyForm
from deployments.openai_api.response_parts import Json
from deployments.waiting import abandon
from llava_core.errors import EngineError
from llava_core.types import TokenDelta

logger = logging.getLogger(__name__)
_HEARTBEAT_S = 15.0
Piece = TypeVar("Piece")


class Reply(Protocol):
    """Formats an answer's items for its client: those of our engines (response_parts.py), or of an upstream server."""

    @property
    def form(self) -> ReplyForm:
        """The form of the answer that was asked for."""
        ...

    def first_chunks(self) -> Iterator[Json]:
        """The first chunks of a stream."""
        ...

    def chunks(self, delta: TokenDelta) -> Iterator[Json]:
        """The chunks that one delta adds to the stream."""
        ...

    def completion(self, deltas: Sequence[TokenDelta]) -> Json:
        """The whole reply."""
        ...


async def respond(
    answer: Reply, items: AsyncGenerator[Item, None], request_id: str, heartbeat_s: float = _HEARTBEAT_S
) -> Response:
    """Sends nothing before the first item, so that errors up to then get their own status. Only a stream that waits
    for longer than `heartbeat_s` begins without an item, and gets later errors as an event."""
    items = settled(items, request_id)
    first = await first_of(items, heartbeat_s if answer.form.stream else None)
    if answer.form.stream and not _is_refused(first):
        return PieceStream(_events(answer, first, items, request_id), first, items, heartbeat_s)
    item = first.result()
    if isinstance(item, Rejected):
        await items.aclose()
        return refusal(answer.form, item, request_id)
    return await _in_one_piece(answer, item, items, request_id)


async def first_of(pieces: AsyncGenerator[Piece, None], wait_s: float | None) -> asyncio.Future[Piece]:
    """Waits for the first piece for at most `wait_s`; None waits until it is there."""
    first = asyncio.ensure_future(anext(pieces))
    try:
        await asyncio.wait([first], timeout=wait_s)
    except asyncio.CancelledError:
        # So that its generator can be closed.
        await abandon(first)
        raise
    return first


def _is_refused(first: asyncio.Future[Item]) -> bool:
    return first.done() and isinstance(first.result(), Rejected)


def refusal(form: ReplyForm, rejected: Rejected, request_id: str) -> Response:
    """The response to a request that a stage has rejected."""
    return error_response(_describe_for(form, rejected), request_id)


async def settled(items: AsyncGenerator[Item, None], request_id: str) -> AsyncGenerator[Item, None]:
    """Yields the items; any error becomes the last one.

    Reads to the very end, because the stage that writes a stream takes it as cancelled if it is dropped earlier.
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
            # The last resort: the client gets an answer whatever happened.
            if describe(error).is_unexpected or is_complete:
                logger.exception("request %s failed", request_id)
            if not is_complete:
                yield Rejected(error)


async def _in_one_piece(
    answer: Reply, first: TokenDelta, items: AsyncGenerator[Item, None], request_id: str
) -> Response:
    deltas = [first]
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Rejected):
                return refusal(answer.form, item, request_id)
            deltas.append(item)
    return JSONResponse(answer.completion(deltas))


async def _events(
    answer: Reply, first: asyncio.Future[Item], items: AsyncGenerator[Item, None], request_id: str
) -> AsyncGenerator[bytes, None]:
    """Events that are due together are sent as one piece, because every piece costs the graph a hop."""
    piece = _piece(answer, await first, request_id)
    if piece := b"".join(map(sse.event, answer.first_chunks())) + piece:
        yield piece
    async for item in items:
        if piece := _piece(answer, item, request_id):
            yield piece


def _piece(answer: Reply, item: Item, request_id: str) -> bytes:
    if isinstance(item, Rejected):
        return sse.event(error_body(_describe_for(answer.form, item), request_id))
    return b"".join(map(sse.event, answer.chunks(item))) + (sse.DONE if is_last(item) else b"")


def _describe_for(form: ReplyForm, rejected: Rejected) -> HttpError:
    """The error in the client's own terms."""
    error = describe(rejected.error)
    return error.at(form.locate(error.param))


class PieceStream(StreamingResponse):
    """Closes its source however it ends, even before it begins, so that a client's disconnect cancels the stages' work
    at once. `sign` makes the heartbeat it sends while idle."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        first: asyncio.Future[Any],
        source: AsyncGenerator[Any, None],
        heartbeat_s: float,
        *,
        sign: Callable[[], bytes] = comment,
        media_type: str = sse.MEDIA_TYPE,
        headers: Mapping[str, str] = sse.HEADERS,
    ) -> None:
        super().__init__(pieces, media_type=media_type, headers=headers)
        self._pieces, self._first, self._source = pieces, first, source
        self._heartbeat_s, self._sign = heartbeat_s, sign

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        heartbeat = Heartbeat(send, self._heartbeat_s, self._sign)
        try:
            async with heartbeat.beating():
                await super().__call__(scope, receive, heartbeat.send)
        except ClientDisconnect:
            logger.info("the client hung up")
        finally:
            await abandon(self._first)
            await self._pieces.aclose()
            await self._source.aclose()
