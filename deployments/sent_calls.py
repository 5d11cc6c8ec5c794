"""Calls of this process that somebody watches: which replica has each, or which could take it.

Routers tell, watchers ask. Knows neither Ray nor stages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol


class Replica(Protocol):
    """What can be asked of one; Serve's RunningReplica."""

    async def get_queue_len(self, *, deadline_s: float) -> int:
        """How much it has to do, which it says at once. Raises Ray's errors of actors."""
        ...


@dataclass(frozen=True, eq=False)
class Whereabouts:
    """Of a call, until its router tells others: with the one replica that it was sent to, or on its way to one of
    these."""

    replicas: Callable[[], Collection[Replica]] = tuple
    is_sent: bool = False


class SentCalls:
    """By stage, and by the number of the request (affinity.Session)."""

    def __init__(self) -> None:
        self._watched: dict[tuple[str, str], Whereabouts] = {}

    def watch(self, stage: str, request: str) -> None:
        """From before a call until `forget`."""
        self._watched[stage, request] = Whereabouts()

    def where(self, stage: str, request: str) -> Whereabouts:
        """What its router said last of a call that is watched."""
        return self._watched[stage, request]

    def forget(self, stage: str, request: str) -> None:
        """Nobody watches it any more."""
        del self._watched[stage, request]

    def note(self, stage: str, request: str, where: Whereabouts) -> None:
        """For a router, which looks for a replica or has found one. Of calls that nobody watches nothing is kept."""
        if (stage, request) in self._watched:
            self._watched[stage, request] = where


SENT_CALLS = SentCalls()
