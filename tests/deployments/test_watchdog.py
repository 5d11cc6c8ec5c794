"""When a replica should be replaced."""

import time

import pytest

from deployments.watchdog import Watchdog
from llava_core.errors import EngineError, ImageError


def _fail(watchdog: Watchdog, error: Exception) -> None:
    with pytest.raises(type(error)), watchdog.work():
        raise error


def test_too_many_consecutive_failures_are_unhealthy_unless_one_succeeds() -> None:
    watchdog = Watchdog("stage", max_failures=3)
    for _ in range(2):
        _fail(watchdog, RuntimeError("broken"))
    watchdog.check()
    with watchdog.work():
        watchdog.check()
    for _ in range(2):
        _fail(watchdog, RuntimeError("broken"))
    watchdog.check()
    _fail(watchdog, RuntimeError("broken"))
    with pytest.raises(EngineError, match="stage: the last 3 requests have failed"):
        watchdog.check()


def test_a_clients_mistake_is_not_a_failure() -> None:
    watchdog = Watchdog("stage", max_failures=1)
    _fail(watchdog, ImageError("bad"))
    watchdog.check()
    watchdog.failed()
    _fail(watchdog, ImageError("bad"))
    watchdog.check()


def test_work_that_does_not_end_is_detected_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog = Watchdog("stage", max_work_s=100)
    now = time.monotonic()
    with watchdog.work():
        watchdog.check()
        monkeypatch.setattr("time.monotonic", lambda: now + 200)
        with watchdog.work(), pytest.raises(EngineError, match="more than 100 s"):
            watchdog.check()
    watchdog.check()
