"""Which stages can serve, according to Serve's controller, which polls `check_health` of every replica.

The controller is asked off the event loop, and its answer is cached for a short while. No stage is called, so a health
check never queues behind requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import DeploymentStatusOverview, ServeStatus

from deployments.messages import StageHealth

logger = logging.getLogger(__name__)

# Serve's statuses for a deployment without replicas: idle, starting its first one, or stopping its last one.
_SCALED_TO_ZERO = ("HEALTHY", "UPSCALING", "DOWNSCALING")
_NAMES = {"Preprocessor": "preprocessor", "VisionEncoder": "vision_encoder", "Generator": "generator"}


def name_for_clients(deployment: str) -> str:
    """The name of a stage in /health. Where there are several of a kind, the model's name follows a dash."""
    kind, dash, model = deployment.partition("-")
    return f"{_NAMES[kind]}{dash}{model}"


class StageStatus:
    """Callable that returns the state of `stages`, a mapping from names for clients to deployments of the application.

    A deployment in `may_be_empty` is ready without a replica: a request waits while one starts. The controller's answer
    is reused for `max_age_s`.
    """

    def __init__(
        self,
        application: str,
        stages: Mapping[str, str],
        *,
        may_be_empty: Collection[str] = (),
        max_age_s: float = 1.0,
        timeout_s: float = 5.0,
        ask: Callable[[], ServeStatus] = serve.status,
    ) -> None:
        self._application = application
        self._stages = stages
        self._may_be_empty = frozenset(may_be_empty)
        self._max_age_s = max_age_s
        self._timeout_s = timeout_s
        self._ask = ask
        # A thread of its own: the loop's default executor may be busy parsing bodies.
        self._thread = ThreadPoolExecutor(1, "stage-status")
        self._answer: asyncio.Future[ServeStatus] | None = None
        self._asked_at = 0.0

    async def __call__(self) -> list[StageHealth]:
        """Reports every stage as not ready when the controller does not answer within `timeout_s`."""
        try:
            async with asyncio.timeout(self._timeout_s):
                status = await asyncio.shield(self._latest())
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("Serve's controller did not report the stages: %s: %s", type(error).__name__, error)
            return [StageHealth(name, is_ready=False) for name in self._stages]
        application = status.applications.get(self._application)
        deployments = {} if application is None else application.deployments
        return [self._health(name, stage, deployments.get(stage)) for name, stage in self._stages.items()]

    def _health(self, name: str, stage: str, deployment: DeploymentStatusOverview | None) -> StageHealth:
        if deployment is None:
            return StageHealth(name, is_ready=False)
        if any(count and state == "RUNNING" for state, count in deployment.replica_states.items()):
            return StageHealth(name, is_ready=True)
        if stage in self._may_be_empty and deployment.status in _SCALED_TO_ZERO:
            return StageHealth(name, is_ready=True, has_replicas=False)
        # A deployment that was just created has no replica states until the controller's next round.
        return StageHealth(name, is_ready=deployment.status == "HEALTHY")

    def _latest(self) -> asyncio.Future[ServeStatus]:
        now = time.monotonic()
        if self._answer is None or (self._answer.done() and now - self._asked_at > self._max_age_s):
            self._asked_at = now
            self._answer = asyncio.get_running_loop().run_in_executor(self._thread, self._ask)
        return self._answer
