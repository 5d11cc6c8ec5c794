"""Which replicas a request should go to: preferably one that has seen its picture, or the beginning of its prompt.

Each request has a key, and all gateways try replicas in the same order for a given key, so nobody needs to track which
replica holds what. Knows neither Ray nor stages, and does not affect answers: every replica gives the same one.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deployments.graph.quarantine import pictures
from llava_core.types import AnyRequest, GenerationRequest, TextPart

# At most about this many bytes of a picture are hashed, so that a large one does not block the event loop. Two pictures
# that agree in all of them share a preferred replica, and nothing else.
_SAMPLES = 16 * 1024
# In characters, or in tokens for a prompt given as ids.
_BEGINNING = 1024
# A replica is preferred as long as it has fewer requests than this multiple of an equal share ...
LOAD_FACTOR = 1.5
# ... or fewer than two, because a request that has just finished may still be counted.
_LEAST_BOUND = 2
_numbers = itertools.count()


@dataclass(frozen=True)
class Session:
    """What a router knows of a call: the request's key, "" where any replica will do, and the request's number within
    this process. A second call for the same request means that it has lost the replica that had it."""

    key: str
    request: str

    @classmethod
    def read(cls, text: str) -> Session:
        """The inverse of `str`."""
        request, _, key = text.partition(" ")
        return cls(key, request)

    def __str__(self) -> str:
        return f"{self.request} {self.key}"

    @property
    def keyless(self) -> Session:
        """The same request, for a call that any replica may take."""
        return Session("", self.request)

    @property
    def anew(self) -> Session:
        """A new request with the same key, for a call after one that was not lost."""
        return new_session(self.key)


def session_of(request: AnyRequest) -> Session:
    """The session for all calls of this request, and for no others."""
    return new_session(affinity_key(request))


def new_session(key: str = "") -> Session:
    """A session that no call has had; without a key, any replica will do."""
    return Session(key, str(next(_numbers)))


def affinity_key(request: AnyRequest) -> str:
    """A key that is the same for requests that share their first picture, or, without pictures, the beginnings of the
    system text and of the first message. So all turns of a conversation have one key."""
    picture = next(pictures(request), None)
    if picture is not None:
        # Sampled from the whole picture: uncompressed formats often begin and end with plain borders.
        return _digest(f"{len(picture)} ".encode() + picture[:: len(picture) // _SAMPLES + 1])
    # `repr`, because a text may hold lone surrogates, which cannot be encoded.
    return _digest(repr(_beginning(request)).encode())


def _beginning(request: AnyRequest) -> object:
    if not isinstance(request, GenerationRequest):
        return request.prompt[:_BEGINNING]
    parts = (part for message in request.messages[:1] for part in message.parts if isinstance(part, TextPart))
    return (request.system or "")[:_BEGINNING], "".join(part.text for part in parts)[:_BEGINNING]


def ranked(key: str, replicas: Iterable[str]) -> list[str]:
    """All replicas, the preferred one first, by rendezvous hashing: adding or removing a replica moves only its own
    share of the keys."""
    return sorted(replicas, key=lambda replica: _digest(f"{key} {replica}".encode()))


def by_preference(
    key: str, loads: Mapping[str, int], load_factor: float = LOAD_FACTOR, *, capacity: int | None = None
) -> list[str]:
    """All replicas of `loads`, the number of requests by replica, in the order in which to try them.

    First the preferred one, unless it is clearly busier than the others; then, in rank order, those below an equal
    share; then the rest, the least busy first. So a popular picture is soon cached on several replicas. A replica
    refuses requests beyond `capacity`, so one that has reached it counts as busy, however busy the others are.
    """
    order = ranked(key, loads)
    share = (sum(loads.values()) + 1) / len(loads)
    bounds = dict.fromkeys(order, math.ceil(share))
    bounds[order[0]] = max(_LEAST_BOUND, math.ceil(load_factor * share))
    if capacity is not None:
        bounds = {replica: min(bound, capacity) for replica, bound in bounds.items()}
    # Sorting is stable, so replicas with equal loads keep their order.
    return sorted(order, key=lambda replica: loads[replica] if loads[replica] >= bounds[replica] else -1)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
