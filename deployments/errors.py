"""Errors of the service that the core does not know: bodies too large or slow, keys that are not good for what they are
used for, content that kills, deadlines, stages lost or missing, workers or servers of others that fail, no start.

Plain exceptions on top of the core's tree, which every process can afford and pickle. Knows neither HTTP nor Ray.
"""

from llava_core.errors import LlavaError, OverloadedError, RequestError

# The stage of what is lost where the first two are not told apart.
EARLIER = "earlier"


class RequestTooLargeError(RequestError):
    """The body has more bytes than allowed."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "request_too_large") -> None:
        super().__init__(message, param=param, code=code)


class RequestTimeoutError(RequestError):
    """The body did not come in time."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "request_timeout") -> None:
        super().__init__(message, param=param, code=code)


class AuthenticationError(RequestError):
    """The request comes with no key that is good now."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_api_key") -> None:
        super().__init__(message, param=param, code=code)


class PermissionDeniedError(RequestError):
    """The key is good, but not for this."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "permission_denied") -> None:
        super().__init__(message, param=param, code=code)


class RateLimitError(OverloadedError):
    """The key has used up what it may."""


class KeysFileError(LlavaError):
    """The file of API keys cannot be used; the message names file and fix."""


class ContentRefusedError(RequestError):
    """The request is about something that has killed a replica twice."""

    def __init__(
        self,
        message: str = "the service has failed twice on this picture or prompt and does not try it again for some time",
        *,
        param: str | None = None,
        code: str = "content_refused",
    ) -> None:
        super().__init__(message, param=param, code=code)


class DeadlineError(LlavaError):
    """The answer was not complete when its client said that it would be too late."""


class StageUnavailableError(LlavaError):
    """A stage has no replica that could take the request."""


class StageLostError(LlavaError):
    """The replica that worked on the request, or what it made, is gone; `stage` is for metrics."""

    def __init__(self, message: str, stage: str = EARLIER) -> None:
        super().__init__(message, stage)
        self.message = message
        self.stage = stage

    def __str__(self) -> str:
        return self.message


class StageSilentError(StageLostError):
    """Nothing is heard of the replica, so its host or the way there is gone, which no content does."""

    def __init__(
        self,
        message: str = "the part of the service that works on this request is not heard of",
        stage: str = EARLIER,
    ) -> None:
        super().__init__(message, stage)


class WorkerFailedError(LlavaError):
    """A registered worker (llava_protocol/) is not there, or does not keep to the protocol. `kind` is for metrics,
    `reason` for the log."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


class UpstreamError(LlavaError):
    """The server that answers for a model has failed. The message names model and cause, and no address."""

    def __init__(self, message: str, *, code: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.retry_after_s = retry_after_s


class UpstreamTimeoutError(UpstreamError):
    """It has not answered in time."""

    def __init__(self, message: str, *, code: str = "upstream_timeout", retry_after_s: int | None = None) -> None:
        super().__init__(message, code=code, retry_after_s=retry_after_s)


class UpstreamRefusedError(RequestError):
    """It finds fault with the request, in words of its own; `status` is of its answer."""

    def __init__(self, message: str, *, status: int, param: str | None, code: str) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status


class LaunchError(LlavaError):
    """The service cannot be started as asked; the message says what to change."""
