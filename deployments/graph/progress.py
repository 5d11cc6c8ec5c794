"""How far a request's answers have come: what another replica needs to resume them.

Only token ids, 8 bytes each: text, log-probabilities and any output that a replica still held back follow from them.
Knows neither stages nor formats.
"""

from __future__ import annotations

from array import array

from llava_core.types import BegunAnswer, TokenDelta


class Progress:
    """The tokens of `num_answers` answers. Every delta given to `note` must have been passed on to the client."""

    def __init__(self, num_answers: int) -> None:
        self._tokens = [array("q") for _ in range(num_answers)]
        self._are_over = [False] * num_answers

    def note(self, delta: TokenDelta) -> None:
        """Adds a delta to the answer it belongs to."""
        self._tokens[delta.index].extend(delta.token_ids)
        self._are_over[delta.index] |= delta.finish_reason is not None

    @property
    def begun(self) -> tuple[BegunAnswer, ...]:
        """Each answer as it is now; empty where none of them has a token yet."""
        if not any(self._tokens):
            return ()
        # Copies, because the originals keep growing.
        return tuple(BegunAnswer(ids[:], is_over) for ids, is_over in zip(self._tokens, self._are_over, strict=True))
