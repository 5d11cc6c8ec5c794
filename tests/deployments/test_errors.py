"""Errors of the service survive the transfer between processes."""

import pickle

import pytest

from deployments.errors import (
    AuthenticationError,
    KeysFileError,
    PermissionDeniedError,
    RateLimitError,
    RequestTimeoutError,
    RequestTooLargeError,
    StageLostError,
    StageUnavailableError,
    UpstreamError,
    UpstreamRefusedError,
    UpstreamTimeoutError,
    WorkerFailedError,
)


@pytest.mark.parametrize(
    "error",
    [
        RequestTooLargeError("m", param="p"),
        RequestTimeoutError("m"),
        AuthenticationError("m", code="c"),
        PermissionDeniedError("m"),
        RateLimitError("m", limit="tokens", retry_after_s=7),
        KeysFileError("m"),
        StageUnavailableError("m"),
        StageLostError("m"),
        WorkerFailedError("kind", "reason"),
        UpstreamError("m", code="c", retry_after_s=3),
        UpstreamTimeoutError("m"),
        UpstreamRefusedError("m", status=422, param="p", code="c"),
    ],
)
def test_pickling_keeps_class_message_and_fields(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
