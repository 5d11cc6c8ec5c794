"""Turns a stream's bytes into deltas as they arrive, and a premature end into an error.

Only a line feed ends a line: texts may contain other characters that Unicode counts as line breaks, at which httpx
would split. Reads nothing itself, so that both clients share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from llava_core.client.answers import Collector, Delta, Json, Reply, read_object
from llava_core.client.errors import AnswerInterruptedError, InvalidResponseError, error_details

# More than any chunk of an answer needs.
MAX_LINE_BYTES = 16 * 1024 * 1024


@dataclass
class StreamedAnswer:
    """The part of a streamed answer received so far. `is_done` once the service has sent `[DONE]`."""

    request_id: str | None = None
    is_done: bool = False
    _collector: Collector = field(init=False, repr=False)
    _held: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        self._collector = Collector(self.request_id)

    @property
    def reply(self) -> Reply:
        """The answer received so far, with usage and times once it has been read to its end."""
        return self._collector.reply()

    def feed(self, data: bytes) -> Iterator[Delta]:
        """Yield the deltas in these bytes. Raises AnswerInterruptedError for an error sent as an event."""
        *lines, self._held = (self._held + data).split(b"\n")
        if len(self._held) > MAX_LINE_BYTES:
            raise InvalidResponseError("the service sent an event that has no end", request_id=self.request_id)
        for line in lines:
            # Ignore comments, event names and ids, and blank lines.
            if not line.startswith(b"data:") or self.is_done:
                continue
            content = line.removeprefix(b"data:").strip()
            if content == b"[DONE]":
                self.is_done = True
            else:
                yield from self._read(read_object(content, self.request_id))

    def interrupted(self, message: str) -> AnswerInterruptedError:
        """The error for an answer that ends here."""
        return self._with_text(AnswerInterruptedError(message, request_id=self.request_id))

    def check_end(self) -> None:
        """Raise AnswerInterruptedError where the bytes ended before the answer did."""
        if not self.is_done:
            raise self.interrupted("the stream ended before the answer did")

    def _read(self, chunk: Json) -> list[Delta]:
        details = error_details(chunk)
        if details is not None:
            details["request_id"] = details["request_id"] or self.request_id
            raise self._with_text(AnswerInterruptedError(**details))
        return self._collector.add(chunk)

    def _with_text(self, error: AnswerInterruptedError) -> AnswerInterruptedError:
        error.text = self._collector.text
        return error
