"""Errors of the service that the core does not know: bodies too large or slow, stages lost or missing, a start refused.

Plain exceptions on top of the core's tree, which every process can afford and pickle. Knows neither HTTP nor Ray.
"""

from llava_core.errors import LlavaError, RequestError


class RequestTooLargeError(RequestError):
    """The body has more bytes than allowed."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "request_too_large") -> None:
        super().__init__(message, param=param, code=code)


class RequestTimeoutError(RequestError):
    """The body did not come in time."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "request_timeout") -> None:
        super().__init__(message, param=param, code=code)


class StageUnavailableError(LlavaError):
    """A stage has no replica that could take the request."""


class StageLostError(LlavaError):
    """The replica that worked on the request, or what it made, is gone."""


class LaunchError(LlavaError):
    """The service cannot be started as asked; the message says what to change."""
