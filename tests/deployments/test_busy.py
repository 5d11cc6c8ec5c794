"""The share of time that a thread is busy, by the test's own clock."""

import pytest

from deployments.busy import BusyTime


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_share_covers_the_time_since_the_last_call() -> None:
    clock = Clock()
    busy = BusyTime(clock)
    for worked, idle, share in ((1.0, 3.0, 0.25), (2.0, 0.0, 1.0), (0.0, 5.0, 0.0)):
        with busy.work():
            clock.now += worked
        clock.now += idle
        assert busy.share() == pytest.approx(share)


def test_unfinished_work_counts_up_to_now_and_only_once() -> None:
    clock = Clock()
    busy = BusyTime(clock)
    clock.now += 1
    with busy.work():
        clock.now += 3
        assert busy.share() == pytest.approx(0.75)
        clock.now += 2
        assert busy.share() == pytest.approx(1.0)
        clock.now += 1
    clock.now += 1
    assert busy.share() == pytest.approx(0.5)


def test_failed_work_has_ended_and_counts() -> None:
    clock = Clock()
    busy = BusyTime(clock)

    def fail() -> None:
        with busy.work():
            clock.now += 1
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fail()
    clock.now += 1
    assert busy.share() == pytest.approx(0.5)
    assert busy.share() == 0
