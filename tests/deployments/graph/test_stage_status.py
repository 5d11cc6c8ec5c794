"""The controller's status of the stages: queried rarely, with bounded waiting. test_faults.py kills replicas."""

import asyncio
import threading
from collections.abc import Callable

import pytest
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger, ReplicaState
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatusOverview, ServeStatus

from deployments.graph.stage_status import StageStatus, name_for_clients

STAGES = {"preprocessor": "Preprocessor", "generator": "Generator"}


def _overview(status: str, **replicas: int) -> DeploymentStatusOverview:
    states = {ReplicaState(name): count for name, count in replicas.items()}
    return DeploymentStatusOverview(DeploymentStatus(status), DeploymentStatusTrigger.UNSPECIFIED, states, "")


def _status(generator: DeploymentStatusOverview | None) -> ServeStatus:
    deployments = {"Preprocessor": _overview("HEALTHY", RUNNING=1)}
    if generator is not None:
        deployments["Generator"] = generator
    application = ApplicationStatusOverview(ApplicationStatus.RUNNING, "", 0.0, deployments)
    return ServeStatus(applications={"llava": application})


def _ready(ask: Callable[[], ServeStatus], **options: float) -> dict[str, bool]:
    stages = asyncio.run(StageStatus("llava", STAGES, ask=ask, **options)())
    return {stage.name: stage.is_ready for stage in stages}


@pytest.mark.parametrize(
    ("generator", "is_ready"),
    [
        (_overview("HEALTHY", RUNNING=2), True),
        (_overview("UPSCALING", RUNNING=1, STARTING=1), True),
        (_overview("UNHEALTHY", RUNNING=1, STARTING=1), True),
        (_overview("HEALTHY"), True),
        (_overview("UNHEALTHY", STARTING=1), False),
        (_overview("UPDATING", STARTING=1), False),
        (_overview("UNHEALTHY", RUNNING=0), False),
        (None, False),
    ],
)
def test_a_stage_is_ready_with_a_running_replica_or_if_none_is_wanted(
    generator: DeploymentStatusOverview | None, *, is_ready: bool
) -> None:
    assert _ready(lambda: _status(generator)) == {"preprocessor": True, "generator": is_ready}


@pytest.mark.parametrize(
    ("generator", "is_ready", "has_replicas"),
    [
        (_overview("HEALTHY"), True, False),
        (_overview("UPSCALING", STARTING=1), True, False),
        (_overview("DOWNSCALING", STOPPING=1), True, False),
        (_overview("UPSCALING", RUNNING=1, STARTING=1), True, True),
        (_overview("UPDATING", STARTING=1), False, True),
        (_overview("UNHEALTHY", STARTING=1), False, True),
        (_overview("DEPLOY_FAILED"), False, True),
    ],
)
def test_a_stage_that_may_be_empty_is_ready_while_its_first_replica_starts(
    generator: DeploymentStatusOverview, *, is_ready: bool, has_replicas: bool
) -> None:
    status = StageStatus("llava", STAGES, may_be_empty={"Generator"}, ask=lambda: _status(generator))
    _, stage = asyncio.run(status())
    assert (stage.is_ready, stage.has_replicas) == (is_ready, has_replicas)


@pytest.mark.parametrize(
    ("deployment", "name"),
    [
        ("Preprocessor", "preprocessor"),
        ("VisionEncoder", "vision_encoder"),
        ("Generator", "generator"),
        ("VisionEncoder-scenes-llava", "vision_encoder-scenes-llava"),
        ("Generator-a", "generator-a"),
    ],
)
def test_a_models_own_stage_is_named_after_the_model(deployment: str, name: str) -> None:
    assert name_for_clients(deployment) == name


def test_no_stage_of_a_missing_application_is_ready() -> None:
    assert _ready(ServeStatus) == {"preprocessor": False, "generator": False}


def test_a_failing_or_silent_controller_means_not_ready(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> ServeStatus:
        raise RayError("no controller")

    assert _ready(fail) == {"preprocessor": False, "generator": False}
    may_end = threading.Event()

    async def hang() -> list[bool]:
        status = StageStatus("llava", STAGES, ask=lambda: ServeStatus() if may_end.wait(10) else None, timeout_s=0.01)  # type: ignore[arg-type,return-value]
        try:
            return [stage.is_ready for stage in await status()]
        finally:
            may_end.set()

    assert asyncio.run(hang()) == [False, False]
    assert "did not report the stages" in caplog.text


def test_concurrent_queries_share_one_call_and_its_answer_expires() -> None:
    asked: list[int] = []

    def ask() -> ServeStatus:
        asked.append(1)
        return _status(None)

    async def several(max_age_s: float) -> int:
        asked.clear()
        status = StageStatus("llava", STAGES, ask=ask, max_age_s=max_age_s)
        await asyncio.gather(*(status() for _ in range(5)))
        await status()
        return len(asked)

    assert asyncio.run(several(60.0)) == 1
    assert asyncio.run(several(0.0)) == 2
