"""A conversation: each new question is sent with all previous turns, including their pictures.

A question whose answer fails leaves no trace, so it can be asked again; an answer that was left early is kept as far as
it was received. Knows the client only as the source of answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Unpack

from llava_core.client.answers import Reply
from llava_core.client.messages import Picture, user_message
from llava_core.client.requests import Options
from llava_core.types import Message, TextPart

if TYPE_CHECKING:
    from llava_core.client.asynchronous import AsyncAnswerStream, AsyncClient
    from llava_core.client.synchronous import AnswerStream, Client


class _Turns:
    """State of both kinds of conversation: `messages` is the history, which may be changed between questions; `system`
    replaces the template's system text."""

    def __init__(self, system: str | None, history: Iterable[Message], options: Options) -> None:
        self.system = system
        self.messages = list(history)
        self._options = options

    def _given(self, options: Options) -> dict[str, Any]:
        return {**self._options, **options, "history": tuple(self.messages), "system": self.system}

    def _add(self, question: Message, reply: Reply) -> None:
        if reply.text:
            self.messages += [question, Message("assistant", (TextPart(reply.text),))]


class Conversation(_Turns):
    """A blocking conversation; created by `Client.conversation`."""

    def __init__(self, client: Client, system: str | None, history: Iterable[Message], options: Options) -> None:
        super().__init__(system, history, options)
        self._client = client

    def ask(self, question: str | Message, *images: Picture, **options: Unpack[Options]) -> Reply:
        """The answer, which is then part of the conversation."""
        message = user_message(question, images)
        reply = self._client.ask(message, **self._given(options))
        self._add(message, reply)
        return reply

    @contextlib.contextmanager
    def stream(self, question: str | Message, *images: Picture, **options: Unpack[Options]) -> Iterator[AnswerStream]:
        """The answer as it comes; part of the conversation once the block is left."""
        message = user_message(question, images)
        with self._client.stream(message, **self._given(options)) as answer:
            yield answer
            self._add(message, answer.reply)


class AsyncConversation(_Turns):
    """A conversation for asyncio; created by `AsyncClient.conversation`."""

    def __init__(self, client: AsyncClient, system: str | None, history: Iterable[Message], options: Options) -> None:
        super().__init__(system, history, options)
        self._client = client

    async def ask(self, question: str | Message, *images: Picture, **options: Unpack[Options]) -> Reply:
        """The answer, which is then part of the conversation."""
        message = user_message(question, images)
        reply = await self._client.ask(message, **self._given(options))
        self._add(message, reply)
        return reply

    @contextlib.asynccontextmanager
    async def stream(
        self, question: str | Message, *images: Picture, **options: Unpack[Options]
    ) -> AsyncIterator[AsyncAnswerStream]:
        """The answer as it comes; part of the conversation once the block is left."""
        message = user_message(question, images)
        async with self._client.stream(message, **self._given(options)) as answer:
            yield answer
            self._add(message, answer.reply)
