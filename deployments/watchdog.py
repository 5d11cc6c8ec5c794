"""Does a replica still get work done? Each stage counts its failures here; Serve replaces a replica with too many.

Knows nothing about what the work is. Safe to use from several threads.
"""

from __future__ import annotations

import time
from types import TracebackType

from llava_core.errors import EngineError, RequestError


class Watchdog:
    """`check` raises after `max_failures` in a row, and while a piece of work takes longer than `max_work_s`.

    A client's mistake is not a failure: a replica that detects one works.
    """

    def __init__(self, name: str, *, max_failures: int = 5, max_work_s: float = 600.0) -> None:
        self._name = name
        self._max_failures = max_failures
        self._max_work_s = max_work_s
        self._num_failures = 0
        self._started: dict[_Work, float] = {}

    def work(self) -> _Work:
        """A context manager around one piece of work: counts its outcome and tracks how long it takes."""
        return _Work(self)

    def succeeded(self) -> None:
        """Resets the count of failures."""
        self._num_failures = 0

    def failed(self) -> None:
        """Counts one more failure in a row."""
        self._num_failures += 1

    def check(self) -> None:
        """Raises EngineError when this replica should be replaced."""
        if self._num_failures >= self._max_failures:
            raise EngineError(f"{self._name}: the last {self._num_failures} requests have failed")
        begun = min(list(self._started.values()), default=None)
        if begun is not None and time.monotonic() - begun > self._max_work_s:
            raise EngineError(f"{self._name}: one request has been worked on for more than {self._max_work_s:g} s")


class _Work:
    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def __enter__(self) -> None:
        self._watchdog._started[self] = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._watchdog._started[self]
        if kind is None or issubclass(kind, RequestError):
            self._watchdog.succeeded()
        else:
            self._watchdog.failed()
