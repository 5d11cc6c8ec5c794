"""Tells when a running stage loses a replica, why no other can start, and when the stage is complete again.

Reads what Serve reports of its deployments. Does not know where it is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from deployments.launch.deploy_failures import starting_failure

# Serve's reason for a status after a loss, and its words in the message of a deployment where a replica does not start:
# as long as others run there, the reason stays as it was.
_LOST, _NOT_STARTED = "HEALTH_CHECK_FAILED", "failed to start"


class Losses:
    """Which stages lack replicas, since when, and why the last one could not start."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[str, float] = {}
        self._why: dict[str, str] = {}

    def news(self, deployments: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Return a sentence for each change since the last call. `deployments` are Serve's reports by name; one that is
        missing has not changed. A second loss in a stage that still lacks a replica is no change."""
        return [sentence for stage, reported in sorted(deployments.items()) for sentence in self._of(stage, reported)]

    def _of(self, stage: str, reported: Mapping[str, Any]) -> list[str]:
        if reported["status"] == "HEALTHY":
            self._why.pop(stage, None)
            if stage not in self._since:
                return []
            return [f"{stage} is complete again, after {self._clock() - self._since.pop(stage):.0f} s."]
        told = []
        if reported["status_trigger"] == _LOST and stage not in self._since:
            self._since[stage] = self._clock()
            told.append(f"{stage} has lost a replica; another one is starting.")
        if _NOT_STARTED in reported["message"]:
            why = starting_failure(reported["message"])
            if self._why.get(stage) != why:
                self._since.setdefault(stage, self._clock())
                self._why[stage] = why
                advice = " Send SIGHUP to try again." if reported["status"] == "DEPLOY_FAILED" else ""
                told.append(f"{stage} could not start a replica: {why.removesuffix('.')}.{advice}")
        return told
