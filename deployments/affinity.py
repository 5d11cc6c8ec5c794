"""Which replicas a request had best go to: first one that has seen its picture, or how its prompt begins.

A request has a key, and for every key all gateways try replicas in the same order, so nobody keeps a list of who holds
what. Knows neither Ray nor stages, and decides nothing about answers: any replica gives the same one.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deployments.quarantine import pictures
from llava_core.types import AnyRequest, GenerationRequest, TextPart

# Of each picture no more bytes are looked at, so that a large one does not hold up the event loop. Two pictures that
# have all of these in common share a place, and nothing else.
_SAMPLES = 16 * 1024
# Characters, or tokens of a prompt that is given as ids.
_BEGINNING = 1024
# A replica is preferred as long as it has fewer requests than each would have if all had the same, times this ...
LOAD_FACTOR = 1.5
# ... or fewer than two, because one that is just over may still be counted.
_LEAST_BOUND = 2
_numbers = itertools.count()


@dataclass(frozen=True)
class Session:
    """What a router is told of a call: the request's key, "" where any replica will do, and which request it is, among
    all of this process. Who asks again for the same one has lost the replica that had it."""

    key: str
    request: str

    @classmethod
    def read(cls, text: str) -> Session:
        """Of what `str` has made."""
        request, _, key = text.partition(" ")
        return cls(key, request)

    def __str__(self) -> str:
        return f"{self.request} {self.key}"

    @property
    def keyless(self) -> Session:
        """Of a call for which any replica will do."""
        return Session("", self.request)

    @property
    def anew(self) -> Session:
        """Of a call after one that no replica has lost."""
        return new_session(self.key)


def session_of(request: AnyRequest) -> Session:
    """One for all calls about this request, and for no others."""
    return new_session(affinity_key(request))


def new_session(key: str = "") -> Session:
    """One that no call has had; without a key, any replica will do."""
    return Session(key, str(next(_numbers)))


def affinity_key(request: AnyRequest) -> str:
    """The same for requests that have the first picture in common; without pictures, the system's text and the first
    message, as far as their beginnings go. So all turns of a conversation have one key."""
    picture = next(pictures(request), None)
    if picture is not None:
        # From all over the picture: formats without compression begin and end in borders.
        return _digest(f"{len(picture)} ".encode() + picture[:: len(picture) // _SAMPLES + 1])
    # `repr`, because a text may hold halves of characters, which have no bytes.
    return _digest(repr(_beginning(request)).encode())


def _beginning(request: AnyRequest) -> object:
    if not isinstance(request, GenerationRequest):
        return request.prompt[:_BEGINNING]
    parts = (part for message in request.messages[:1] for part in message.parts if isinstance(part, TextPart))
    return (request.system or "")[:_BEGINNING], "".join(part.text for part in parts)[:_BEGINNING]


def ranked(key: str, replicas: Iterable[str]) -> list[str]:
    """All of them, the preferred one first, by rendezvous hashing: a replica that comes or goes moves its own share of
    the keys and no other."""
    return sorted(replicas, key=lambda replica: _digest(f"{key} {replica}".encode()))


def by_preference(
    key: str, loads: Mapping[str, int], load_factor: float = LOAD_FACTOR, *, capacity: int | None = None
) -> list[str]:
    """All replicas of `loads`, which has how many requests each one has, in the order in which to try them.

    The preferred one, unless it is clearly busier than the others; then, as they are ranked, those that have less than
    their share; then the rest, the least busy first. So what everybody asks about is soon known to several replicas. A
    replica refuses what is beyond its `capacity`, so one that has as many is busy, whatever the others have.
    """
    order = ranked(key, loads)
    share = (sum(loads.values()) + 1) / len(loads)
    bounds = dict.fromkeys(order, math.ceil(share))
    bounds[order[0]] = max(_LEAST_BOUND, math.ceil(load_factor * share))
    if capacity is not None:
        bounds = {replica: min(bound, capacity) for replica, bound in bounds.items()}
    # Sorting leaves equal ones in their order.
    return sorted(order, key=lambda replica: loads[replica] if loads[replica] >= bounds[replica] else -1)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
