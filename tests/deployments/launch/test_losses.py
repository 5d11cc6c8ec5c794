"""When a loss is told, from reports as Serve gives them; test_faults.py loses replicas of a real service."""

import itertools
from typing import Any

import pytest

from deployments.launch.losses import Losses

HEALTHY = {"status": "HEALTHY", "status_trigger": "UPSCALE_COMPLETED", "message": ""}
LOST = {"status": "UNHEALTHY", "status_trigger": "HEALTH_CHECK_FAILED", "message": "A replica's health check failed."}
STARTING = {"status": "UPDATING", "status_trigger": "CONFIG_UPDATE_STARTED", "message": ""}


def _not_started(cause: str, **others: str) -> dict[str, Any]:
    """Return the report of a stage that has no other replica, or with the status that it had before."""
    error = f"Traceback (most recent call last):\n  ...\nllava_core.errors.CheckpointError: {cause}"
    message = f"The deployment failed to start 2 times in a row. See controller logs for details. Error:\n{error}"
    return {"status": "UNHEALTHY", "status_trigger": "REPLICA_STARTUP_FAILED", "message": message, **others}


def test_a_loss_and_its_end_are_each_told_once() -> None:
    losses = Losses(itertools.count(10.0, 2.0).__next__)
    assert losses.news({"A": HEALTHY, "B": HEALTHY}) == []
    assert losses.news({"A": LOST, "B": HEALTHY}) == ["A has lost a replica; another one is starting."]
    assert losses.news({"A": LOST, "B": LOST}) == ["B has lost a replica; another one is starting."]
    assert losses.news({}) == []
    assert losses.news({"A": STARTING, "B": HEALTHY}) == ["B is complete again, after 2 s."]
    assert losses.news({"A": HEALTHY, "B": HEALTHY}) == ["A is complete again, after 6 s."]
    assert losses.news({"A": HEALTHY, "B": HEALTHY}) == []


def test_each_cause_that_no_replica_starts_is_told_once() -> None:
    losses = Losses(lambda: 0.0)
    assert len(losses.news({"A": LOST})) == 1
    assert losses.news({"A": _not_started("no file")}) == ["A could not start a replica: no file."]
    assert losses.news({"A": _not_started("no file")}) == []
    assert losses.news({"A": _not_started("half a file.")}) == ["A could not start a replica: half a file."]
    assert losses.news({"A": HEALTHY}) == ["A is complete again, after 0 s."]
    assert losses.news({"A": _not_started("no file")}) == ["A could not start a replica: no file."]


@pytest.mark.parametrize("before", [LOST, {"status": "UPSCALING", "status_trigger": "AUTOSCALING"}])
def test_a_cause_is_told_while_other_replicas_run(before: dict[str, str]) -> None:
    """Serve then keeps its reason for the status, and changes only the message."""
    losses = Losses(lambda: 0.0)
    report = {**before, "message": "A replica failed to start with exception. Retrying. Error:\nOSError: no file"}
    assert losses.news({"A": report})[-1] == "A could not start a replica: OSError: no file."
    assert losses.news({"A": HEALTHY}) == ["A is complete again, after 0 s."]


def test_processes_that_end_while_they_start_are_told_once() -> None:
    losses = Losses(lambda: 0.0)
    message = "The deployment failed to start {0} times in a row. Error:\nActorDiedError('The actor died: pid {0}')"
    told = [losses.news({"A": {**_not_started(""), "message": message.format(number)}}) for number in (1, 2)]
    assert told[0] == ["A could not start a replica: its process ended, or no node has room for it; see the logs."]
    assert told[1] == []


def test_a_stage_that_serve_has_given_up_needs_an_update() -> None:
    report = _not_started("no file", status="DEPLOY_FAILED")
    assert Losses().news({"A": report}) == ["A could not start a replica: no file. Send SIGHUP to try again."]


@pytest.mark.parametrize("status", ["UPSCALING", "DOWNSCALING", "UPDATING"])
def test_scaling_and_updates_are_no_losses(status: str) -> None:
    losses = Losses()
    assert losses.news({"A": {**HEALTHY, "status": status, "status_trigger": "AUTOSCALING"}}) == []
    assert losses.news({"A": HEALTHY}) == []
