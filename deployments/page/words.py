"""What a visitor reads: errors, worded as what to do about them, and the figures of an answer. Only text."""

from __future__ import annotations

import math
from collections.abc import Mapping

from llava_core.client import (
    AnswerInterruptedError,
    AuthenticationError,
    ConnectionFailedError,
    InvalidResponseError,
    PermissionDeniedError,
    RateLimitError,
    Reply,
    ServerError,
    ServiceError,
    TimeoutExceededError,
)
from llava_core.errors import LlavaError
from llava_core.views import ImageTransform

# The first row wins whose class matches, and whose status does if it names one. `said` is the service's own message.
_TOLD: tuple[tuple[type[ServiceError], int | None, str], ...] = (
    (
        ConnectionFailedError,
        None,
        "The service does not answer. It may still be starting; this page keeps looking for it.",
    ),
    (
        AuthenticationError,
        None,
        "The service needs an API key, or does not know the one it got. Enter yours in the settings.",
    ),
    (PermissionDeniedError, None, "This API key does not permit that. {said}"),
    (RateLimitError, None, "The service is busy. {said} Try again{after}."),
    (TimeoutExceededError, None, "The service took too long. Try again, or ask for fewer tokens."),
    (AnswerInterruptedError, None, "The answer broke off. {said} Regenerate it to try again."),
    (InvalidResponseError, None, "There is no such service at that address. Tell whoever runs this page."),
    (ServerError, 503, "The service is loading its model, or a part of it is being replaced. Try again{after}."),
    (ServerError, None, "The service has failed. {said} Try again; if it keeps failing, tell whoever runs it."),
    (ServiceError, 413, "That is too much for one request. {said} Send smaller or fewer pictures."),
)
# Advice on errors, by code, in addition to the service's message.
_ADVICE: Mapping[str, str] = {
    "context_length_exceeded": "Clear the conversation, or ask for fewer tokens.",
    "invalid_image": "Try another file: PNG, JPEG, WebP, GIF, BMP, TIFF or DICOM.",
    "content_refused": "It has brought the service down before. Leave the picture out.",
}


def in_words(error: LlavaError) -> str:
    """Describe an error in one or two sentences, with the request's id for the service's operator."""
    if not isinstance(error, ServiceError):
        return _sentence(str(error))
    told = _explain(error)
    return f"{told} (request {error.request_id})" if error.request_id else told


def _explain(error: ServiceError) -> str:
    said = _sentence(error.message)
    for kind, status, told in _TOLD:
        if isinstance(error, kind) and status in (None, error.status):
            return told.format(said=said, after=_after(error))
    return f"{said} {_ADVICE.get(error.code or '', '')}".strip()


def _after(error: ServiceError) -> str:
    if error.retry_after_s is None:
        return " in a moment"
    seconds = max(1, math.ceil(error.retry_after_s))
    return f" in {seconds} second{'s' if seconds > 1 else ''}"


def _sentence(text: str) -> str:
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}"


def figures(reply: Reply) -> str:
    """Return the cost of an answer in one line: tokens, their rate, and the time of each stage."""
    stages = dict(reply.stage_ms)
    told: list[str] = []
    if reply.usage is not None:
        written = reply.usage.completion_tokens
        told.append(f"{written} token{'' if written == 1 else 's'}")
        if written > 1 and stages.get("decode", 0) > 0:
            # The prefill writes the first token.
            told.append(f"{(written - 1) / stages['decode'] * 1e3:.0f} tokens/s")
    total = stages.pop("total", None)
    if total is not None:
        told.append(f"{_time(total)} in all")
    told += [f"{stage} {_time(milliseconds)}" for stage, milliseconds in stages.items()]
    if reply.finish_reason == "length":
        told.append("cut off at the token limit")
    told += [_transform(transform) for transform in reply.image_transforms if transform is not None]
    return " · ".join(told)


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1e3:.1f} s"


def _transform(transform: ImageTransform) -> str:
    window = transform.window
    seen = "" if window is None else f", window {window.centre:g}/{window.width:g}"
    return f"{transform.format} {transform.bits} bit{seen}"
