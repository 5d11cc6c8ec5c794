"""Answers in OpenAI's form: the completion in one piece, the chunks of a stream, the list of models.

Plain dictionaries from plain values. Knows nothing about HTTP or how the answer came about.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llava_core.types import FinishReason, StageTimes, TokenDelta, Usage

Json = dict[str, Any]
OWNER = "llava-serve"


@dataclass(frozen=True)
class Answer:
    """What all parts of one answer have in common. `started` is of the monotonic clock, for the total time."""

    completion_id: str
    model: str
    include_usage: bool = False
    timings: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    started: float = field(default_factory=time.perf_counter)

    def completion(self, deltas: list[TokenDelta]) -> Json:
        """The whole answer; the last delta must carry `finish_reason` and `usage`."""
        last = deltas[-1]
        message = {"role": "assistant", "content": "".join(delta.text for delta in deltas), "refusal": None}
        body = self._head("chat.completion")
        body["choices"] = [{"index": 0, "message": message, "finish_reason": last.finish_reason, "logprobs": None}]
        body["usage"] = usage_body(_usage(last))
        return body | self._timings(last)

    def first_chunk(self) -> Json:
        """Says who speaks, before anything is said."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunks(self, delta: TokenDelta) -> Iterator[Json]:
        """What one delta adds to the stream; after the last one, also how it ended and what it cost."""
        if delta.text:
            yield self._chunk({"content": delta.text})
        if delta.finish_reason is None:
            return
        end = self._chunk({}, delta.finish_reason)
        if not self.include_usage:
            yield end | self._timings(delta)
            return
        yield end
        total = self._head("chat.completion.chunk") | {"choices": [], "usage": usage_body(_usage(delta))}
        yield total | self._timings(delta)

    def _chunk(self, content: Json, finish_reason: FinishReason | None = None) -> Json:
        body = self._head("chat.completion.chunk")
        body["choices"] = [{"index": 0, "delta": content, "finish_reason": finish_reason, "logprobs": None}]
        return body | {"usage": None} if self.include_usage else body

    def _head(self, kind: str) -> Json:
        return {
            "id": self.completion_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _timings(self, last: TokenDelta) -> Json:
        """Milliseconds by stage; `total` is what the gateway saw, and holds what no stage counts as its own."""
        if not self.timings:
            return {}
        times: StageTimes = last.stage_ms | {"total": (time.perf_counter() - self.started) * 1e3}
        return {"timings": {stage: round(value, 3) for stage, value in times.items()}}


def usage_body(usage: Usage) -> Json:
    """Token counts; image tokens are part of the prompt's."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"image_tokens": usage.image_tokens, "cached_tokens": usage.cached_tokens},
    }


def model_body(name: str, created: int) -> Json:
    """One entry of the list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": OWNER}


def _usage(last: TokenDelta) -> Usage:
    assert last.usage is not None, "the last delta of an answer carries its usage"
    return last.usage
