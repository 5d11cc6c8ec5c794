"""The share of time for which a thread has recently been busy. Knows nothing about the work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class BusyTime:
    """Measures one piece of work at a time, on one thread; another thread asks for the share."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._worked_s = 0.0
        self._began: float | None = None
        # When the share was last asked for, and the total time worked by then.
        self._asked_at, self._asked_worked_s = clock(), 0.0

    @contextmanager
    def work(self) -> Iterator[None]:
        """A context manager around a piece of work."""
        with self._lock:
            self._began = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self._worked_s += self._clock() - self._began
                self._began = None

    def share(self) -> float:
        """The share of time since the last call, from 0 to 1. Unfinished work counts up to now."""
        with self._lock:
            now = self._clock()
            worked_s = self._worked_s + (0.0 if self._began is None else now - self._began)
            elapsed, worked = now - self._asked_at, worked_s - self._asked_worked_s
            self._asked_at, self._asked_worked_s = now, worked_s
        return min(1.0, worked / elapsed) if elapsed > 0 else 0.0
