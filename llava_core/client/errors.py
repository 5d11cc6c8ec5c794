"""The errors of requests to a service, as one tree under LlavaError.

    ServiceError
    ├── ConnectionFailedError      the service is unreachable, or the connection broke before there was an answer
    ├── TimeoutExceededError       no answer in time: by the client's clock, or 504 by the service's
    ├── AnswerInterruptedError     an answer that had begun was not finished; `text` is what was received of it
    ├── InvalidResponseError       a response that is not a chat completion
    ├── BadRequestError            400 and other 4xx: the request itself
    ├── AuthenticationError        401
    ├── PermissionDeniedError      403
    ├── NotFoundError              404
    ├── RateLimitError             429
    └── ServerError                5xx

Knows how errors look in JSON, and nothing about how they are transported.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from llava_core.errors import LlavaError

# Bytes quoted from a body that is not an error in OpenAI's format, such as a proxy's page.
_MAX_SHOWN = 300
# Worth a retry: the status says so itself, or the server working on the request has died.
_TEMPORARY = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE})


class ServiceError(LlavaError):
    """A request without a complete answer. `code` is stable, `param` names the field at fault, `request_id` identifies
    the request in the service's logs; each is None where unknown."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        names = {"status": self.status, "code": self.code, "param": self.param, "request": self.request_id}
        details = ", ".join(f"{name} {value}" for name, value in names.items() if value is not None)
        return f"{self.message} ({details})" if details else self.message

    @property
    def is_temporary(self) -> bool:
        """Whether retrying the same request may succeed soon."""
        return self.status in _TEMPORARY


class ConnectionFailedError(ServiceError):
    """The service is unreachable, or the connection broke before there was an answer."""

    @property
    def is_temporary(self) -> bool:
        """True: a service that is restarting is unreachable too."""
        return True


class TimeoutExceededError(ServiceError):
    """There was no complete answer in time."""


class AnswerInterruptedError(ServiceError):
    """An answer that had begun was not finished."""

    text = ""


class InvalidResponseError(ServiceError):
    """The response is not a chat completion."""


class BadRequestError(ServiceError):
    """The request cannot be answered as it stands."""


class AuthenticationError(ServiceError):
    """No key, or an unknown one."""


class PermissionDeniedError(ServiceError):
    """The key is not valid for this route."""


class NotFoundError(ServiceError):
    """No such model or path."""


class RateLimitError(ServiceError):
    """Too many requests at once."""


class ServerError(ServiceError):
    """The request failed inside the service."""


_BY_STATUS: dict[int, type[ServiceError]] = {
    HTTPStatus.UNAUTHORIZED: AuthenticationError,
    HTTPStatus.FORBIDDEN: PermissionDeniedError,
    HTTPStatus.NOT_FOUND: NotFoundError,
    HTTPStatus.TOO_MANY_REQUESTS: RateLimitError,
    HTTPStatus.GATEWAY_TIMEOUT: TimeoutExceededError,
}


def status_error(
    status: int, body: bytes, *, request_id: str | None = None, retry_after_s: float | None = None
) -> ServiceError:
    """The error for a response with a status other than 200."""
    details = error_details(body)
    if details is None:
        shown = body[:_MAX_SHOWN].decode(errors="replace").strip()
        details = {"message": f"the service answered {status}{': ' if shown else ''}{shown}"}
    details["request_id"] = details.get("request_id") or request_id
    return _kind(status)(**details, status=status, retry_after_s=retry_after_s)


def _kind(status: int) -> type[ServiceError]:
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return _BY_STATUS.get(status, ServerError)
    return _BY_STATUS.get(status, BadRequestError if status >= HTTPStatus.BAD_REQUEST else InvalidResponseError)


def error_details(body: bytes | dict[str, Any]) -> dict[str, Any] | None:
    """Message, code, param and request id of an error in OpenAI's format; None for anything else."""
    try:
        content = body if isinstance(body, dict) else json.loads(body)
    except ValueError:
        return None
    error = content.get("error") if isinstance(content, dict) else None
    if not error:
        return None
    if not isinstance(error, dict):
        error = {"message": error}
    found = {name: error.get(name) for name in ("code", "param")} | {"request_id": content.get("request_id")}
    texts = {name: None if value is None else str(value) for name, value in found.items()}
    return {"message": str(error.get("message") or "the service gave no reason"), **texts}
