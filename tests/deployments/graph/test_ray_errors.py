"""Exceptions of calls between stages become errors of ours; a stage's own errors stay unchanged."""

import pickle

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, OutOfMemoryError
from ray.serve.config import DeploymentID
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)

from deployments.errors import StageLostError, StageUnavailableError
from deployments.graph.ray_errors import ray_errors_as_ours
from llava_core.errors import LlavaError, OverloadedError, RequestError


def _raised(error: Exception) -> Exception:
    try:
        with ray_errors_as_ours("generator"):
            raise error
    except (LlavaError, ArithmeticError) as ours:
        return ours


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ActorDiedError(), StageLostError),
        (ActorUnavailableError("gone", b"\0" * 16), StageLostError),
        (ObjectLostError("0" * 56, None, ""), StageLostError),
        (OutOfMemoryError("killed"), StageLostError),
        (ReplicaUnavailableError("gone"), StageLostError),
        *(
            (AioRpcError(code, Metadata(), Metadata()), StageLostError)
            for code in (StatusCode.UNKNOWN, StatusCode.INTERNAL)
        ),
        (DeploymentUnavailableError(DeploymentID(name="x")), StageUnavailableError),
        (BackPressureError(1, 1), OverloadedError),
    ],
)
def test_each_kind_of_error_is_translated_into_ours(error: Exception, expected: type[Exception]) -> None:
    ours = _raised(error)
    assert type(ours) is expected
    assert ours.__cause__ is error
    if isinstance(ours, StageLostError):
        assert (ours.stage, pickle.loads(pickle.dumps(ours)).stage) == ("generator", "generator")
        assert str(ours) == "the part of the service that worked on this request was lost"


def test_the_loss_of_an_upstream_stage_is_a_loss() -> None:
    """Serve reports it with its own error class."""
    error = RayServeException("an upstream actor died")
    error.__cause__ = ActorDiedError()
    assert type(_raised(error)) is StageLostError
    with pytest.raises(RayServeException), ray_errors_as_ours("generator"):
        raise RayServeException("something else")


def test_overload_keeps_its_retry_after() -> None:
    for given, expected in ((None, 1), (0.2, 1), (2.5, 3)):
        error = _raised(BackPressureError(1, 1, 503, given))
        assert isinstance(error, OverloadedError)
        assert error.retry_after_s == expected


@pytest.mark.parametrize("error", [RequestError("bad"), ZeroDivisionError("oops")])
def test_a_stages_own_error_is_passed_on(error: Exception) -> None:
    assert _raised(error) is error
