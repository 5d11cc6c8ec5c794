"""Which stages can serve, as Serve's controller sees it: it watches every replica and is told by their `check_health`.

Asked off the event loop and at most once in a while. No stage is called, so nothing waits behind requests.
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

# How Serve calls a deployment without replicas while the first one starts, or the last one goes.
_SCALED_TO_ZERO = ("HEALTHY", "UPSCALING", "DOWNSCALING")
_NAMES = {"Preprocessor": "preprocessor", "VisionEncoder": "vision_encoder", "Generator": "generator"}


def name_for_clients(deployment: str) -> str:
    """What /health calls a stage. Of several of a kind, a deployment has the name of its model behind a dash."""
    kind, dash, model = deployment.partition("-")
    return f"{_NAMES[kind]}{dash}{model}"


class StageStatus:
    """Callable for the state of `stages`: names for clients to names of deployments of the application.

    Those deployments that `may_be_empty` are ready without a replica: a request waits while one starts. An answer of
    the controller serves everybody who asks within `max_age_s` of the question.
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
        # Not the loop's own threads: those may be busy with bodies.
        self._thread = ThreadPoolExecutor(1, "stage-status")
        self._answer: asyncio.Future[ServeStatus] | None = None
        self._asked_at = 0.0

    async def __call__(self) -> list[StageHealth]:
        """Stages are not ready when the controller does not say so in time."""
        try:
            async with asyncio.timeout(self._timeout_s):
                status = await asyncio.shield(self._latest())
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("Serve's controller did not say how the stages are: %s: %s", type(error).__name__, error)
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
        # Of a deployment that was just made, say the controller's rounds.
        return StageHealth(name, is_ready=deployment.status == "HEALTHY")

    def _latest(self) -> asyncio.Future[ServeStatus]:
        now = time.monotonic()
        if self._answer is None or (self._answer.done() and now - self._asked_at > self._max_age_s):
            self._asked_at = now
            self._answer = asyncio.get_running_loop().run_in_executor(self._thread, self._ask)
        return self._answer
