"""A model that another OpenAI-compatible server answers for: sends it requests, and yields the items of its answers.

Also polls the server's state and reports it. Knows no Ray, and HTTP only through exchange.py.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx

from deployments.http.bodies import Lease
from deployments.http.errors import describe
from deployments.messages import Rejected, UpstreamDelta
from deployments.metrics import (
    UPSTREAM_REQUESTS,
    UPSTREAM_RUNNING,
    UPSTREAM_TOKENS,
    UPSTREAM_UP,
    Reading,
    Recorder,
    Unrecorded,
)
from deployments.openai_api.reply_form import ReplyForm
from deployments.openai_api.response_parts import Answer, Json
from deployments.settings.upstreams import UpstreamArgs
from deployments.upstreams.answer import AnswerReader, NoAnswerError, UpstreamAnswer, read_object
from deployments.upstreams.exchange import Exchange
from deployments.upstreams.pictures import PortableImage
from deployments.upstreams.request import ForwardedRequest, read_forwarded_chat, read_forwarded_completion
from llava_core.errors import LlavaError, OverloadedError
from llava_core.request_limits import RequestLimits
from llava_core.types import GenerationRequest

logger = logging.getLogger(__name__)
# Returns the pictures of a request in formats that any engine reads, fetching those given by address.
MakePortable = Callable[[GenerationRequest], Awaitable[tuple[PortableImage, ...] | Rejected]]
_DONE = b"[DONE]"
_LOOK_S, _MAX_LIST_BYTES = 10.0, 4 * 1024 * 1024
# The states of a server.
OK, UNKNOWN = "ok", "not asked yet"
_UNREACHABLE, _FAILING, _KEY_REFUSED, _NO_LIST, _NO_SUCH_MODEL = (
    "unreachable",
    "failing",
    "key refused",
    "no list of models",
    "model unknown there",
)


@dataclass(frozen=True)
class _Route:
    """The path for a kind of answer, the parser of its requests, and the field of a choice that holds the content,
    streamed and whole."""

    path: str
    read: Callable[..., ForwardedRequest]
    piece: str
    whole: str


# By kind of answer.
_ROUTES = {
    "chat.completion": _Route("/chat/completions", read_forwarded_chat, "delta", "message"),
    "text_completion": _Route("/completions", read_forwarded_completion, "text", "text"),
}


@dataclass(frozen=True)
class Forwarding:
    """A request for an upstream server, and the form of its answer."""

    upstream: Upstream
    asked: ForwardedRequest
    answer: UpstreamAnswer
    route: _Route

    @property
    def form(self) -> ReplyForm:
        """The form that the client asked for."""
        return self.asked.form

    def stream(self, lease: Lease, request_id: str) -> AsyncGenerator[UpstreamDelta, None]:
        """See Upstream.stream."""
        return self.upstream.stream(self, lease, request_id)


class Upstream:
    """The server behind the model `name`. `state` is its last known state: `ok`, or what is wrong."""

    def __init__(
        self,
        name: str,
        args: UpstreamArgs,
        make_portable: MakePortable,
        *,
        key: str | None = None,
        tls: ssl.SSLContext | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.name = name
        self.state = UNKNOWN
        self._args = args
        self._make_portable = make_portable
        self._exchange = Exchange(name, args, key=key, tls=tls or ssl.create_default_context())
        self._num_running = 0
        self._recorder = recorder or Unrecorded()
        self._recorder.watch(self._readings)

    def read(self, body: bytes, kind: type[Answer], completion_id: str, limits: RequestLimits) -> Forwarding:
        """Parses a body for the server. Raises RequestError naming field and cause."""
        route = _ROUTES[kind.kind]
        asked = route.read(body, completion_id, limits, model=self._args.model, forward=self._args.forward)
        return Forwarding(self, asked, UpstreamAnswer(completion_id, self.name, asked.form, kind.chunk_kind), route)

    async def stream(self, request: Forwarding, lease: Lease, request_id: str) -> AsyncGenerator[UpstreamDelta, None]:
        """Yields items up to the last one. Closing earlier disconnects from the server, which ends its work there.

        `lease` is that of the client's body, and released when the body has been sent on. Raises errors for the client.
        """
        outcome = "failed"
        self._num_running += 1
        try:
            self._check_room()
            answering = self._items(request, lease, request_id)
            # Megabytes of pictures.
            del request
            async with aclosing(answering) as items:
                async for item in items:
                    self._recorder.count(UPSTREAM_TOKENS, self.name, "completion", by=item.num_tokens)
                    if item.usage is not None:
                        self._recorder.count(UPSTREAM_TOKENS, self.name, "prompt", by=item.usage.prompt_tokens)
                        outcome = "answered"
                    yield item
        except LlavaError as error:
            outcome = describe(error).code or outcome
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        finally:
            lease.release()
            self._num_running -= 1
            self._recorder.count(UPSTREAM_REQUESTS, self.name, outcome)

    async def watch(self) -> None:
        """Polls the server's state forever."""
        while True:
            self._note(await self._look())
            await asyncio.sleep(self._args.check_seconds)

    async def close(self) -> None:
        """Closes the connections. Must run on the event loop that they were made on."""
        await self._exchange.close()

    def _check_room(self) -> None:
        if self._num_running > self._args.max_requests:
            raise OverloadedError(
                f"{self._args.max_requests} requests are in flight to the server behind model {self.name!r}, which is "
                "the limit; try again later",
                limit="upstream",
            )

    async def _items(self, request: Forwarding, lease: Lease, request_id: str) -> AsyncGenerator[UpstreamDelta, None]:
        asked, route, is_stream = request.asked, request.route, request.form.stream
        reader = AnswerReader(request.answer, route.piece if is_stream else route.whole)
        del request
        pictures = await self._pictures(asked)
        content = await asyncio.to_thread(asked.encoded, pictures)
        # Held besides the client's body until it has been sent.
        lease.grow(len(content))
        transforms = tuple(picture.transform for picture in pictures)
        del pictures, asked
        began = time.perf_counter()

        def known() -> Json:
            return {"stage_ms": {"upstream": (time.perf_counter() - began) * 1e3}, "transforms": transforms}

        # One limit for head and body of a complete answer. A stream's body has its own, for each of its events.
        limit_s = self._args.silence_seconds if is_stream else self._args.answer_seconds
        until = asyncio.get_running_loop().time() + limit_s
        async with self._exchange.post(route.path, content, request_id, until=until) as response:
            del content
            lease.release()
            self._note(OK)
            try:
                if not is_stream:
                    whole = await self._exchange.whole(response, until=until)
                    yield reader.whole(await asyncio.to_thread(self._object, whole), **known())
                    return
                async with aclosing(self._exchange.events(response)) as events:
                    async for data in events:
                        if data == _DONE:
                            yield reader.end(**known())
                            return
                        delta = reader.chunk(self._object(data))
                        if delta is not None:
                            yield delta
            except NoAnswerError as error:
                raise self._exchange.garbage(str(error)) from None
        raise self._exchange.cut()

    async def _pictures(self, asked: ForwardedRequest) -> tuple[PortableImage, ...]:
        made = () if asked.pictures is None else await self._make_portable(asked.pictures)
        if isinstance(made, Rejected):
            raise made.error
        return made

    def _object(self, data: bytes) -> Json:
        """Parses JSON from the server. Raises the error in it, if the server found one too late for a status code."""
        content = read_object(data)
        if error := content.get("error"):
            code: Any = error.get("code") if isinstance(error, dict) else None
            # Some engines put an HTTP status there.
            is_status = isinstance(code, int) and code >= HTTPStatus.BAD_REQUEST
            raise self._exchange.refusal(code if is_status else HTTPStatus.INTERNAL_SERVER_ERROR, content)
        return content

    async def _look(self) -> str:
        try:
            status, body = await self._exchange.get("/models", within_s=_LOOK_S, max_bytes=_MAX_LIST_BYTES)
        except (httpx.TransportError, TimeoutError):
            return _UNREACHABLE
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            return _KEY_REFUSED
        if status != HTTPStatus.OK or body is None:
            # Some servers have no list of models; requests to them will tell.
            return _FAILING if status >= HTTPStatus.INTERNAL_SERVER_ERROR else OK
        try:
            listed = read_object(body).get("data")
        except NoAnswerError:
            return _NO_LIST
        if not isinstance(listed, list):
            return _NO_LIST
        is_there = any(isinstance(each, dict) and each.get("id") == self._args.model for each in listed)
        return OK if is_there else _NO_SUCH_MODEL

    def _note(self, state: str) -> None:
        if state != self.state:
            logger.log(logging.INFO if state == OK else logging.WARNING, "model %s: its server is %s", self.name, state)
        self.state = state

    def _readings(self) -> list[Reading]:
        return [(UPSTREAM_RUNNING, self._num_running, (self.name,)), (UPSTREAM_UP, self.state == OK, (self.name,))]
