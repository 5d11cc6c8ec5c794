"""Answers to completions in OpenAI's form: text, and log-probabilities in four lists with each token's text offset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from deployments.openai_api.chat_response import LEAST_LOGPROB
from deployments.openai_api.response_parts import Answer, Json
from llava_core.types import TokenDelta


@dataclass(frozen=True)
class CompletionAnswer(Answer):
    """A `text_completion`, whose chunks are of the same kind."""

    id_prefix: ClassVar[str] = "cmpl-"
    kind: ClassVar[str] = "text_completion"
    chunk_kind: ClassVar[str] = "text_completion"

    # Characters of each answer's tokens so far.
    _offsets: dict[int, int] = field(default_factory=lambda: defaultdict(int), repr=False)

    def choice(self, whole: TokenDelta) -> Json:
        """The choice with the whole text."""
        return {
            "index": whole.index,
            "text": whole.text,
            "finish_reason": whole.finish_reason,
            "logprobs": self._logprobs(whole),
        }

    def first_chunks(self) -> Iterator[Json]:
        """None: completions have no roles."""
        return iter(())

    def grown(self, delta: TokenDelta) -> Iterator[Json]:
        """The new text, and the finish reason."""
        if delta.text or delta.logprobs or delta.finish_reason is not None:
            yield self.chunk(self.choice(delta))

    def _logprobs(self, delta: TokenDelta) -> Json | None:
        if not delta.logprobs:
            return None
        tokens = [_name(delta.token_bytes[each.token]) for each in delta.logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[delta.index])
            self._offsets[delta.index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [max(each.logprob, LEAST_LOGPROB) for each in delta.logprobs],
            "top_logprobs": [
                {
                    _name(delta.token_bytes[token]): max(logprob, LEAST_LOGPROB)
                    for token, logprob in [*each.top, (each.token, each.logprob)]
                }
                for each in delta.logprobs
            ],
            "text_offset": offsets,
        }


def _name(spelled: bytes) -> str:
    """The token's text or, as with OpenAI, its bytes if they are not text: different tokens need different keys."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
