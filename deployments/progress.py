"""What a request's answers have come to so far, as far as another replica needs it to go on with them.

Token ids alone, 8 bytes each: text, log-probabilities and whatever a replica still held back follow from them. Knows
neither stages nor formats.
"""

from __future__ import annotations

from array import array

from llava_core.types import BegunAnswer, TokenDelta


class Progress:
    """Of `num_answers` answers. Everything that `note` was told must have been passed on to the client."""

    def __init__(self, num_answers: int) -> None:
        self._tokens = [array("q") for _ in range(num_answers)]
        self._are_over = [False] * num_answers

    def note(self, delta: TokenDelta) -> None:
        """One of the answers has grown."""
        self._tokens[delta.index].extend(delta.token_ids)
        self._are_over[delta.index] |= delta.finish_reason is not None

    @property
    def begun(self) -> tuple[BegunAnswer, ...]:
        """Each of the answers as it is now; none of them where there is nothing of any."""
        if not any(self._tokens):
            return ()
        # Copies, because these go on growing.
        return tuple(BegunAnswer(ids[:], is_over) for ids, is_over in zip(self._tokens, self._are_over, strict=True))
