"""Every deliberate error has one status, type and code, and nothing internal gets out."""

import re

import pytest
from starlette.exceptions import HTTPException

from deployments.errors import (
    AuthenticationError,
    ContentRefusedError,
    DeadlineError,
    KeysFileError,
    LaunchError,
    PermissionDeniedError,
    RateLimitError,
    RequestTimeoutError,
    RequestTooLargeError,
    StageLostError,
    StageUnavailableError,
    UnsupportedEncodingError,
)
from deployments.http.errors import TABLE, describe, describe_http, error_body, error_response
from llava_core import errors
from llava_core.errors import (
    CheckpointError,
    EngineError,
    ImageError,
    LlavaError,
    OverloadedError,
    PromptTooLongError,
    RequestError,
    UnknownNameError,
)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("m", param="p", code="c"), 400, "c"),
        (ImageError("m"), 400, "invalid_image"),
        (PromptTooLongError("m"), 400, "context_length_exceeded"),
        (UnknownNameError("model", "x", ["y"]), 404, "model_not_found"),
        (RequestTooLargeError("m"), 413, "request_too_large"),
        (RequestTimeoutError("m"), 408, "request_timeout"),
        (UnsupportedEncodingError("m"), 415, "unsupported_content_encoding"),
        (AuthenticationError("m"), 401, "invalid_api_key"),
        (AuthenticationError("m", code="expired_api_key"), 401, "expired_api_key"),
        (PermissionDeniedError("m"), 403, "permission_denied"),
        (ContentRefusedError(), 422, "content_refused"),
        (DeadlineError("m"), 504, "deadline_exceeded"),
        (OverloadedError("m", limit="engine"), 429, "overloaded"),
        (RateLimitError("m", limit="tokens"), 429, "rate_limit_exceeded"),
        (KeysFileError("m"), 503, "keys_unavailable"),
        (StageLostError("m"), 503, "replica_lost"),
        (StageUnavailableError("m"), 503, "unavailable"),
        (EngineError("m"), 500, "engine_error"),
        (CheckpointError("m"), 500, "internal_error"),
        (LlavaError("m"), 500, "internal_error"),
        (ZeroDivisionError("m"), 500, "internal_error"),
    ],
)
def test_each_error_has_a_status_and_a_code(error: Exception, status: int, code: str) -> None:
    described = describe(error)
    assert (described.status, described.code) == (status, code)


def test_every_deliberate_error_has_a_row_itself_or_through_a_base() -> None:
    def subclasses(cls: type) -> list[type]:
        return [found for child in cls.__subclasses__() for found in (child, *subclasses(child))]

    modules = ("llava_core.errors", "deployments.errors")
    deliberate = [cls for cls in subclasses(errors.LlavaError) if cls.__module__ in modules]
    rows = {kind for kind, _ in TABLE} - {LlavaError, Exception}
    unmapped = {cls for cls in deliberate if not rows & set(cls.__mro__)}
    # Both end the start of a service, so they reach no client.
    assert unmapped == {CheckpointError, LaunchError}, "these end as internal errors; add a row or name them here"


def test_a_clients_mistake_keeps_its_message() -> None:
    described = describe(ImageError("the image is empty", param="messages[0].content[0].image_url"))
    body = error_body(described, "abc")
    assert body == {
        "error": {
            "message": "the image is empty",
            "type": "invalid_request_error",
            "param": "messages[0].content[0].image_url",
            "code": "invalid_image",
        },
        "request_id": "abc",
    }


def test_internal_details_are_not_revealed() -> None:
    body = error_body(describe(RuntimeError("secret /path/to/weights")), "abc")
    assert "secret" not in str(body)
    assert "secret" not in str(error_body(describe(EngineError("secret")), "abc"))
    assert "secret" not in str(error_body(describe(KeysFileError("secret")), "abc"))


def test_overload_has_a_retry_after_header() -> None:
    assert (
        error_response(describe(OverloadedError("full", limit="engine", retry_after_s=7)), "x").headers["retry-after"]
        == "7"
    )
    assert error_response(describe(StageUnavailableError("m")), "x").headers["retry-after"] == "5"
    assert "retry-after" not in error_response(describe(RequestError("m")), "x").headers


def test_a_rate_limit_error_names_the_limit_and_has_retry_after() -> None:
    response = error_response(describe(RateLimitError("m", limit="tokens", retry_after_s=7)), "x")
    assert response.headers["retry-after"] == "7"
    assert b'"type":"tokens"' in response.body


def test_a_missing_key_is_answered_with_www_authenticate() -> None:
    assert error_response(describe(AuthenticationError("m")), "x").headers["www-authenticate"] == "Bearer"
    assert "www-authenticate" not in error_response(describe(PermissionDeniedError("m")), "x").headers


def test_routing_errors_look_the_same() -> None:
    described = describe_http(HTTPException(405), "GET", "/tokenize")
    assert (described.status, described.code) == (405, "method_not_allowed")
    assert described.message == "GET is not allowed for /tokenize"
    described = describe_http(HTTPException(404), "GET", "/" + "x" * 1000)
    assert (described.status, described.code) == (404, "not_found")
    assert re.fullmatch(r"there is no route /x{99}\.\.\.; GET /openapi\.json lists them all", described.message)
