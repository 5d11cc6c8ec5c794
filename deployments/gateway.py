"""The HTTP surface: routes, request ids, who may ask, body limits, streams, and an OpenAI-shaped body for every error.

A Starlette app around anything that streams items for a request (pipeline.py). Imports neither torch nor Ray, and does
not know what the stages do.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import sse
from deployments.access import Access, KeyRing, charged
from deployments.bodies import BodyBudget, Lease, read_body
from deployments.chat_request import ReplyForm, read_chat_request
from deployments.chat_response import Answer, model_body
from deployments.http_errors import HttpError, describe, describe_http, error_body, error_response
from deployments.messages import Item, Rejected, StageHealth, is_last
from deployments.metrics import Recorder, Unrecorded
from deployments.openapi import describe_api
from deployments.request_metrics import CLIENT_CLOSED_REQUEST, RequestMetrics, metered
from deployments.settings import LimitArgs
from llava_core.errors import EngineError, OverloadedError, RequestError, UnknownNameError
from llava_core.types import GenerationRequest, TokenDelta

logger = logging.getLogger(__name__)
REQUEST_ID_HEADER = "x-request-id"


class EngineClient(Protocol):
    """What the gateway needs of the graph."""

    def stream(self, request: GenerationRequest, on_sent: Callable[[], None]) -> AsyncGenerator[Item, None]:
        """Items up to the last one; closing it before that ends the request. Calls `on_sent` when it lets go of it."""
        ...


class Gateway:
    """`app` is the ASGI application. `echo_request_id` is False where the server puts the id on responses itself."""

    def __init__(
        self,
        engine: EngineClient,
        check_stages: Callable[[], Awaitable[Sequence[StageHealth]]],
        *,
        model_name: str,
        limits: LimitArgs | None = None,
        keys: KeyRing | None = None,
        origins: Sequence[str] = (),
        echo_request_id: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        self._engine = engine
        self._check_stages = check_stages
        self._model_name = model_name
        self._limits = limits or LimitArgs()
        self._bodies = BodyBudget(self._limits.max_bytes_in_flight)
        self._created = int(time.time())
        self._echo_request_id = echo_request_id
        self._recorder = recorder or Unrecorded()
        health = Route("/health", self._health, name="health")
        self.routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"], name="chat_completions"),
            Route("/v1/models", self._models, name="models"),
            Route("/v1/models/{name:path}", self._model, name="model"),
            Route("/openapi.json", self._openapi, name="openapi"),
            health,
        ]
        self._description = describe_api(self.routes, has_keys=keys is not None)
        app = Starlette(
            routes=self.routes,
            middleware=[
                Middleware(_RequestIds, echo=echo_request_id),
                *_cross_origin(origins),
                *([] if keys is None else [Middleware(Access, keys=keys, routes=self.routes, open_routes=[health])]),
            ],
            exception_handlers={
                HTTPException: _on_http_exception,
                ClientDisconnect: _on_disconnect,
                Exception: self._on_bug,
            },
        )
        self.app: ASGIApp = RequestMetrics(app, self.routes, self._recorder)

    async def _chat(self, request: Request) -> Response:
        body = self._bodies.lease()
        try:
            form, answer, items = await self._begin(request, body)
            # Nothing is sent before the first item: whatever is wrong by then gets a status of its own.
            first = await anext(items)
        except (RequestError, OverloadedError) as error:
            return error_response(describe(error), _request_id(request))
        finally:
            body.release()
        if isinstance(first, Rejected):
            await items.aclose()
            return error_response(_describe_for(form, first), _request_id(request))
        if not form.stream:
            return await _in_one_piece(form, answer, first, items, _request_id(request))
        return _EventStream(_events(form, answer, first, items, _request_id(request)), items)

    async def _begin(self, request: Request, lease: Lease) -> tuple[ReplyForm, Answer, AsyncGenerator[Item, None]]:
        """Body and pictures are gone from here when this returns; the stream lets go of them once they are sent."""
        body = await read_body(
            request, lease, max_bytes=self._limits.max_body_bytes, max_seconds=self._limits.max_body_seconds
        )
        completion_id = f"chatcmpl-{uuid.uuid4().hex}"
        # Parsing JSON and base64 of several megabytes takes tens of milliseconds.
        chat = await asyncio.to_thread(read_chat_request, body, completion_id, self._limits.request)
        form = chat.form
        if form.model is not None:
            self._check_model(form.model)
        answer = Answer(completion_id, self._model_name, include_usage=form.include_usage, timings=form.timings)
        items = metered(self._engine.stream(chat.generation, lease.release), self._recorder, answer.model)
        return form, answer, _settled(charged(items, request), _request_id(request))

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
        stages = await self._check_stages()
        missing = [stage.name for stage in stages if not stage.is_ready]
        if missing:
            message = f"not ready: {', '.join(missing)}"
            error = HttpError(503, "server_error", "not_ready", message, retry_after_s=1)
            return error_response(error, _request_id(request))
        return JSONResponse({"status": "ok", "stages": {stage.name: "ok" for stage in stages}})

    async def _openapi(self, _request: Request) -> Response:
        return JSONResponse(self._description)

    async def _on_bug(self, request: Request, error: Exception) -> Response:
        response = error_response(describe(error), _request_id(request))
        if self._echo_request_id:
            # Starlette answers these outside of its middleware.
            response.headers[REQUEST_ID_HEADER] = _request_id(request)
        return response


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
    form: ReplyForm, answer: Answer, first: TokenDelta, items: AsyncGenerator[Item, None], request_id: str
) -> Response:
    deltas = [first]
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Rejected):
                return error_response(_describe_for(form, item), request_id)
            deltas.append(item)
    return JSONResponse(answer.completion(deltas))


async def _events(
    form: ReplyForm, answer: Answer, first: TokenDelta, items: AsyncGenerator[Item, None], request_id: str
) -> AsyncGenerator[bytes, None]:
    """Several events that are due together go out as one piece: every piece costs the graph a hop."""
    yield b"".join(map(sse.event, [answer.first_chunk(), *answer.chunks(first)])) + _end_after(first)
    async for item in items:
        if isinstance(item, Rejected):
            yield sse.event(error_body(_describe_for(form, item), request_id))
        elif piece := b"".join(map(sse.event, answer.chunks(item))) + _end_after(item):
            yield piece


def _end_after(delta: TokenDelta) -> bytes:
    return sse.DONE if is_last(delta) else b""


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


def _cross_origin(origins: Sequence[str]) -> list[Middleware]:
    """Browsers let pages of these origins read our answers; without any, of none."""
    if not origins:
        return []
    # Keys are given by pages themselves; nothing that a browser adds on its own, such as cookies, counts here.
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER, "retry-after"],
        )
    ]


def _request_id(request: Request) -> str:
    return str(request.state.request_id)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = error_response(describe_http(error), _request_id(request))
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
