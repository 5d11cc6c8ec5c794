"""Answers to chats in OpenAI's form: messages, their deltas, and log-probabilities by token with text and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from deployments.openai_api.response_parts import Answer, Json
from llava_core.types import FinishReason, TokenDelta

# OpenAI's value for a practically impossible token; JSON has no infinity.
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class ChatAnswer(Answer):
    """A `chat.completion`."""

    id_prefix: ClassVar[str] = "chatcmpl-"
    kind: ClassVar[str] = "chat.completion"
    chunk_kind: ClassVar[str] = "chat.completion.chunk"

    def choice(self, whole: TokenDelta) -> Json:
        """The choice with the whole message."""
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        return {
            "index": whole.index,
            "message": message,
            "finish_reason": whole.finish_reason,
            "logprobs": _logprobs(whole),
        }

    def first_chunks(self) -> Iterator[Json]:
        """The role of each answer, before any text."""
        for index in range(self.form.num_answers):
            yield self._delta(index, {"role": "assistant", "content": ""})

    def grown(self, delta: TokenDelta) -> Iterator[Json]:
        """The new text, then the finish reason."""
        if delta.text or delta.logprobs:
            yield self._delta(delta.index, {"content": delta.text}, logprobs=_logprobs(delta))
        if delta.finish_reason is not None:
            yield self._delta(delta.index, {}, finish_reason=delta.finish_reason)

    def _delta(
        self, index: int, content: Json, *, finish_reason: FinishReason | None = None, logprobs: Json | None = None
    ) -> Json:
        choice = {"index": index, "delta": content, "finish_reason": finish_reason, "logprobs": logprobs}
        return self.chunk(choice)


def _logprobs(delta: TokenDelta) -> Json | None:
    """An entry for each generated token, including the one that ended the answer."""
    if not delta.logprobs:
        return None
    content = [
        _token(delta, each.token, each.logprob)
        | {"top_logprobs": [_token(delta, token, logprob) for token, logprob in each.top]}
        for each in delta.logprobs
    ]
    return {"content": content, "refusal": None}


def _token(delta: TokenDelta, token: int, logprob: float) -> Json:
    spelled = delta.token_bytes[token]
    text = spelled.decode("utf-8", errors="replace")
    return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(spelled)}
