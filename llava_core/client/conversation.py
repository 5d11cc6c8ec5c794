"""A conversation: what was said is sent along with each new question, pictures of every turn included.

A question whose answer fails leaves no trace, so it can be asked again; of an answer that was left early stays what had
come. Knows a client only as who answers.
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
    """What both kinds have: `messages` is the history, which may be changed between questions, and `system` the text
    that replaces the template's."""

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
    """Blocking; made by `Client.conversation`."""

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
    """For asyncio; made by `AsyncClient.conversation`."""

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
