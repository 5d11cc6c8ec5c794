"""Calls of this process that somebody watches: which replica has each, or which could take it.

Routers tell, watchers ask. Knows neither Ray nor stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol


class Replica(Protocol):
    """What can be asked of one; Serve's RunningReplica."""

    async def get_queue_len(self, *, deadline_s: float) -> int:
        """How much it has to do, which it says at once. Raises Ray's errors of actors."""
        ...


@dataclass(frozen=True, eq=False)
class Whereabouts:
    """Of a call, until its router tells others: with the one replica that it was sent to, or on its way to one of
    these. `since` is by time.monotonic()."""

    replicas: Callable[[], Collection[Replica]] = tuple
    is_sent: bool = False
    since: float = field(default_factory=time.monotonic)


@dataclass
class _Watched:
    where: Whereabouts


class SentCalls:
    """By stage, and by the number of the request (affinity.Session). Routers may run in a thread of their own."""

    def __init__(self) -> None:
        self._watched: dict[tuple[str, str], _Watched] = {}

    def watch(self, stage: str, request: str) -> None:
        """From before a call until `forget`."""
        self._watched[stage, request] = _Watched(Whereabouts())

    def where(self, stage: str, request: str) -> Whereabouts:
        """What its router said last of a call that is watched."""
        return self._watched[stage, request].where

    def forget(self, stage: str, request: str) -> None:
        """Nobody watches it any more."""
        del self._watched[stage, request]

    def note(self, stage: str, request: str, where: Whereabouts) -> None:
        """For a router, which looks for a replica or has found one. Of calls that nobody watches nothing is kept."""
        if (watched := self._watched.get((stage, request))) is not None:
            watched.where = where


SENT_CALLS = SentCalls()
