"""The protocol's stream: JSON objects, each followed by a zero byte, each with the whole text so far.

    {"text": "<the prompt as it came, and all of the answer so far>", "error_code": 0}

The bytes match the reference's, down to spaces, order and escapes. Details of an error are in additional fields, which
its clients ignore. Knows no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from deployments.errors import StageLostError, StageUnavailableError, WorkerFailedError
from deployments.http.errors import describe, error_body
from llava_core.errors import UnknownNameError

SERVER_ERROR = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
LENGTH_EXCEEDED = "Exceeds max token length. Please start a new conversation, thanks."
END = b"\0"
# Enough for the longest allowed prompt with every character escaped, and an answer.
MAX_FRAME_BYTES = 4 * 1024 * 1024


class ErrorCode(IntEnum):
    """The reference's codes."""

    OK = 0
    WORKER_FAILED = 1
    NO_WORKER = 2
    WORKER_UNREACHABLE = 3


@dataclass(frozen=True)
class Frame:
    """One object of the stream. `error` is the cause of an error of ours; a worker's own error has none."""

    text: str
    error_code: int = ErrorCode.OK
    error: Exception | None = None


def error_frame(error: Exception) -> Frame:
    """Build the frame that reports an error to a client."""
    return Frame(SERVER_ERROR, _code(error), error)


def _code(error: Exception) -> ErrorCode:
    if isinstance(error, UnknownNameError):
        return ErrorCode.NO_WORKER
    if isinstance(error, WorkerFailedError | StageUnavailableError | StageLostError):
        return ErrorCode.WORKER_UNREACHABLE
    return ErrorCode.WORKER_FAILED


def encode(frame: Frame, request_id: str, *, explains: bool = False) -> bytes:
    """Encode a frame. `explains` also puts an error's cause into the text, where people see it."""
    body: dict[str, object] = {"text": frame.text, "error_code": int(frame.error_code)}
    if frame.error is not None:
        error = describe(frame.error)
        message = error.message or ""
        if explains:
            body["text"] = f"{frame.text}\n\n{message}"
        # error_body also records the error for metrics and the log.
        body |= {name: value for name, value in error_body(error, request_id).items() if name not in body}
    return json.dumps(body).encode() + END


class FrameReader:
    """Parses frames from a worker's bytes, however they are split. Raises WorkerFailedError for an invalid frame."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, piece: bytes) -> Iterator[Frame]:
        """Yield the frames that are complete so far."""
        self._held += piece
        while (end := self._held.find(END)) >= 0:
            content = bytes(self._held[:end])
            del self._held[: end + 1]
            yield _parse(content)
        if len(self._held) > MAX_FRAME_BYTES:
            raise WorkerFailedError("garbage", f"a frame has more than {MAX_FRAME_BYTES} bytes")

    def finish(self) -> None:
        """Mark the end of the stream. Raises WorkerFailedError inside a frame."""
        if self._held:
            raise WorkerFailedError("cut_off", "the stream ends inside a frame")


def _parse(content: bytes) -> Frame:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise WorkerFailedError("garbage", "a frame is not JSON") from None
    text, code = (value.get("text"), value.get("error_code")) if isinstance(value, dict) else (None, None)
    if not isinstance(text, str) or not isinstance(code, int) or isinstance(code, bool):
        raise WorkerFailedError("garbage", "a frame lacks a text or a numeric error_code")
    return Frame(text, code)
