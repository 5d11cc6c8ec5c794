"""The client for asyncio, the counterpart of `synchronous.py`. Cancelling a task ends its request."""

from __future__ import annotations

import contextlib
from asyncio import sleep, to_thread
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from typing import Any, Self, Unpack

import httpx

from llava_core.client.answers import Delta, Reply, read_models, read_reply
from llava_core.client.batches import Question, Result, ask_in_tasks
from llava_core.client.conversation import AsyncConversation
from llava_core.client.errors import ServiceError
from llava_core.client.events import StreamedAnswer
from llava_core.client.exchange import DEFAULT_URL, Attempts, Service, connecting, reading, refusal
from llava_core.client.messages import Picture, user_message
from llava_core.client.requests import Call, Options, chat_call, health_call
from llava_core.client.retries import NO_RETRIES, Retries
from llava_core.types import Message


class AsyncAnswerStream(AsyncIterator[Delta]):
    """A streamed answer: iterate over its deltas; `reply` is everything received so far."""

    def __init__(self, response: httpx.Response, attempts: Attempts) -> None:
        self._response, self._attempts = response, attempts
        self._answer = StreamedAnswer(response.headers.get("x-request-id"))
        self._deltas = self._read()

    async def __anext__(self) -> Delta:
        return await anext(self._deltas)

    async def _read(self) -> AsyncIterator[Delta]:
        with reading(self._answer):
            # Read to the end, so that the connection can be reused.
            async for data in self._response.aiter_bytes():
                self._attempts.check_time()
                for delta in self._answer.feed(data):
                    yield delta
        self._answer.check_end()

    @property
    def reply(self) -> Reply:
        """The answer received so far, with usage and times once it has been read to its end."""
        return self._answer.reply


class AsyncClient:
    """Asks a service, any number of questions concurrently. Takes the same arguments as Client."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = Service.timeout_s,
        retries: Retries = Service.retries,
        transport: httpx.AsyncBaseTransport | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._service = Service(url, api_key, timeout_s, retries)
        self._options = options
        self._http = httpx.AsyncClient(transport=transport, **self._service.http_options())

    async def ask(
        self,
        question: str | Message,
        *images: Picture,
        history: Sequence[Message] = (),
        system: str | None = None,
        **options: Unpack[Options],
    ) -> Reply:
        """Answer a question about pictures (paths, URLs, bytes or Pillow images), after the turns in `history`. Raises
        ServiceError, or RequestError for a file that cannot be read."""
        call = await self._call(question, images, history, system, options, stream=False)
        body, request_id = await self._fetch(call)
        return read_reply(body, request_id)

    @contextlib.asynccontextmanager
    async def stream(
        self,
        question: str | Message,
        *images: Picture,
        history: Sequence[Message] = (),
        system: str | None = None,
        **options: Unpack[Options],
    ) -> AsyncIterator[AsyncAnswerStream]:
        """As `ask`, but streamed. Leaving the block early also ends the request in the service."""
        call = await self._call(question, images, history, system, options, stream=True)
        attempts = Attempts(self._service, call)
        response = await self._send(attempts)
        try:
            yield AsyncAnswerStream(response, attempts)
        finally:
            await response.aclose()

    def conversation(
        self, system: str | None = None, history: Iterable[Message] = (), **options: Unpack[Options]
    ) -> AsyncConversation:
        """A conversation, in which each question is sent with the previous turns."""
        return AsyncConversation(self, system, history, options)

    def batch(
        self, questions: Iterable[Question], *, concurrency: int = 8, in_order: bool = True
    ) -> AsyncGenerator[Result, None]:
        """Yield the result of each question, with up to `concurrency` in flight; in order of completion unless
        `in_order`.

        `questions` is consumed lazily. A failed question yields a Result with its error, and the others continue.
        Closing the generator cancels the questions in flight.
        """
        return ask_in_tasks(self._ask_question, questions, concurrency=concurrency, in_order=in_order)

    async def models(self) -> list[str]:
        """The names of the models served."""
        body, _ = await self._fetch(Call("GET", "/v1/models"))
        return read_models(body)

    async def is_healthy(self) -> bool:
        """Whether the service can answer now; False if it is unreachable."""
        try:
            await self._fetch(health_call(self._service.timeout_s), NO_RETRIES)
        except ServiceError:
            return False
        return True

    async def close(self) -> None:
        """Close connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(
        self,
        question: str | Message,
        images: Sequence[Picture],
        history: Sequence[Message],
        system: str | None,
        options: Options,
        *,
        stream: bool,
    ) -> Call:
        """Build the request on a thread: reading and encoding pictures takes tens of milliseconds."""
        wanted: Options = {**self._options, **options}

        def make() -> Call:
            return chat_call((*history, user_message(question, images)), system, wanted, stream=stream)

        return await to_thread(make)

    async def _ask_question(self, question: Question) -> Reply:
        options: Any = question.options
        return await self.ask(question.text, *question.images, system=question.system, **options)

    async def _fetch(self, call: Call, retries: Retries | None = None) -> tuple[bytes, str | None]:
        """The body of a response, and the request's id."""
        response = await self._send(Attempts(self._service, call, retries))
        answer = StreamedAnswer(response.headers.get("x-request-id"))
        async with contextlib.aclosing(response):
            with reading(answer):
                return await response.aread(), answer.request_id

    async def _send(self, attempts: Attempts) -> httpx.Response:
        """Send until a response begins with status 200. Raises ServiceError when no attempts are left."""
        while True:
            request = self._http.build_request(**attempts.request())
            try:
                with connecting(self._service.url):
                    response = await self._http.send(request, stream=True)
                    if response.status_code == httpx.codes.OK:
                        return response
                    async with contextlib.aclosing(response):
                        await response.aread()
                raise refusal(response)
            except ServiceError as error:
                wait_s = attempts.wait_s(error)
            await sleep(wait_s)
