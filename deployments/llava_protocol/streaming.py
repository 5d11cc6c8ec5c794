"""From an answer to the protocol's stream: items of our own graph, or a worker's frames, become bytes as they arrive.

While nothing is new, the last frame is repeated as a keep-alive, because clients time out after a few seconds. Imports
neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response

from deployments.errors import DeadlineError, RequestTimeoutError, RequestTooLargeError, UnsupportedEncodingError
from deployments.http.errors import describe, error_response
from deployments.http.request_context import current_request
from deployments.llava_protocol.frames import LENGTH_EXCEEDED, Frame, encode, error_frame
from deployments.llava_protocol.generation import Echo
from deployments.messages import Item, Rejected, is_last
from deployments.openai_api.responding import PieceStream, first_of
from llava_core.errors import LlavaError, OverloadedError, PromptTooLongError

# Not a text type, which a proxy might buffer by lines.
MEDIA_TYPE = "application/octet-stream"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
# The reference's controller gives up after 5 s of silence, its page after 10.
_BEAT_S = 3.0
# Errors that the reference has no counterpart of and clients may retry: they get an HTTP status of their own.
REFUSALS = (OverloadedError, RequestTooLargeError, RequestTimeoutError, UnsupportedEncodingError, DeadlineError)


async def from_items(echo: Echo, items: AsyncGenerator[Item, None]) -> AsyncGenerator[Frame, None]:
    """Yield the frames of an answer of ours. The items must always come to an end."""
    answer = ""
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Rejected):
                yield _rejected(echo, item.error)
                continue
            answer += item.text
            if item.text or is_last(item):
                yield Frame(echo.text(answer))


def _rejected(echo: Echo, error: Exception) -> Frame:
    if not isinstance(error, PromptTooLongError):
        return error_frame(error)
    current_request().error_code = error.code
    return too_long(echo)


def too_long(echo: Echo) -> Frame:
    """Return the frame for a prompt that is too long. The reference treats that as an answer, not as an error."""
    return Frame(echo.prompt + LENGTH_EXCEEDED)


async def told(frames: AsyncGenerator[Frame, None]) -> AsyncGenerator[Frame, None]:
    """Yield the frames; an error that they raise becomes the last frame."""
    async with aclosing(frames):
        try:
            async for frame in frames:
                yield frame
        except LlavaError as error:
            yield error_frame(error)


async def respond(
    echo: Echo, frames: AsyncGenerator[Frame, None], request_id: str, *, explains: bool, beat_s: float = _BEAT_S
) -> Response:
    """Return the streamed response; there must be at least one frame. One of REFUSALS as the first frame becomes an
    HTTP error instead."""
    first = await first_of(frames, beat_s)
    refusal = first.result().error if first.done() else None
    if isinstance(refusal, REFUSALS):
        await frames.aclose()
        return error_response(describe(refusal), request_id)
    said = encode(Frame(echo.prompt), request_id)

    async def pieces() -> AsyncGenerator[bytes, None]:
        nonlocal said
        said = encode(await first, request_id, explains=explains)
        yield said
        async for frame in frames:
            said = encode(frame, request_id, explains=explains)
            yield said

    return PieceStream(pieces(), first, frames, beat_s, sign=lambda: said, media_type=MEDIA_TYPE, headers=_HEADERS)
