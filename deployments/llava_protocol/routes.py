"""The endpoints of LLaVA's controller and of its workers, both at one address.

Requests and responses match the reference's to the letter; keys, limits and deadlines are the gateway's. Imports
neither torch nor Ray.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.access.authorization import charge, charged
from deployments.http.bodies import BodyBudget, Lease, read_body
from deployments.http.deadlines import Deadline
from deployments.http.errors import describe, error_response
from deployments.http.intake import Intake
from deployments.http.request_context import current_request
from deployments.http.request_metrics import metered
from deployments.llava_protocol.frames import SERVER_ERROR, ErrorCode, Frame, error_frame
from deployments.llava_protocol.generation import Echo, LegacyRequest, read_generation
from deployments.llava_protocol.registrar import Registrar
from deployments.llava_protocol.streaming import REFUSALS, from_items, respond, told, too_long
from deployments.llava_protocol.table import Workers, WorkerTable
from deployments.llava_protocol.worker_client import FORWARDED_HEADER, WorkerClient, WorkerStatus
from deployments.metrics import Recorder
from deployments.openai_api.responding import settled
from deployments.openai_api.schema import Body, parse_body
from deployments.settings.llava_protocol import LlavaProtocolArgs
from llava_core.errors import LlavaError, RequestError, UnknownNameError

if TYPE_CHECKING:
    from deployments.served_models import EngineClient

# Limits for the bodies of light routes, mostly workers' reports about themselves.
_MAX_NOTE_BYTES = 64 * 1024
_MAX_NOTES_BYTES = 4 * 1024 * 1024
AnyNote = TypeVar("AnyNote", bound=Body)


class RegisterBody(Body):
    """A worker registers and may send its status; without one it is asked for it."""

    worker_name: str
    check_heart_beat: bool = True
    worker_status: WorkerStatus | None = None


class HeartBeatBody(Body):
    """A worker's heartbeat."""

    worker_name: str
    queue_length: int = Field(ge=0, lt=2**31)


class AddressBody(Body):
    """A client asks for a worker's address."""

    model: str


@dataclass(frozen=True)
class ProtocolSetup:
    """A gateway's setup. `workers` is the table that it shares with other gateways; None: its own table."""

    args: LlavaProtocolArgs = field(default_factory=LlavaProtocolArgs)
    workers: Workers | None = None


