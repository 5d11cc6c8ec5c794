"""The client for blocking code. `asynchronous.py` is the same for asyncio; the code they share depends on neither."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from time import sleep
from typing import Any, Self, Unpack

import httpx

from llava_core.client.answers import Delta, Reply, read_models, read_reply
from llava_core.client.batches import Question, Result, ask_in_threads
from llava_core.client.conversation import Conversation
from llava_core.client.errors import ServiceError
from llava_core.client.events import StreamedAnswer
from llava_core.client.exchange import DEFAULT_URL, Attempts, Service, connecting, reading, refusal
from llava_core.client.messages import Picture, user_message
from llava_core.client.requests import Call, Options, chat_call, health_call
from llava_core.client.retries import NO_RETRIES, Retries
from llava_core.types import Message


class AnswerStream(Iterator[Delta]):
    """A streamed answer: iterate over its deltas; `reply` is everything received so far."""

    def __init__(self, response: httpx.Response, attempts: Attempts) -> None:
        self._response, self._attempts = response, attempts
        self._answer = StreamedAnswer(response.headers.get("x-request-id"))
        self._deltas = self._read()

    def __next__(self) -> Delta:
        return next(self._deltas)

    def _read(self) -> Iterator[Delta]:
        with reading(self._answer):
            # Read to the end, so that the connection can be reused.
            for data in self._response.iter_bytes():
                self._attempts.check_time()
                yield from self._answer.feed(data)
        self._answer.check_end()

    @property
    def reply(self) -> Reply:
        """The answer received so far, with usage and times once it has been read to its end."""
        return self._answer.reply


class Client:
    """Asks a service, from any number of threads.

    `url` is the service's root. The key is `api_key`, or else the environment's LLAVA_API_KEY. The service may be
    silent for `timeout_s`. `options` apply to every question that does not override them. `transport` replaces httpx's
    own, for tests and for other kinds of connection.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = Service.timeout_s,
        retries: Retries = Service.retries,
        transport: httpx.BaseTransport | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._service = Service(url, api_key, timeout_s, retries)
        self._options = options
        self._http = httpx.Client(transport=transport, **self._service.http_options())

    def ask(
        self,
        question: str | Message,
        *images: Picture,
        history: Sequence[Message] = (),
        system: str | None = None,
        **options: Unpack[Options],
    ) -> Reply:
        """Answer a question about pictures (paths, URLs, bytes or Pillow images), after the turns in `history`. Raises
        ServiceError, or RequestError for a file that cannot be read."""
        messages = (*history, user_message(question, images))
        call = chat_call(messages, system, self._with_defaults(options), stream=False)
        body, request_id = self._fetch(call)
        return read_reply(body, request_id)

    @contextlib.contextmanager
    def stream(
        self,
        question: str | Message,
        *images: Picture,
        history: Sequence[Message] = (),
        system: str | None = None,
        **options: Unpack[Options],
    ) -> Iterator[AnswerStream]:
        """As `ask`, but streamed. Leaving the block early also ends the request in the service."""
        messages = (*history, user_message(question, images))
        call = chat_call(messages, system, self._with_defaults(options), stream=True)
        attempts = Attempts(self._service, call)
        response = self._send(attempts)
        try:
            yield AnswerStream(response, attempts)
        finally:
            response.close()

    def conversation(
        self, system: str | None = None, history: Iterable[Message] = (), **options: Unpack[Options]
    ) -> Conversation:
        """A conversation, in which each question is sent with the previous turns."""
        return Conversation(self, system, history, options)

    def batch(self, questions: Iterable[Question], *, concurrency: int = 8, in_order: bool = True) -> Iterator[Result]:
        """Yield the result of each question, with up to `concurrency` in flight; in order of completion unless
        `in_order`.

        `questions` is consumed lazily. A failed question yields a Result with its error, and the others continue.
        """
        return ask_in_threads(self._ask_question, questions, concurrency=concurrency, in_order=in_order)

    def models(self) -> list[str]:
        """The names of the models served."""
        body, _ = self._fetch(Call("GET", "/v1/models"))
        return read_models(body)

    def is_healthy(self) -> bool:
        """Whether the service can answer now; False if it is unreachable."""
        try:
            self._fetch(health_call(self._service.timeout_s), NO_RETRIES)
        except ServiceError:
            return False
        return True

    def close(self) -> None:
        """Close connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _with_defaults(self, options: Options) -> Options:
        return {**self._options, **options}

    def _ask_question(self, question: Question) -> Reply:
        options: Any = question.options
        return self.ask(question.text, *question.images, system=question.system, **options)

    def _fetch(self, call: Call, retries: Retries | None = None) -> tuple[bytes, str | None]:
        """The body of a response, and the request's id."""
        response = self._send(Attempts(self._service, call, retries))
        answer = StreamedAnswer(response.headers.get("x-request-id"))
        with contextlib.closing(response), reading(answer):
            return response.read(), answer.request_id

    def _send(self, attempts: Attempts) -> httpx.Response:
        """Send until a response begins with status 200. Raises ServiceError when no attempts are left."""
        while True:
            request = self._http.build_request(**attempts.request())
            try:
                with connecting(self._service.url):
                    response = self._http.send(request, stream=True)
                    if response.status_code == httpx.codes.OK:
                        return response
                    with contextlib.closing(response):
                        response.read()
                raise refusal(response)
            except ServiceError as error:
                wait_s = attempts.wait_s(error)
            sleep(wait_s)
