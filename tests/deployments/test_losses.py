"""When a loss is told, from scripted reports; test_faults.py loses replicas of a real service."""

import itertools

import pytest

from deployments.losses import Losses

HEALTHY = {"status": "HEALTHY", "status_trigger": "UNSPECIFIED", "message": ""}
LOST = {"status": "UNHEALTHY", "status_trigger": "HEALTH_CHECK_FAILED", "message": "A replica's health check failed."}


def _not_started(cause: str, status: str = "UNHEALTHY") -> dict[str, str]:
    message = f"Traceback (most recent call last):\n  ...\nllava_core.errors.CheckpointError: {cause}"
    return {"status": status, "status_trigger": "REPLICA_STARTUP_FAILED", "message": message}


def test_a_loss_and_its_end_are_each_told_once() -> None:
    losses = Losses(itertools.count(10.0, 2.25).__next__)
    assert losses.news({"A": HEALTHY, "B": HEALTHY}) == []
    assert losses.news({"A": LOST, "B": HEALTHY}) == ["A has lost a replica; another one is starting."]
    assert losses.news({"A": LOST, "B": LOST}) == ["B has lost a replica; another one is starting."]
    assert losses.news({}) == []
    assert losses.news({"A": LOST, "B": HEALTHY}) == ["B has all its replicas again, after 2.2 s."]
    assert losses.news({"A": HEALTHY, "B": HEALTHY}) == ["A has all its replicas again, after 6.8 s."]
    assert losses.news({"A": HEALTHY, "B": HEALTHY}) == []


def test_each_cause_that_no_replica_starts_is_told_once() -> None:
    losses = Losses(lambda: 0.0)
    assert len(losses.news({"A": LOST})) == 1
    assert losses.news({"A": _not_started("no file")}) == ["A could not start a replica, and tries again: no file"]
    assert losses.news({"A": _not_started("no file")}) == []
    assert losses.news({"A": _not_started("half a file")}) == [
        "A could not start a replica, and tries again: half a file"
    ]
    assert losses.news({"A": HEALTHY}) == ["A has all its replicas again, after 0.0 s."]
    # The same cause again, while scaling up.
    assert losses.news({"A": _not_started("no file", "UPSCALING")}) == [
        "A could not start a replica, and tries again: no file"
    ]


@pytest.mark.parametrize("status", ["UPSCALING", "DOWNSCALING", "UPDATING", "UNHEALTHY"])
def test_scaling_and_updates_are_no_losses(status: str) -> None:
    losses = Losses()
    assert losses.news({"A": {**HEALTHY, "status": status}}) == []
    assert losses.news({"A": HEALTHY}) == []


def test_a_configuration_that_does_not_start_is_not_told_twice() -> None:
    """`llava serve` itself tells so after SIGHUP, and Serve does not try again."""
    assert Losses().news({"A": _not_started("no file", "DEPLOY_FAILED")}) == []
