"""Where this process's watched calls are: which replica each was sent to, or which replicas could take it.

Routers write it, watchers (stage_call.py) read it. Knows neither Ray nor stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol


class Replica(Protocol):
    """The part of Serve's RunningReplica that is used here."""

    @property
    def node_id(self) -> str:
        """The Ray node that it runs on."""
        ...

    async def get_queue_len(self, *, deadline_s: float) -> int:
        """The number of its ongoing requests, answered without queueing. Raises Ray's actor errors."""
        ...


@dataclass(frozen=True, eq=False)
class Whereabouts:
    """Where a call is: sent to the one replica in `replicas` (`is_sent`), or waiting for one of them to accept it.

    `since` is by time.monotonic(). Compared by identity: a router replaces it with a new one when the call moves."""

    replicas: Callable[[], Collection[Replica]] = tuple
    is_sent: bool = False
    since: float = field(default_factory=time.monotonic)


@dataclass
class _Watched:
    where: Whereabouts


class SentCalls:
    """Keyed by deployment and request number (affinity.Session). Routers may run in a thread of their own."""

    def __init__(self) -> None:
        self._watched: dict[tuple[str, str], _Watched] = {}

    def watch(self, stage: str, request: str) -> None:
        """Start watching a call that is about to be made, until `forget`."""
        self._watched[stage, request] = _Watched(Whereabouts())

    def where(self, stage: str, request: str) -> Whereabouts:
        """What the router last noted about a watched call. Raises KeyError for one that is not watched."""
        return self._watched[stage, request].where

    def forget(self, stage: str, request: str) -> None:
        """Stop watching the call."""
        del self._watched[stage, request]

    def note(self, stage: str, request: str, where: Whereabouts) -> None:
        """For a router that is choosing a replica or has chosen one. Ignored for calls that are not watched."""
        if (watched := self._watched.get((stage, request))) is not None:
            watched.where = where


SENT_CALLS = SentCalls()
