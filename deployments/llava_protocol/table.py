"""Which external workers are registered, and which of them gets the next request: the controller's table.

All gateways of an application share one table, so that a worker registered with one gateway is known to all; calls are
serialised on one event loop. It lives in memory only: after its loss, workers' heartbeats are answered as unknown, and
they register again. Knows neither HTTP nor Ray, and opens no connections.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from deployments.metrics import REGISTERED_WORKERS, Reading, Recorder, Unrecorded
from deployments.settings.llava_protocol import WorkerArgs

logger = logging.getLogger(__name__)
# As in the reference: if the total speed is lower, no worker is chosen.
_LEAST_SPEED = 1e-4


@dataclass(frozen=True)
class Worker:
    """A worker, named by its address. `is_watched`: it has promised to send heartbeats."""

    name: str
    models: tuple[str, ...]
    speed: float = 1.0
    queue_length: int = 0
    is_watched: bool = True


class Workers(Protocol):
    """The table as a gateway sees it. All may raise StageUnavailableError or StageLostError."""

    async def register(self, worker: Worker) -> bool:
        """Add a worker, replacing one of the same name. Returns whether there was room."""
        ...

    async def heart_beat(self, name: str, queue_length: int) -> bool:
        """Record a heartbeat. Returns whether the worker is known; otherwise it has to register."""
        ...

    async def choose(self, model: str, request: str) -> str | None:
        """Choose a worker for one more request, which has an id of its own. Returns the worker's name, or None."""
        ...

    async def release(self, request: str) -> None:
        """Note that a request has ended, whether or not a worker was chosen for it."""
        ...

    async def fail(self, name: str) -> None:
        """Send a worker no requests until it registers again or a refresh finds it healthy."""
        ...

    async def remove(self, name: str) -> None:
        """Forget a worker."""
        ...

    async def workers(self) -> Sequence[Worker]:
        """List the workers that requests are sent to."""
        ...

    async def known(self) -> Sequence[Worker]:
        """List all workers, including those that have failed."""
        ...


@dataclass
class _Entry:
    """`requests` are those counted in the queue of a worker without heartbeats, with the time when each has ended."""

    worker: Worker
    heard_at: float
    requests: dict[str, float]
    has_failed: bool = False


class WorkerTable:
    """Implements Workers. `draw` returns a number in [0, 1), like random.random."""

    def __init__(
        self,
        args: WorkerArgs,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
        recorder: Recorder | None = None,
    ) -> None:
        self._args = args
        self._clock = clock
        self._draw = draw
        # No request to a worker takes longer (worker_client.py).
        self._longest_s = args.answer_timeout_s + args.silence_s
        self._entries: dict[str, _Entry] = {}
        (recorder or Unrecorded()).watch(self._readings)

    async def register(self, worker: Worker) -> bool:
        """See Workers."""
        self._expire()
        if worker.name not in self._entries and len(self._entries) >= self._args.max_workers:
            logger.warning("%s cannot register: there are %d workers already", worker.name, len(self._entries))
            return False
        logger.info("%s has registered with %s", worker.name, ", ".join(worker.models))
        # The worker counts them in the queue that it reports.
        requests = self._entries[worker.name].requests if worker.name in self._entries else {}
        self._entries[worker.name] = _Entry(worker, self._clock(), requests)
        return True

    async def heart_beat(self, name: str, queue_length: int) -> bool:
        """See Workers."""
        self._expire()
        entry = self._entries.get(name)
        if entry is None or entry.has_failed:
            return False
        entry.worker = replace(entry.worker, queue_length=queue_length)
        entry.heard_at = self._clock()
        return True

    async def choose(self, model: str, request: str) -> str | None:
        """See Workers."""
        able = [worker for worker in await self.workers() if model in worker.models and worker.speed > 0]
        if sum(worker.speed for worker in able) < _LEAST_SPEED:
            return None
        chosen = self._by_lottery(able) if self._args.dispatch == "lottery" else _shortest_queue(able)
        # An estimate, until the worker reports its queue itself.
        self._count(chosen, 1)
        if not chosen.is_watched:
            self._entries[chosen.name].requests[request] = self._clock() + self._longest_s
        return chosen.name

    async def release(self, request: str) -> None:
        """See Workers."""
        for entry in self._entries.values():
            if entry.requests.pop(request, None) is not None:
                self._count(entry.worker, -1)

    async def fail(self, name: str) -> None:
        """See Workers."""
        if name in self._entries:
            self._entries[name].has_failed = True

    async def remove(self, name: str) -> None:
        """See Workers."""
        self._entries.pop(name, None)

    async def workers(self) -> Sequence[Worker]:
        """See Workers."""
        self._expire()
        return [entry.worker for entry in self._entries.values() if not entry.has_failed]

    async def known(self) -> Sequence[Worker]:
        """See Workers."""
        self._expire()
        return [entry.worker for entry in self._entries.values()]

    def _by_lottery(self, workers: Sequence[Worker]) -> Worker:
        drawn = self._draw() * sum(worker.speed for worker in workers)
        for worker in workers:
            drawn -= worker.speed
            if drawn < 0:
                return worker
        return workers[-1]

    def _count(self, worker: Worker, change: int) -> None:
        length = max(0, worker.queue_length + change)
        self._entries[worker.name].worker = replace(worker, queue_length=length)

    def _expire(self) -> None:
        oldest = self._clock() - self._args.heart_beat_expiration_s
        for name in [name for name, each in self._entries.items() if each.worker.is_watched and each.heard_at < oldest]:
            logger.warning("%s is forgotten: no heartbeat for %g s", name, self._args.heart_beat_expiration_s)
            del self._entries[name]
        for entry in self._entries.values():
            # Their gateways gave them up before they knew of the choice, or were lost.
            for request in [request for request, ends_at in entry.requests.items() if ends_at < self._clock()]:
                del entry.requests[request]
                self._count(entry.worker, -1)

    def _readings(self) -> list[Reading]:
        """Called from another thread, so it only counts."""
        return [(REGISTERED_WORKERS, sum(not entry.has_failed for entry in tuple(self._entries.values())), ())]


def _shortest_queue(workers: Sequence[Worker]) -> Worker:
    """Return the first worker with the shortest queue relative to its speed."""
    return min(workers, key=lambda worker: worker.queue_length / worker.speed)
