"""Phases of a start, by the test's own clock."""

import pytest

from deployments.metrics import STARTUP
from deployments.startup import Startup


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


def test_each_phase_has_its_time_and_what_lies_between_has_none() -> None:
    clock = Clock()
    startup = Startup(clock)
    for name, seconds in (("imports", 2.0), ("weights", 0.5), ("imports", 1.0)):
        with startup.phase(name):
            clock.now += seconds
        clock.now += 10
    assert str(startup) == "imports 3.00 s, weights 0.50 s"
    assert startup.readings() == [(STARTUP, 3.0, ("imports",)), (STARTUP, 0.5, ("weights",))]


def test_a_phase_that_fails_has_taken_its_time() -> None:
    clock = Clock()
    startup = Startup(clock)

    def fail() -> None:
        with startup.phase("weights"):
            clock.now += 4
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert str(startup) == "weights 4.00 s"
