"""Moderation of questions, decided elsewhere: by a Python function, or by an address with OpenAI's moderation API.

A question that cannot be checked is not asked.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Awaitable, Callable

import httpx

from llava_core.client.messages import is_address
from llava_core.errors import LlavaError

# The reason why a text may not be asked, None where it may.
Moderate = Callable[[str], Awaitable[str | None]]

KEY_VARIABLE = "LLAVA_MODERATION_KEY"
_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


class ModerationError(LlavaError):
    """The moderation cannot be loaded or reached."""


class NotAllowedError(LlavaError):
    """The question was refused."""


def load_moderation(named: str | None, *, transport: httpx.AsyncBaseTransport | None = None) -> Moderate | None:
    """Load `module:function`, which maps a text to a reason or None, or use an address. Raises ModerationError."""
    if named is None:
        return None
    if is_address(named):
        return _Judge(named, transport)
    module, _, name = named.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModerationError(
            f"{named} is neither an address nor module:function that can be imported: {error}"
        ) from error

    async def judge(text: str) -> str | None:
        reason = function(text)
        told: str | None = await reason if inspect.isawaitable(reason) else reason
        return told

    return judge


class _Judge:
    """Asks a moderation address."""

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport | None) -> None:
        self._url, self._transport = url, transport
        key = os.environ.get(KEY_VARIABLE)
        self._headers = {} if not key else {"authorization": f"Bearer {key}"}

    async def __call__(self, text: str) -> str | None:
        try:
            async with httpx.AsyncClient(transport=self._transport, timeout=_TIMEOUT_S) as client:
                response = await client.post(self._url, json={"input": text}, headers=self._headers)
            response.raise_for_status()
            [result] = response.json()["results"]
            if not result["flagged"]:
                return None
            names = [str(name) for name, applies in result.get("categories", {}).items() if applies]
        except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
            # Escaped, because it may contain what the other server sent.
            logger.error("moderation by %s failed: %r", self._url, error)
            raise ModerationError("the question could not be checked, so it was not sent; try again later") from error
        return f"it may be about {', '.join(names)}" if names else "it is against the rules of this page"


async def check(moderate: Moderate | None, text: str) -> None:
    """Raise NotAllowedError, with the reason, for a text that may not be asked."""
    reason = None if moderate is None or not text.strip() else await moderate(text)
    if reason is not None:
        raise NotAllowedError(f"This question was not sent: {reason}. Edit it and try again.")
