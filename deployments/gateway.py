"""The HTTP surface: routes, request ids, body limits, streams, and an OpenAI-shaped body for every error.

A Starlette app around anything that streams items for a request (pipeline.py). Imports no torch, and knows neither Ray
nor what the stages do.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import sse
from deployments.http_errors import (
    HttpError,
    RequestTooLargeError,
    describe,
    describe_http,
    error_body,
    error_response,
)
from deployments.messages import Item, Rejected
from deployments.openai_answers import Answer, model_body
from deployments.openai_api import ChatRequest, read_chat_request
from deployments.pipeline import StageHealth
from deployments.settings import LimitArgs
from llava_core.errors import EngineError, RequestError, UnknownNameError
from llava_core.types import GenerationRequest, TokenDelta

logger = logging.getLogger(__name__)
REQUEST_ID_HEADER = "x-request-id"
_CLIENT_CLOSED_REQUEST = 499


class Answerer(Protocol):
    """What the gateway needs of the graph."""

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Item, None]:
        """Items up to the last one; closing it early ends the request."""
        ...

    async def ping(self, timeout_s: float) -> list[StageHealth]:
        """The state of every stage."""
        ...


class Gateway:
    """`app` is the ASGI application. `echo_request_id` is False where the server puts the id on responses itself."""

    def __init__(
        self,
        answerer: Answerer,
        *,
        model_name: str,
        limits: LimitArgs | None = None,
        echo_request_id: bool = True,
        ping_timeout_s: float = 5.0,
    ) -> None:
        self._answerer = answerer
        self._model_name = model_name
        self._limits = limits or LimitArgs()
        self._ping_timeout_s = ping_timeout_s
        self._created = int(time.time())
        self._echo_request_id = echo_request_id
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/health", self._health),
            ],
            middleware=[Middleware(_RequestIds, echo=echo_request_id)],
            exception_handlers={
                HTTPException: _on_http_exception,
                ClientDisconnect: _on_disconnect,
                Exception: self._on_bug,
            },
        )

    async def _chat(self, request: Request) -> Response:
        try:
            chat = await self._read(request)
        except RequestError as error:
            return error_response(describe(error), _request_id(request))
        answer = Answer(
            chat.generation.request_id, self._model_name, include_usage=chat.include_usage, timings=chat.timings
        )
        items = _settled(self._answerer.stream(chat.generation), _request_id(request))
        # Nothing is sent before the first item: whatever is wrong by then gets a status of its own.
        first = await anext(items)
        if isinstance(first, Rejected):
            await items.aclose()
            return error_response(_describe_for(chat, first), _request_id(request))
        if not chat.stream:
            return await _in_one_piece(chat, answer, first, items, _request_id(request))
        events = _events(chat, answer, first, items, _request_id(request))
        return _EventStream(events, media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)

    async def _read(self, request: Request) -> ChatRequest:
        body = await _read_body(request, self._limits.max_body_bytes)
        completion_id = f"chatcmpl-{uuid.uuid4().hex}"
        # Parsing JSON and base64 of several megabytes takes tens of milliseconds.
        chat = await asyncio.to_thread(read_chat_request, body, completion_id, self._limits.image)
        if chat.model is not None:
            self._check_model(chat.model)
        return chat

    def _check_model(self, name: str) -> None:
        if name != self._model_name:
            raise UnknownNameError("model", name, [self._model_name])

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_body(self._model_name, self._created)]})

    async def _model(self, request: Request) -> Response:
        try:
            self._check_model(request.path_params["name"])
        except UnknownNameError as error:
            return error_response(describe(error), _request_id(request))
        return JSONResponse(model_body(self._model_name, self._created))

    async def _health(self, request: Request) -> Response:
        stages = await self._answerer.ping(self._ping_timeout_s)
        missing = [stage.name for stage in stages if not stage.is_ready]
        if missing:
            message = f"not ready: {', '.join(missing)}"
            error = HttpError(503, "server_error", "not_ready", message, retry_after_s=1)
            return error_response(error, _request_id(request))
        return JSONResponse({"status": "ok", "stages": {stage.name: "ok" for stage in stages}})

    async def _on_bug(self, request: Request, error: Exception) -> Response:
        response = error_response(describe(error), _request_id(request))
        if self._echo_request_id:
            # Starlette answers these outside of its middleware.
            response.headers[REQUEST_ID_HEADER] = _request_id(request)
        return response


async def _settled(items: AsyncGenerator[Item, None], request_id: str) -> AsyncGenerator[Item, None]:
    """The items; whatever goes wrong becomes the last of them."""
    async with aclosing(items):
        try:
            async for item in items:
                yield item
                if isinstance(item, Rejected) or item.finish_reason is not None:
                    return
            raise EngineError("the stream ended before the answer did")
        except Exception as error:
            # The last resort: the client is owed an answer whatever happened.
            if describe(error).is_unexpected:
                logger.exception("request %s failed", request_id)
            yield Rejected(error)


async def _in_one_piece(
    chat: ChatRequest, answer: Answer, first: TokenDelta, items: AsyncGenerator[Item, None], request_id: str
) -> Response:
    deltas = [first]
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Rejected):
                return error_response(_describe_for(chat, item), request_id)
            deltas.append(item)
    return JSONResponse(answer.completion(deltas))


async def _events(
    chat: ChatRequest, answer: Answer, first: TokenDelta, items: AsyncGenerator[Item, None], request_id: str
) -> AsyncGenerator[bytes, None]:
    """Several events that are due together go out as one piece: every piece costs the graph a hop."""
    async with aclosing(items):
        yield b"".join(map(sse.event, [answer.first_chunk(), *answer.chunks(first)]))
        async for item in items:
            if isinstance(item, Rejected):
                yield sse.event(error_body(_describe_for(chat, item), request_id))
                return
            if piece := b"".join(map(sse.event, answer.chunks(item))):
                yield piece
    yield sse.DONE


def _describe_for(chat: ChatRequest, rejected: Rejected) -> HttpError:
    """The error in the client's own terms."""
    error = describe(rejected.error)
    return error.at(chat.locate(error.param))


class _EventStream(StreamingResponse):
    """Closes its source however it ends, so that a client that hangs up is noticed by the stages at once."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            assert isinstance(self.body_iterator, AsyncGenerator)
            await self.body_iterator.aclose()


class _RequestIds:
    """Every request has an id, the client's or a new one, in the scope's state and on the response."""

    def __init__(self, app: ASGIApp, *, echo: bool) -> None:
        self._app = app
        self._echo = echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(REQUEST_ID_HEADER.encode())
        request_id = given.decode("latin-1") if given else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if self._echo and message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def _request_id(request: Request) -> str:
    return str(request.state.request_id)


async def _read_body(request: Request, max_bytes: int) -> bytes:
    error = RequestTooLargeError(f"the body has more than {max_bytes} bytes, which is the limit")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise error
    pieces = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > max_bytes:
            raise error
        pieces.append(piece)
    return b"".join(pieces)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = error_response(describe_http(error), _request_id(request))
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)
