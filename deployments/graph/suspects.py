"""Replicas that have lost a request, which is why they are deprioritised for a while.

A replica whose host is silent stays in every list until Ray detects it. Until then the only evidence is that a request
it had is retried. Each router keeps its own record. Knows neither Ray nor stages.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

# By then Ray has detected the loss (CLUSTER_ENVIRONMENT), or the replica is back.
SUSPECTED_S = 15.0


class Suspects:
    """Remembers which replicas had the last `max_requests` requests."""

    def __init__(
        self,
        suspected_s: float = SUSPECTED_S,
        *,
        max_requests: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._suspected_s = suspected_s
        self._max_requests = max_requests
        self._clock = clock
        self._had: OrderedDict[str, str] = OrderedDict()
        # When each suspicion ends, by replica.
        self._suspected: dict[str, float] = {}

    def sent(self, request: str, replica: str) -> None:
        """Notes that the replica gets the request, which others may have refused before; "" is a request that is never
        retried."""
        if not request:
            return
        self._had[request] = replica
        while len(self._had) > self._max_requests:
            self._had.popitem(last=False)

    def asked(self, request: str) -> None:
        """Notes that the request needs a replica; one that had it before has lost it."""
        if (replica := self._had.pop(request, None)) is not None:
            now = self._clock()
            # Nobody may ask about dead replicas again.
            self._suspected = {each: until for each, until in self._suspected.items() if until > now}
            self._suspected[replica] = now + self._suspected_s

    def __contains__(self, replica: str) -> bool:
        return replica in self._suspected and self._suspected[replica] > self._clock()
