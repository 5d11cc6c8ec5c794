"""Phases of a start, by the test's own clock."""

import pytest

from deployments.metrics import STARTUP
from deployments.startup import Startup


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


def test_time_is_measured_within_phases_and_not_between_them() -> None:
    clock = Clock()
    startup = Startup(clock)
    for name, seconds in (("imports", 2.0), ("weights", 0.5), ("imports", 1.0)):
        with startup.phase(name):
            clock.now += seconds
        clock.now += 10
    assert str(startup) == "imports 3.00 s, weights 0.50 s"
    assert startup.readings() == [(STARTUP, 3.0, ("imports",)), (STARTUP, 0.5, ("weights",))]


def test_the_time_of_a_failed_phase_is_measured() -> None:
    clock = Clock()
    startup = Startup(clock)

    def fail() -> None:
        with startup.phase("weights"):
            clock.now += 4
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert str(startup) == "weights 4.00 s"
