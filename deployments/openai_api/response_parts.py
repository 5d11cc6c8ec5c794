"""What answers to chats and completions have in common: the head, the choices by index, token counts and times.

Plain dictionaries from plain values. Knows nothing about HTTP or how the answer came about.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from deployments.openai_api.reply_form import ReplyForm
from llava_core.types import StageTimes, TokenDelta, Usage

Json = dict[str, Any]
OWNER = "llava-serve"


@dataclass(frozen=True)
class Answer(ABC):
    """Builds all parts of one reply. `started` is by time.perf_counter(), for the total time."""

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    completion_id: str
    model: str
    form: ReplyForm = field(default_factory=ReplyForm)
    created: int = field(default_factory=lambda: int(time.time()))
    started: float = field(default_factory=time.perf_counter)

    @abstractmethod
    def choice(self, whole: TokenDelta) -> Json:
        """The choice for one complete answer."""

    @abstractmethod
    def first_chunks(self) -> Iterator[Json]:
        """The first chunks of a stream."""

    @abstractmethod
    def grown(self, delta: TokenDelta) -> Iterator[Json]:
        """The chunks for what one answer has gained, and for how it ended."""

    def completion(self, deltas: Sequence[TokenDelta]) -> Json:
        """The whole reply; the last delta must carry `usage`."""
        by_index: dict[int, list[TokenDelta]] = {}
        for delta in deltas:
            by_index.setdefault(delta.index, []).append(delta)
        body = self._head(self.kind)
        body["choices"] = [self.choice(_in_one(by_index[index])) for index in sorted(by_index)]
        body["usage"] = usage_body(_usage(deltas[-1]))
        return body | extensions(self.form, deltas[-1], self.started)

    def chunks(self, delta: TokenDelta) -> Iterator[Json]:
        """The chunks that one delta adds to the stream; for the last delta also the usage."""
        if delta.usage is None:
            yield from self.grown(delta)
            return
        *others, last = self.grown(delta)
        yield from others
        if not self.form.include_usage:
            yield last | extensions(self.form, delta, self.started)
            return
        yield last
        total = self._head(self.chunk_kind) | {"choices": [], "usage": usage_body(delta.usage)}
        yield total | extensions(self.form, delta, self.started)

    def chunk(self, choice: Json) -> Json:
        """A chunk with one choice."""
        body = self._head(self.chunk_kind) | {"choices": [choice]}
        return body | {"usage": None} if self.form.include_usage else body

    def _head(self, kind: str) -> Json:
        return {
            "id": self.completion_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }


def extensions(form: ReplyForm, last: TokenDelta, started: float) -> Json:
    """The requested fields that OpenAI's answers do not have."""
    asked: Json = {}
    if form.timings:
        # `total` is measured by the gateway, and includes time that no stage counts as its own.
        times: StageTimes = last.stage_ms | {"total": (time.perf_counter() - started) * 1e3}
        asked["timings"] = {stage: round(value, 3) for stage, value in times.items()}
    if form.image_transforms:
        asked["image_transforms"] = [each and asdict(each) for each in last.transforms]
    return asked


def usage_body(usage: Usage) -> Json:
    """Token counts; image tokens and cached tokens are part of the prompt's."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"image_tokens": usage.image_tokens, "cached_tokens": usage.cached_tokens},
    }


def model_body(name: str, created: int) -> Json:
    """One entry of the list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": OWNER}


def _in_one(deltas: Sequence[TokenDelta]) -> TokenDelta:
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        token_bytes={token: spelled for delta in deltas for token, spelled in delta.token_bytes.items()},
    )


def _usage(last: TokenDelta) -> Usage:
    assert last.usage is not None, "the last delta of a reply carries its usage"
    return last.usage
