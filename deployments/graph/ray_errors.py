"""Translates what Ray, Serve and gRPC raise when a call between stages fails into the service's own errors.

So only the files that make such calls need to know Ray. Errors that a stage itself has raised pass unchanged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

from grpc.aio import AioRpcError
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)

from deployments.errors import StageLostError, StageUnavailableError
from llava_core.errors import OverloadedError

logger = logging.getLogger(__name__)

# Serve translates gRPC's UNAVAILABLE itself; a replica killed in the middle of an answer shows as other statuses, too.
_LOST = (ReplicaUnavailableError, RayActorError, ObjectLostError, OutOfMemoryError, AioRpcError)


@contextmanager
def ray_errors_as_ours(stage: str) -> Iterator[None]:
    """A context manager around a block that calls this stage or reads its answer."""
    try:
        yield
    except BackPressureError as error:
        retry_after_s = max(1, math.ceil(error.retry_after_s or 0))
        raise OverloadedError(
            "the service is at its capacity; try again later", limit="queue", retry_after_s=retry_after_s
        ) from error
    except DeploymentUnavailableError as error:
        raise StageUnavailableError("a stage of the service is not available") from error
    except (*_LOST, RayServeException) as error:
        # A stage waiting for another's result gets the loss of that as the cause of a general error.
        if not isinstance(error, _LOST) and not isinstance(error.__cause__, _LOST):
            raise
        logger.warning("a call to a stage (%s) failed: %s: %s", stage, type(error).__name__, error)
        raise StageLostError("the part of the service that worked on this request was lost", stage) from error
