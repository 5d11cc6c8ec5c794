"""Asks the service on a visitor's behalf, and reports how the answer grows, as often as eyes can see.

Closing the generator that `answer` returns ends the request on the service. Knows no page.
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

# The time between two states of an answer that grows, and of one that does not.
_REFRESH_S, _STANDSTILL_S = 0.06, 1.0
# How long the service may be silent while it answers, and when asked for its models.
_SILENCE_S, _LOOK_S = 600.0, 5.0

logger = logging.getLogger(__name__)


@dataclass
class Asker:
    """Asks the service at `url`. `log` and `moderate` are optional; `transport` is for tests."""

    url: str
    moderate: Moderate | None = None
    log: ConversationLog | None = None
    transport: httpx.AsyncBaseTransport | None = None

    async def models(self, key: str | None) -> list[str]:
        """List the models that can be asked. Raises ServiceError while the service cannot be asked."""
        async with self._client(key, _LOOK_S) as client:
            return await client.models()

    async def answer(
        self, before: Talk, turn: Turn, choices: Choices, *, key: str | None, keep: bool
    ) -> AsyncGenerator[Turn, None]:
        """Yield the open turn repeatedly while it is answered, and once more when it is closed. Logged if `keep` is
        set."""
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
                # Also when nothing is new: a visitor who has left is only detected by showing something.
                if len(pieces) > shown or time.monotonic() - at > _STANDSTILL_S:
                    shown, at = len(pieces), time.monotonic()
                    turn = replace(turn, answer="".join(pieces))
                    yield turn
            # An error is shown after the partial answer.
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
            # The visitor has the answer, and can do nothing about the log.
            logger.exception("a conversation could not be kept")

    def _client(self, key: str | None, timeout_s: float = _SILENCE_S) -> AsyncClient:
        # Visitors are told at once that the service is busy, and decide whether to retry.
        return AsyncClient(self.url, api_key=key, timeout_s=timeout_s, retries=NO_RETRIES, transport=self.transport)
