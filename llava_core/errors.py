"""Every error this project raises on purpose, as one tree; the HTTP layer maps each class to a status and a code.

    LlavaError
    ├── RequestError               the caller's mistake: 4xx; carries `param` and `code`
    │   ├── ImageError             a picture that cannot be used
    │   ├── PromptTooLongError     prompt and answer do not fit the context
    │   └── UnknownNameError       a name that is not registered; lists those that are
    ├── CheckpointError            a checkpoint that is missing, incomplete or not understood
    ├── OverloadedError            refused now, may be retried
    └── EngineError                generation failed through no fault of the caller

Standard library only. Messages may be shown to a client: they never contain prompts, pictures or keys.
"""

from __future__ import annotations

from collections.abc import Iterable

# Characters of the caller's own text that a message quotes at most.
MAX_REPEATED = 100


class LlavaError(Exception):
    """Base of every deliberate error."""

    def __reduce__(self) -> tuple[object, ...]:
        # Ray pickles exceptions; by default, unpickling would call the class with only the message.
        return _rebuild, (type(self), self.args, vars(self))


def _rebuild(cls: type[LlavaError], args: tuple[object, ...], fields: dict[str, object]) -> LlavaError:
    error = cls.__new__(cls, *args)
    vars(error).update(fields)
    return error


class RequestError(LlavaError):
    """A request that cannot be served as it stands. `param` names the offending field; `code` is stable."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ImageError(RequestError):
    """A picture that cannot be decoded or exceeds a limit."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_image") -> None:
        super().__init__(message, param=param, code=code)


class PromptTooLongError(RequestError):
    """The prompt, with its image tokens, leaves no room for an answer."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "context_length_exceeded") -> None:
        super().__init__(message, param=param, code=code)


class UnknownNameError(RequestError):
    """A name that is not in a registry."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, param: str | None = None) -> None:
        message = f"unknown {kind} {name[:MAX_REPEATED]!r}; known are: {', '.join(sorted(known))}"
        super().__init__(message, param=param or kind, code=f"{kind}_not_found")


class CheckpointError(LlavaError):
    """A checkpoint that is missing, incomplete or of an unsupported layout; the message names the file and the fix."""


class OverloadedError(LlavaError):
    """No room for another request now; `limit` names the exhausted limit, `retry_after_s` is a hint in seconds."""

    def __init__(self, message: str, *, limit: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.limit = limit
        self.retry_after_s = retry_after_s


class EngineError(LlavaError):
    """Generation failed; this request ends, others continue."""
