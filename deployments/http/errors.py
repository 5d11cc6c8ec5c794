"""Errors as HTTP: one table from exception class to status, type and code, and one body, OpenAI's, for all of them.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}, "request_id": ...}

Client errors carry the exception's own message; server errors carry a fixed one, so that nothing internal leaks.
Knows no routes, and nothing about Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from deployments.errors import (
    AuthenticationError,
    ContentRefusedError,
    DeadlineError,
    KeysFileError,
    PermissionDeniedError,
    RateLimitError,
    RequestTimeoutError,
    RequestTooLargeError,
    StageLostError,
    StageUnavailableError,
    UnsupportedEncodingError,
    UpstreamError,
    UpstreamRefusedError,
    UpstreamTimeoutError,
    WorkerFailedError,
)
from deployments.http.request_context import current_request
from llava_core.errors import EngineError, LlavaError, OverloadedError, RequestError, UnknownNameError


@dataclass(frozen=True)
class HttpError:
    """The error as a client sees it. `message` None is replaced by the exception's own."""

    status: int
    type: str
    code: str | None
    message: str | None = None
    param: str | None = None
    retry_after_s: int | None = None
    # The limit that was exhausted, for the metrics.
    limit: str | None = None

    @property
    def is_unexpected(self) -> bool:
        """Whether only the log says what happened."""
        return self.status == HTTPStatus.INTERNAL_SERVER_ERROR

    def at(self, param: str | None) -> HttpError:
        """The same error, for another field."""
        return replace(self, param=param)


_UNAVAILABLE = "a stage of the service is not available; try again"
_NO_KEYS = "keys cannot be checked at the moment; try again later"
_WORKER_FAILED = "the registered worker that has this model does not answer correctly; try again"
_LOST = "the part of the service that worked on this request was lost; try again"
# Characters of an unknown path that its error repeats.
_SHOWN_PATH = 100
_TOO_LATE = "the answer was not complete within x-request-timeout-seconds"

# The first row whose class matches wins; RequestErrors have their own code and param.
TABLE: tuple[tuple[type[BaseException], HttpError], ...] = (
    (RequestTooLargeError, HttpError(413, "invalid_request_error", "request_too_large")),
    (RequestTimeoutError, HttpError(408, "invalid_request_error", "request_timeout")),
    (UnsupportedEncodingError, HttpError(415, "invalid_request_error", "unsupported_content_encoding")),
    (AuthenticationError, HttpError(401, "invalid_request_error", "invalid_api_key")),
    (PermissionDeniedError, HttpError(403, "invalid_request_error", "permission_denied")),
    (UnknownNameError, HttpError(404, "invalid_request_error", "not_found")),
    (ContentRefusedError, HttpError(422, "invalid_request_error", "content_refused")),
    (RequestError, HttpError(400, "invalid_request_error", "invalid_value")),
    (RateLimitError, HttpError(429, "requests", "rate_limit_exceeded", retry_after_s=1)),
    (OverloadedError, HttpError(429, "overloaded_error", "overloaded", retry_after_s=1)),
    (KeysFileError, HttpError(503, "server_error", "keys_unavailable", _NO_KEYS, retry_after_s=5)),
    (StageUnavailableError, HttpError(503, "server_error", "unavailable", _UNAVAILABLE, retry_after_s=5)),
    (StageLostError, HttpError(503, "server_error", "replica_lost", _LOST, retry_after_s=1)),
    (WorkerFailedError, HttpError(502, "server_error", "worker_failed", _WORKER_FAILED)),
    (DeadlineError, HttpError(504, "server_error", "deadline_exceeded", _TOO_LATE)),
    (UpstreamTimeoutError, HttpError(504, "server_error", "upstream_timeout")),
    (UpstreamError, HttpError(502, "server_error", "upstream_failed")),
    (EngineError, HttpError(500, "server_error", "engine_error", "the answer could not be generated")),
    (LlavaError, HttpError(500, "server_error", "internal_error", "the request failed inside the service")),
    (Exception, HttpError(500, "server_error", "internal_error", "the request failed inside the service")),
)


def describe(error: BaseException) -> HttpError:
    """The table's row for this error, with the error's own message, code and hints where it has them."""
    row = next(row for kind, row in TABLE if isinstance(error, kind))
    if isinstance(error, UpstreamError):
        # Its message is written for clients, unlike those of other server errors.
        return replace(row, message=error.message, code=error.code, retry_after_s=error.retry_after_s)
    if isinstance(error, UpstreamRefusedError):
        row = replace(row, status=error.status)
    if isinstance(error, RequestError):
        return replace(row, message=error.message, param=error.param, code=error.code)
    if isinstance(error, RateLimitError):
        # As OpenAI does: its clients read the code.
        row = replace(row, type=error.limit)
    if isinstance(error, OverloadedError):
        return replace(row, message=error.message, retry_after_s=error.retry_after_s, limit=error.limit)
    return row


def describe_http(error: HTTPException, method: str, path: str) -> HttpError:
    """A routing error: unknown path, or method not allowed."""
    status = HTTPStatus(error.status_code)
    shown = path if len(path) <= _SHOWN_PATH else f"{path[:_SHOWN_PATH]}..."
    messages = {
        HTTPStatus.NOT_FOUND: f"there is no route {shown}; GET /openapi.json lists them all",
        HTTPStatus.METHOD_NOT_ALLOWED: f"{method} is not allowed for {shown}",
    }
    code = status.phrase.lower().replace(" ", "_")
    return HttpError(status, "invalid_request_error", code, messages.get(status, error.detail))


def error_body(error: HttpError, request_id: str) -> dict[str, Any]:
    """The body that all errors share. Every body made is sent to a client, so this records it for metrics and log."""
    request = current_request()
    request.error_code, request.limit = error.code, error.limit
    content = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return {**request.error_extras, "error": content, "request_id": request_id}


def error_response(error: HttpError, request_id: str) -> JSONResponse:
    """The response to a request that failed before its answer began."""
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error, request_id), error.status, headers)
