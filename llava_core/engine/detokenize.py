"""Incremental detokenization: no text is released that a later token could change or a stop string remove.

Knows nothing about models or requests. Text once returned is never retracted.
"""

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
# The most tokens one character can take: in UTF-8 it has at most four bytes, and a token holds at least one.
MOST_OPEN = 4


class Decoder(Protocol):
    """Ids to text, special tokens left out."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids."""
        ...


class IncrementalDetokenizer:
    """The text of one answer as it grows. `is_stopped` becomes true at a stop string, which is not part of the text.

    Leading white space is dropped: it belongs to the prompt's last token, not to the answer. It is kept where the
    answer continues a text, whose last tokens are `before`: there it separates the two.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = (), before: Sequence[int] | None = None) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._ids: list[int] = list(before or ())
        # Ids before `_start` are settled; decoding from there, not from zero, keeps a long answer linear.
        self._start = 0
        self._read = len(self._ids)
        self._held = ""
        self._has_begun = before is not None
        self.is_stopped = False

    def add(self, token_id: int) -> str:
        """Add a token and return the text that is now final, possibly none."""
        self._ids.append(token_id)
        end = len(self._ids)
        settled = self._decoder.decode(self._ids[self._start : self._read])
        grown = self._decoder.decode(self._ids[self._start : end])
        if grown.endswith(_REPLACEMENT):
            if end - self._read <= MOST_OPEN:
                return ""
            # No character is that long: the earlier bytes are invalid, and no further token can complete them.
            end -= MOST_OPEN - 1
            grown = self._decoder.decode(self._ids[self._start : end])
        if len(grown) <= len(settled):
            return ""
        self._start, self._read = self._read, end
        return self._release(grown[len(settled) :])

    def finish(self) -> str:
        """Return the text still held back, once no token will follow."""
        if self.is_stopped:
            return ""
        settled = self._decoder.decode(self._ids[self._start : self._read])
        released = self._release(self._decoder.decode(self._ids[self._start :])[len(settled) :])
        rest, self._held, self._read = self._held, "", len(self._ids)
        return released + rest

    def _release(self, text: str) -> str:
        self._held += text
        if not self._has_begun:
            self._held = self._held.lstrip()
            self._has_begun = bool(self._held)
        found = [position for stop in self._stop if (position := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            released, self._held = self._held[: min(found)], ""
            return released
        keep = self._partial_stop_length()
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released

    def _partial_stop_length(self) -> int:
        """Length of the longest end of the held text that could begin a stop string."""
        longest = max((len(stop) for stop in self._stop), default=0) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