class LlavaProtocol:
    """`routes` and `middleware` are for the gateway's application. `light_routes` need no model, and must be answered
    however busy the models are."""

    def __init__(
        self,
        engines: Mapping[str, EngineClient],
        intake: Intake,
        setup: ProtocolSetup,
        recorder: Recorder,
    ) -> None:
        args = setup.args
        table = WorkerTable(args.workers) if setup.workers is None else setup.workers
        self._engines = engines
        self._registrar = Registrar(table, WorkerClient(args.workers), engines.keys(), recorder)
        self._intake = intake
        self._args = args
        self._recorder = recorder
        self._notes = BodyBudget(_MAX_NOTES_BYTES)
        self._num_running = 0
        light = [
            self._light("list_models", None, self._list_models),
            self._light("refresh_all_workers", None, self._refresh),
            self._light("register_worker", RegisterBody, self._register),
            self._light("receive_heart_beat", HeartBeatBody, self._heart_beat),
            self._light("get_worker_address", AddressBody, self._address),
            self._light("worker_get_status", None, self._status),
        ]
        generate = _route("worker_generate_stream", self._generate)
        self.light_routes = light if args.enabled else []
        self.routes = [*light, generate] if args.enabled else []
        self.middleware = [Middleware(ReadableErrors, route=generate)] if args.enabled else []

    async def _list_models(self, _request: Request, _note: None) -> Any:
        return {"models": await self._models()}

    async def _refresh(self, _request: Request, _note: None) -> None:
        await self._registrar.refresh()

    async def _register(self, _request: Request, note: RegisterBody) -> None:
        await self._registrar.register(note.worker_name, note.worker_status, is_watched=note.check_heart_beat)

    async def _heart_beat(self, _request: Request, note: HeartBeatBody) -> Any:
        return {"exist": await self._registrar.heart_beat(note.worker_name, note.queue_length)}

    async def _address(self, request: Request, note: AddressBody) -> Any:
        """Return this service's own address for every model: clients must not reach workers directly, because keys and
        limits are enforced here."""
        is_known = note.model in self._engines or note.model in await self._models()
        own = (self._args.address or str(request.base_url)).rstrip("/")
        return {"address": own if is_known else ""}

    async def _status(self, _request: Request, _note: None) -> Any:
        workers = await self._registrar.workers()
        return {
            "model_names": await self._models(),
            "speed": len(self._engines) + sum(worker.speed for worker in workers),
            "queue_length": self._num_running + sum(worker.queue_length for worker in workers),
        }

    async def _models(self) -> list[str]:
        workers = await self._registrar.workers()
        return list(dict.fromkeys([*self._engines, *(model for worker in workers for model in worker.models)]))

    def _light(self, name: str, kind: type[AnyNote] | None, answer: Callable[[Request, Any], Awaitable[Any]]) -> Route:
        """Build a route that is answered at once; with `kind` None the body is ignored."""

        async def endpoint(request: Request) -> Response:
            lease = self._notes.lease()
            try:
                async with self._intake.deadline(request).around():
                    note = None if kind is None else await self._note(request, kind, lease)
                    return JSONResponse(await answer(request, note))
            except LlavaError as error:
                return error_response(describe(error), _request_id(request))
            finally:
                lease.release()

        return _route(name, endpoint)

    async def _note(self, request: Request, kind: type[AnyNote], lease: Lease) -> AnyNote:
        seconds = self._intake.limits.max_body_seconds
        body = await read_body(request, lease, max_bytes=_MAX_NOTE_BYTES, max_seconds=seconds)
        return parse_body(body, kind, max_text=_MAX_NOTE_BYTES)

    async def _generate(self, request: Request) -> Response:
        lease, request_id = self._intake.lease(), _request_id(request)
        try:
            echo, frames = await self._begin(request, lease)
            return await respond(echo, frames, request_id, explains=self._args.explain_errors)
        except LlavaError as error:
            return error_response(describe(error), request_id)
        finally:
            lease.release()

    async def _begin(self, request: Request, lease: Lease) -> tuple[Echo, AsyncGenerator[Frame, None]]:
        """Read the request and start its answer. No picture is held here once this returns. Raises RequestError for a
        header, and one of REFUSALS."""
        deadline = self._intake.deadline(request)
        try:
            async with deadline.around():
                given = await self._intake.read(request, lease, read_generation, uuid.uuid4().hex)
            return given.echo, self._frames(request, given, lease, deadline)
        except REFUSALS:
            raise
        except LlavaError as error:
            return Echo(""), _one(error_frame(error))

    def _frames(
        self, request: Request, given: LegacyRequest, lease: Lease, deadline: Deadline
    ) -> AsyncGenerator[Frame, None]:
        """Choose the model and return its frames. Raises UnknownNameError, or RequestError where no model is named and
        there are several."""
        model = self._chosen(given.model)
        if model not in self._engines:
            if FORWARDED_HEADER in request.headers:
                raise UnknownNameError("model", model, self._engines)
            return told(deadline.watch(self._forwarded(request, model, given.forwarded, lease)))
        if given.generation is None:
            return _one(too_long(given.echo))
        items = self._engines[model].stream(given.generation, lease.release)
        items = deadline.watch(charged(metered(items, self._recorder, model), request))
        return self._counted(from_items(given.echo, settled(items, _request_id(request))))

    def _chosen(self, name: str | None) -> str:
        if name is None and len(self._engines) > 1:
            raise RequestError("model is missing", param="model", code="missing_required_parameter")
        return next(iter(self._engines)) if name is None else name

    async def _forwarded(
        self, request: Request, model: str, body: Mapping[str, Any], lease: Lease
    ) -> AsyncGenerator[Frame, None]:
        """Forward a request to a worker. Its token counts are unknown, so each frame, about a word, counts as one. The
        forwarded body is held until the answer ends, and counts against the memory limit as long."""
        content = await asyncio.to_thread(_as_json, body)
        held = self._intake.lease()
        # Replaces the lease of the original body.
        lease.release()
        try:
            held.grow(len(content))
            async with aclosing(self._registrar.generate(model, content)) as frames:
                async for frame in frames:
                    charge(request, 1)
                    yield frame
        finally:
            held.release()

    async def _counted(self, frames: AsyncGenerator[Frame, None]) -> AsyncGenerator[Frame, None]:
        self._num_running += 1
        try:
            async with aclosing(frames):
                async for frame in frames:
                    yield frame
        finally:
            self._num_running -= 1


class ReadableErrors:
    """If a request of this route is refused before it reaches the route, the refusal gets a body that the protocol's
    clients can read: they ignore the status."""

    def __init__(self, app: ASGIApp, *, route: Route) -> None:
        self._app = app
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and self._route.matches(scope)[0] is Match.FULL:
            extras = {"text": SERVER_ERROR, "error_code": int(ErrorCode.WORKER_FAILED)}
            current_request().error_extras = extras
        await self._app(scope, receive, send)


def _route(name: str, answer: Callable[[Request], Awaitable[Response]]) -> Route:
    return Route(f"/{name}", answer, methods=["POST"], name=f"llava_{name}")


def _as_json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()


async def _one(frame: Frame) -> AsyncGenerator[Frame, None]:
    yield frame


def _request_id(request: Request) -> str:
    return str(request.state.request_id)
