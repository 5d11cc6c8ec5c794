"""Asks the service for a visitor, and tells how the answer grows, as often as eyes can see.

Closing what `answer` gives ends the request on the service. Knows no page.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

import httpx

from deployments.page.log import ConversationLog
from deployments.page.moderation import Moderate, check
from deployments.page.talk import Choices, Talk, Turn, history
from deployments.page.words import figures, in_words
from llava_core.client import AsyncClient, Reply
from llava_core.client.retries import NO_RETRIES
from llava_core.errors import LlavaError

# Between two states of an answer that grows, and of one that does not.
_REFRESH_S, _STANDSTILL_S = 0.06, 1.0
# How long the service may be silent: while it answers, and when it is asked for its models.
_SILENCE_S, _LOOK_S = 600.0, 5.0

logger = logging.getLogger(__name__)


@dataclass
class Asker:
    """A service at `url`. `log` and `moderate` may be missing; `transport` is for tests."""

    url: str
    moderate: Moderate | None = None
    log: ConversationLog | None = None
    transport: httpx.AsyncBaseTransport | None = None

    async def models(self, key: str | None) -> list[str]:
        """What can be asked. Raises ServiceError while nothing can."""
        async with self._client(key, _LOOK_S) as client:
            return await client.models()

    async def answer(
        self, before: Talk, turn: Turn, choices: Choices, *, key: str | None, keep: bool
    ) -> AsyncGenerator[Turn, None]:
        """The open turn again and again while it is answered, the last time closed. Kept in the log where `keep` says
        so."""
        start = time.time()
        try:
            await check(self.moderate, f"{choices.system}\n{turn.question}".strip())
            async with contextlib.aclosing(self._written(before, turn, choices, key)) as states:
                async for turn in states:
                    yield turn
        except LlavaError as error:
            turn = replace(turn, problem=in_words(error), is_open=False)
        if keep and self.log is not None and turn.answer:
            await self._keep(self.log, (*before, turn), choices, start)
        yield replace(turn, is_open=False)

    async def _written(self, before: Talk, turn: Turn, choices: Choices, key: str | None) -> AsyncGenerator[Turn, None]:
        pieces: list[str] = []
        reading = asyncio.create_task(self._read(before, turn, choices, key, pieces))
        shown, at = 0, time.monotonic()
        try:
            while not reading.done():
                await asyncio.wait({reading}, timeout=_REFRESH_S)
                # Also where nothing is new: a visitor who has left is noticed when something is shown.
                if len(pieces) > shown or time.monotonic() - at > _STANDSTILL_S:
                    shown, at = len(pieces), time.monotonic()
                    turn = replace(turn, answer="".join(pieces))
                    yield turn
            # An error comes after what there is of the answer.
            turn = replace(turn, answer="".join(pieces))
            yield turn
            yield replace(turn, figures=figures(await reading))
        finally:
            reading.cancel()
            await asyncio.wait({reading})

    async def _read(self, before: Talk, turn: Turn, choices: Choices, key: str | None, pieces: list[str]) -> Reply:
        said, asked = await asyncio.to_thread(lambda: (history(before), turn.asked))
        options = choices.options()
        async with (
            self._client(key) as client,
            client.stream(asked, history=said, system=choices.system or None, **options) as answer,
        ):
            async for delta in answer:
                if delta.text:
                    pieces.append(delta.text)
        return answer.reply

    async def _keep(self, log: ConversationLog, talk: Talk, choices: Choices, start: float) -> None:
        try:
            await asyncio.to_thread(log.chat, talk, choices, start=start, finish=time.time())
        except OSError:
            # The visitor has an answer, and can do nothing about it.
            logger.exception("a conversation could not be kept")

    def _client(self, key: str | None, timeout_s: float = _SILENCE_S) -> AsyncClient:
        # A visitor is told at once that the service is busy, and decides.
        return AsyncClient(self.url, api_key=key, timeout_s=timeout_s, retries=NO_RETRIES, transport=self.transport)
