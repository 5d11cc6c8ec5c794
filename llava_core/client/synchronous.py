"""The client for blocking code. `asynchronous.py` is the same for asyncio; what they share knows of neither."""

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
    """An answer as it comes: iterate over its deltas; `reply` is what has come so far."""

    def __init__(self, response: httpx.Response, attempts: Attempts) -> None:
        self._response, self._attempts = response, attempts
        self._answer = StreamedAnswer(response.headers.get("x-request-id"))
        self._deltas = self._read()

    def __next__(self) -> Delta:
        return next(self._deltas)

    def _read(self) -> Iterator[Delta]:
        with reading(self._answer):
            # To the end, so that the connection can be used again.
            for data in self._response.iter_bytes():
                self._attempts.check_time()
                yield from self._answer.feed(data)
        self._answer.check_end()

    @property
    def reply(self) -> Reply:
        """The answer as far as it has come; with its usage and times once it has been read to its end."""
        return self._answer.reply


class Client:
    """Asks a service, from any number of threads.

    `url` is the service's root. The key is `api_key`, or else the environment's LLAVA_API_KEY. The service may be
    silent for `timeout_s`. `options` hold for every question that does not say otherwise. `transport` replaces httpx's
    own, for tests and for connections of another kind.
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
        """The answer to a question about pictures, paths or addresses or bytes or Pillow's, after what was said
        before. Raises ServiceError, or RequestError for a file that cannot be read."""
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
        """As `ask`, but as it is written. Leaving the block early ends the request on the service, too."""
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
        """Questions that know what was said before."""
        return Conversation(self, system, history, options)

    def batch(self, questions: Iterable[Question], *, concurrency: int = 8, in_order: bool = True) -> Iterator[Result]:
        """The result of each question, up to `concurrency` of them asked at a time; as they come unless `in_order`.

        `questions` is read as far as it is needed. A question that fails is a Result with its error, and the others
        go on.
        """
        return ask_in_threads(self._ask_question, questions, concurrency=concurrency, in_order=in_order)

    def models(self) -> list[str]:
        """The names of the models served."""
        body, _ = self._fetch(Call("GET", "/v1/models"))
        return read_models(body)

    def is_healthy(self) -> bool:
        """Whether the service can answer now; False where nobody does."""
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
        """The body of a response, and its request's id."""
        response = self._send(Attempts(self._service, call, retries))
        answer = StreamedAnswer(response.headers.get("x-request-id"))
        with contextlib.closing(response), reading(answer):
            return response.read(), answer.request_id

    def _send(self, attempts: Attempts) -> httpx.Response:
        """A response that has begun well. Raises ServiceError once there is no further attempt."""
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
