"""Where the time goes while a replica starts, phase by phase: told once in its log, and as metrics.

Knows nothing of what a phase does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deployments.metrics import STARTUP, RayRecorder, Reading

logger = logging.getLogger(__name__)


class Startup:
    """Phases follow each other; what lies between two of them counts for none."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around the work of one, which counts also where it fails."""
        began = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - began

    def __str__(self) -> str:
        """In seconds, as people read it, in the order of the phases."""
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self._seconds.items())

    def recorder(self) -> RayRecorder:
        """For the replica that has started; it tells of this, too."""
        logger.info("started: %s", self)
        recorder = RayRecorder().start()
        recorder.watch(self.readings)
        return recorder

    def readings(self) -> list[Reading]:
        """For a Recorder."""
        return [(STARTUP, seconds, (name,)) for name, seconds in self._seconds.items()]
