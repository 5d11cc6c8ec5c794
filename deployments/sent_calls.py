"""Calls of this process that somebody listens to: has one been sent to a replica, or does it wait until there is one?

Routers tell, listeners ask. Knows neither Ray nor stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class SentCalls:
    """By stage, and by the number of the request (affinity.Session)."""

    def __init__(self) -> None:
        self._is_sent: dict[tuple[str, str], bool] = {}

    @contextmanager
    def listening(self, stage: str, request: str) -> Iterator[Callable[[], bool]]:
        """Around a call; gives what tells whether a replica has been found for it."""
        call = stage, request
        self._is_sent[call] = False
        try:
            yield lambda: self._is_sent[call]
        finally:
            del self._is_sent[call]

    def note(self, stage: str, request: str, *, is_sent: bool) -> None:
        """For a router, which looks for a replica or has found one. Of calls that nobody listens to nothing is kept."""
        if (stage, request) in self._is_sent:
            self._is_sent[stage, request] = is_sent


SENT_CALLS = SentCalls()
