"""Tells when a running stage loses a replica, why no other can start, and when it has all of them again.

Reads what Serve reports of its deployments. Knows not where it is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from deployments.deploy_failures import cause

# Serve's reasons for a deployment's status. It keeps trying to start a replica, unless that status is _FAILED.
_LOST, _NOT_STARTED, _FAILED = "HEALTH_CHECK_FAILED", "REPLICA_STARTUP_FAILED", "DEPLOY_FAILED"


class Losses:
    """Which stages lack replicas, since when, and the last known cause that none could start."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[str, float] = {}
        self._causes: dict[str, str] = {}

    def news(self, deployments: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Return a sentence for each change since the last call. `deployments` are Serve's reports by name; one that is
        missing has not changed. A second loss in a stage that still lacks a replica is no change."""
        told: list[str] = []
        for stage, reported in sorted(deployments.items()):
            status, trigger = reported["status"], reported["status_trigger"]
            if trigger == _LOST and stage not in self._since:
                self._since[stage] = self._clock()
                told.append(f"{stage} has lost a replica; another one is starting.")
            elif trigger == _NOT_STARTED and status != _FAILED:
                self._since.setdefault(stage, self._clock())
                why = cause(reported["message"])
                if self._causes.get(stage) != why:
                    self._causes[stage] = why
                    told.append(f"{stage} could not start a replica, and tries again: {why}")
            elif status == "HEALTHY" and stage in self._since:
                seconds = self._clock() - self._since.pop(stage)
                self._causes.pop(stage, None)
                told.append(f"{stage} has all its replicas again, after {seconds:.1f} s.")
        return told
