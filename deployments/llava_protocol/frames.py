"""The protocol's stream: JSON objects with a zero byte behind each, every text holding all of those before it.

    {"text": "<the prompt as it came, and all of the answer so far>", "error_code": 0}

The bytes are the reference's: its spaces, its order, its escapes. What went wrong stands beside that, in fields that
its clients ignore. Knows no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from deployments.errors import StageLostError, StageUnavailableError, WorkerFailedError
from deployments.http_errors import describe, error_body
from llava_core.errors import UnknownNameError

SERVER_ERROR = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
LENGTH_EXCEEDED = "Exceeds max token length. Please start a new conversation, thanks."
END = b"\0"
# A prompt of the longest text there may be, every character of it escaped, and an answer.
MAX_FRAME_BYTES = 4 * 1024 * 1024


class ErrorCode(IntEnum):
    """The reference's."""

    OK = 0
    WORKER_FAILED = 1
    NO_WORKER = 2
    WORKER_UNREACHABLE = 3


@dataclass(frozen=True)
class Frame:
    """One object of the stream. `error` is what is behind an error of ours; a worker's own has none."""

    text: str
    error_code: int = ErrorCode.OK
    error: Exception | None = None


def error_frame(error: Exception) -> Frame:
    """What a client is told of it."""
    return Frame(SERVER_ERROR, _code(error), error)


def _code(error: Exception) -> ErrorCode:
    if isinstance(error, UnknownNameError):
        return ErrorCode.NO_WORKER
    if isinstance(error, WorkerFailedError | StageUnavailableError | StageLostError):
        return ErrorCode.WORKER_UNREACHABLE
    return ErrorCode.WORKER_FAILED


def encode(frame: Frame, request_id: str, *, explains: bool = False) -> bytes:
    """The bytes of a frame. `explains` puts an error's cause into the text as well, where people see it."""
    body: dict[str, object] = {"text": frame.text, "error_code": int(frame.error_code)}
    if frame.error is not None:
        error = describe(frame.error)
        message = error.message or ""
        if explains:
            body["text"] = f"{frame.text}\n\n{message}"
        # Also notes the error for metrics and the log.
        body |= {name: value for name, value in error_body(error, request_id).items() if name not in body}
    return json.dumps(body).encode() + END


class FrameReader:
    """Frames out of the bytes of a worker, in whatever pieces they come. Raises WorkerFailedError for what is none."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, piece: bytes) -> Iterator[Frame]:
        """Those that are whole by now."""
        self._held += piece
        while (end := self._held.find(END)) >= 0:
            content = bytes(self._held[:end])
            del self._held[: end + 1]
            yield _parse(content)
        if len(self._held) > MAX_FRAME_BYTES:
            raise WorkerFailedError("garbage", f"a frame has more than {MAX_FRAME_BYTES} bytes")

    def finish(self) -> None:
        """Nothing follows."""
        if self._held:
            raise WorkerFailedError("cut_off", "the stream ends inside a frame")


def _parse(content: bytes) -> Frame:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise WorkerFailedError("garbage", "a frame is no JSON") from None
    text, code = (value.get("text"), value.get("error_code")) if isinstance(value, dict) else (None, None)
    if not isinstance(text, str) or not isinstance(code, int) or isinstance(code, bool):
        raise WorkerFailedError("garbage", "a frame has no text, or no number for an error_code")
    return Frame(text, code)
