"""Where the time goes while a replica starts, phase by phase: logged once, and exported as metrics.

Knows nothing about what a phase does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deployments.metrics import STARTUP, Reading
from deployments.ray_recorder import RayRecorder

logger = logging.getLogger(__name__)


class Startup:
    """Times phases that follow each other; time between two of them belongs to neither."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context manager around a phase, which counts even if it fails."""
        began = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - began

    def __str__(self) -> str:
        """A readable list of the phases in order, in seconds."""
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self._seconds.items())

    def recorder(self) -> RayRecorder:
        """Starts the replica's recorder, which also exports these times. To be called once the replica has started."""
        logger.info("started: %s", self)
        recorder = RayRecorder().start()
        recorder.watch(self.readings)
        return recorder

    def readings(self) -> list[Reading]:
        """The seconds of each phase, for a Recorder."""
        return [(STARTUP, seconds, (name,)) for name, seconds in self._seconds.items()]
