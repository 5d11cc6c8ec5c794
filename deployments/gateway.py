"""The HTTP surface: routes, models by name, request ids, access, body limits, and OpenAI-shaped error bodies.

A Starlette app with one engine client per model: anything that streams items for a request (graph/pipeline.py,
upstreams/upstream.py).
Imports neither torch nor Ray, and does not know what the stages do.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from deployments.access.authorization import Access, KeyRing, charged
from deployments.errors import DeadlineError
from deployments.http.bodies import Lease
from deployments.http.errors import HttpError, describe, describe_http, error_response
from deployments.http.in_flight import InFlight
from deployments.http.intake import Intake, Reader
from deployments.http.lingering import LingeringClose
from deployments.http.request_ids import REQUEST_ID_HEADER, RequestIds
from deployments.http.request_metrics import CLIENT_CLOSED_REQUEST, RequestMetrics, metered
from deployments.llava_protocol.routes import LlavaProtocol, ProtocolSetup
from deployments.messages import Item, Rejected, StageHealth
from deployments.metrics import Recorder, Unrecorded
from deployments.openai_api.chat_request import read_chat_request
from deployments.openai_api.chat_response import ChatAnswer
from deployments.openai_api.completion_request import read_completion_request
from deployments.openai_api.completion_response import CompletionAnswer
from deployments.openai_api.reply_form import ReadRequest
from deployments.openai_api.responding import Reply, refusal, respond
from deployments.openai_api.response_parts import Answer, model_body
from deployments.openai_api.side_by_side import side_by_side
from deployments.openai_api.tokenize_request import read_detokenize_request, read_tokenize_request, tokenized_body
from deployments.openapi import describe_api
from deployments.served_models import EngineClient, ServedModels
from deployments.settings.app import LimitArgs
from deployments.upstreams.upstream import Forwarding, Upstream
from llava_core.errors import LlavaError, OverloadedError, RequestError, UnknownNameError


class Gateway:
    """`app` is the ASGI application. `models` maps each model's name to what answers for it. `echo_request_id` is False
    where the server itself adds the id to responses."""

    def __init__(
        self,
        models: Mapping[str, EngineClient | Upstream],
        check_stages: Callable[[], Awaitable[Sequence[StageHealth]]],
        *,
        limits: LimitArgs | None = None,
        keys: KeyRing | None = None,
        origins: Sequence[str] = (),
        echo_request_id: bool = True,
        recorder: Recorder | None = None,
        llava: ProtocolSetup | None = None,
    ) -> None:
        self._served = ServedModels(models)
        self._check_stages = check_stages
        self._intake = Intake(limits or LimitArgs())
        self._created = int(time.time())
        self._echo_request_id = echo_request_id
        self._recorder = recorder or Unrecorded()
        protocol = LlavaProtocol(self._served.engines, self._intake, llava or ProtocolSetup(), self._recorder)
        health = Route("/health", self._health, name="health")
        self.routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"], name="chat_completions"),
            Route("/v1/completions", self._complete, methods=["POST"], name="completions"),
            Route("/tokenize", self._tokenize, methods=["POST"], name="tokenize"),
            Route("/detokenize", self._detokenize, methods=["POST"], name="detokenize"),
            Route("/v1/models", self._models, name="models"),
            Route("/v1/models/{name:path}", self._model, name="model"),
            Route("/openapi.json", self._openapi, name="openapi"),
            health,
            *protocol.routes,
        ]
        self._description = describe_api(
            self.routes, has_keys=keys is not None, max_timeout_seconds=self._intake.limits.max_timeout_seconds
        )
        app = Starlette(
            routes=self.routes,
            middleware=[
                Middleware(RequestIds, echo=echo_request_id),
                *protocol.middleware,
                *_cross_origin(origins),
                *([] if keys is None else [self._access(keys, health, protocol)]),
                *_in_flight(self._intake.limits.max_requests_in_flight, protocol),
            ],
            exception_handlers={
                HTTPException: _on_http_exception,
                ClientDisconnect: _on_disconnect,
                Exception: self._on_bug,
            },
        )
        # A path with a slash too many is unknown, like any other. The redirect would have no body, and rely on Host.
        app.router.redirect_slashes = False
        metered_app = RequestMetrics(app, self.routes, self._recorder)
        # Of bodies that are refused because of their size, those up to twice the limit still get to see that.
        self.app: ASGIApp = LingeringClose(metered_app, max_bytes=2 * self._intake.limits.max_body_bytes)

    def _access(self, keys: KeyRing, health: Route, protocol: LlavaProtocol) -> Middleware:
        return Middleware(Access, keys=keys, routes=self.routes, open_routes=[health], password_routes=protocol.routes)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat_request, ChatAnswer)

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, read_completion_request, CompletionAnswer)

    async def _answer(self, request: Request, read: Reader[ReadRequest], kind: type[Answer]) -> Response:
        completion_id = f"{kind.id_prefix}{uuid.uuid4().hex}"
        body = self._intake.lease()
        try:
            deadline = self._intake.deadline(request)
            async with deadline.around():
                answer, items = await self._begin(request, body, read, kind, completion_id)
            return await respond(
                answer, deadline.watch(items), _request_id(request), self._intake.limits.heartbeat_seconds
            )
        except (RequestError, OverloadedError, DeadlineError) as error:
            return error_response(describe(error), _request_id(request))
        finally:
            body.release()

    async def _begin(
        self, request: Request, lease: Lease, read: Reader[ReadRequest], kind: type[Answer], completion_id: str
    ) -> tuple[Reply, AsyncGenerator[Item, None]]:
        """Body and pictures are no longer referenced here on return; the stream releases them once they are sent."""
        given = await self._intake.read(request, lease, self._served.reader(read, kind), completion_id)
        model = self._served.chosen(given.form.model)
        answer: Reply
        items: AsyncGenerator[Item, None]
        if isinstance(given, Forwarding):
            answer, items = given.answer, given.stream(lease, _request_id(request))
        else:
            engine, answer = self._served.engine(model), kind(completion_id, model, given.form)
            # With several prompts each stream releases the whole body: they are texts, and small.
            streams = [engine.stream(each, lease.release) for each in (given.generation, *given.others)]
            items = streams[0] if len(streams) == 1 else side_by_side(streams, given.generation.sampling.n)
        return answer, charged(metered(items, self._recorder, model), request)

    async def _tokenize(self, request: Request) -> Response:
        body = self._intake.lease()
        try:
            async with self._intake.deadline(request).around():
                given = await self._intake.read(request, body, read_tokenize_request, uuid.uuid4().hex)
                engine = self._served.engine(given.read.form.model)
                tokenized = await engine.tokenize(given.read.generation)
        except LlavaError as error:
            return error_response(describe(error), _request_id(request))
        finally:
            body.release()
        if isinstance(tokenized, Rejected):
            return refusal(given.read.form, tokenized, _request_id(request))
        return JSONResponse(tokenized_body(tokenized, with_texts=given.with_texts))

    async def _detokenize(self, request: Request) -> Response:
        body = self._intake.lease()
        try:
            async with self._intake.deadline(request).around():
                given = await self._intake.read(request, body, read_detokenize_request, uuid.uuid4().hex)
                text = await self._served.engine(given.model).detokenize(given.ids)
        except LlavaError as error:
            return error_response(describe(error), _request_id(request))
        finally:
            body.release()
        if isinstance(text, Rejected):
            return error_response(describe(text.error), _request_id(request))
        return JSONResponse({"prompt": text})

    async def _models(self, _request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [model_body(name, self._created) for name in self._served.names]}
        )

    async def _model(self, request: Request) -> Response:
        try:
            name = self._served.chosen(request.path_params["name"])
        except UnknownNameError as error:
            return error_response(describe(error), _request_id(request))
        return JSONResponse(model_body(name, self._created))

    async def _health(self, request: Request) -> Response:
        stages = await self._check_stages()
        missing = [stage.name for stage in stages if not stage.is_ready]
        if missing:
            message = f"not ready: {', '.join(missing)}"
            error = HttpError(503, "server_error", "not_ready", message, retry_after_s=1)
            return error_response(error, _request_id(request))
        # A failing upstream is reported but not fatal: other models can still answer.
        others = self._served.upstream_states
        states = {stage.name: "ok" if stage.has_replicas else "scaled_to_zero" for stage in stages}
        ready = {"status": "ok", "stages": states}
        return JSONResponse(ready | ({"upstreams": others} if others else {}))

    async def _openapi(self, _request: Request) -> Response:
        return JSONResponse(self._description)

    async def _on_bug(self, request: Request, error: Exception) -> Response:
        response = error_response(describe(error), _request_id(request))
        if self._echo_request_id:
            # Starlette sends this response outside its middleware, so RequestIds does not see it.
            response.headers[REQUEST_ID_HEADER] = _request_id(request)
        return response


def _in_flight(limit: int | None, protocol: LlavaProtocol) -> list[Middleware]:
    return [] if limit is None else [Middleware(InFlight, limit=limit, light_routes=protocol.light_routes)]


def _cross_origin(origins: Sequence[str]) -> list[Middleware]:
    """CORS headers that let pages from these origins read responses; no origins, no headers."""
    if not origins:
        return []
    # Pages send their API key themselves; credentials that a browser adds on its own, such as cookies, are not used.
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
    response = error_response(describe_http(error, request.method, request.url.path), _request_id(request))
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
