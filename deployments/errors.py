"""Errors of the service that the core does not know: bodies too large, slow or compressed, invalid or unauthorised
keys, content that kills replicas, deadlines, stages lost or missing, failures of external workers or servers, failures
to start.

Plain exceptions on top of the core's tree, cheap to import and picklable in every process. Knows neither HTTP nor Ray.
"""

from llava_core.errors import LlavaError, OverloadedError, RequestError

# The stage of a loss that is either the preprocessor's or the vision encoder's.
EARLIER = "earlier"


class RequestTooLargeError(RequestError):
    """The body has more bytes than allowed."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "request_too_large") -> None:
        super().__init__(message, param=param, code=code)


class RequestTimeoutError(RequestError):
    """The body did not arrive in time."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "request_timeout") -> None:
        super().__init__(message, param=param, code=code)


class UnsupportedEncodingError(RequestError):
    """The body is compressed, or encoded in another way."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "unsupported_content_encoding") -> None:
        super().__init__(message, param=param, code=code)


class AuthenticationError(RequestError):
    """The request has no valid key."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_api_key") -> None:
        super().__init__(message, param=param, code=code)


class PermissionDeniedError(RequestError):
    """The key does not cover this route, or a worker's address is not an allowed one."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "permission_denied") -> None:
        super().__init__(message, param=param, code=code)


class RateLimitError(OverloadedError):
    """The key has used up its quota."""


class KeysFileError(LlavaError):
    """The file of API keys cannot be used; the message names the file and what is wrong."""


class ContentRefusedError(RequestError):
    """The request has a picture or prompt that has killed replicas."""

    def __init__(
        self,
        message: str = "the service has failed twice on this picture or prompt and does not try it again for some time",
        *,
        param: str | None = None,
        code: str = "content_refused",
    ) -> None:
        super().__init__(message, param=param, code=code)


class DeadlineError(LlavaError):
    """The answer was not complete within the timeout that its client set."""


class StageUnavailableError(LlavaError):
    """A stage has no replica that can take the request."""


class StageLostError(LlavaError):
    """The replica that worked on the request, or the result it produced, is lost; `stage` is for metrics."""

    def __init__(self, message: str, stage: str = EARLIER) -> None:
        super().__init__(message, stage)
        self.message = message
        self.stage = stage

    def __str__(self) -> str:
        return self.message


class StageSilentError(StageLostError):
    """The replica is silent: its host or the network to it has failed, which no content can cause."""

    def __init__(
        self,
        message: str = "the part of the service that works on this request is not responding",
        stage: str = EARLIER,
    ) -> None:
        super().__init__(message, stage)


class WorkerFailedError(LlavaError):
    """A registered worker (llava_protocol/) is unreachable or violates the protocol. `kind` is for metrics, `reason`
    for the log."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


class UpstreamError(LlavaError):
    """The server that answers for a model has failed. The message names model and cause, but no address."""

    def __init__(self, message: str, *, code: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.retry_after_s = retry_after_s


class UpstreamTimeoutError(UpstreamError):
    """The upstream server has not answered in time."""

    def __init__(self, message: str, *, code: str = "upstream_timeout", retry_after_s: int | None = None) -> None:
        super().__init__(message, code=code, retry_after_s=retry_after_s)


class UpstreamRefusedError(RequestError):
    """The upstream server has rejected the request; the message is its own, `status` that of its answer."""

    def __init__(self, message: str, *, status: int, param: str | None, code: str) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status


class LaunchError(LlavaError):
    """The service cannot be started as asked; the message says what to change."""
