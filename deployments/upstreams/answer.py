"""Another server's answer: validated, and turned into our items and into the client's response.

Choices, their contents and token counts stay as they came; the head is ours, and only the top-level fields of OpenAI's
answers are passed on. Knows no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic_core import from_json

from deployments.messages import UpstreamDelta
from deployments.openai_api.reply_form import ReplyForm
from deployments.openai_api.response_parts import Json, extensions
from deployments.openai_api.sampling_schema import WHOLE_BOUND
from deployments.openai_api.schema import Part
from llava_core.types import TokenDelta, Usage

_PASSED_ON = ("object", "created", "choices", "usage", "system_fingerprint", "service_tier")
_Count = Annotated[int, Field(ge=0, lt=WHOLE_BOUND)]


class NoAnswerError(ValueError):
    """The server did not send a valid answer; the message says what it sent, without quoting it."""


class _CachedTokens(Part):
    cached_tokens: _Count | None = None


class _Usage(Part):
    prompt_tokens: _Count
    completion_tokens: _Count | None = None
    prompt_tokens_details: _CachedTokens | None = None


class _Choice(Part):
    index: _Count
    finish_reason: str | None = None
    delta: dict[str, Any] | None = None
    message: dict[str, Any] | None = None
    text: str | None = None


class _Content(Part):
    choices: list[_Choice]
    usage: _Usage | None = None


@dataclass(frozen=True)
class UpstreamAnswer:
    """Formats an upstream's items for the client. `completion_id` and `model` identify the answer here; `chunk_kind` is
    the `object` of a chunk that this service adds."""

    completion_id: str
    model: str
    form: ReplyForm
    chunk_kind: str
    started: float = field(default_factory=time.perf_counter)

    def first_chunks(self) -> Iterator[Json]:
        """None: the server sends its own."""
        return iter(())

    def chunks(self, delta: TokenDelta) -> Iterator[Json]:
        """The server's chunk; at the end also the extensions that this service was asked for."""
        assert isinstance(delta, UpstreamDelta)
        more = {} if delta.usage is None else extensions(self.form, delta, self.started)
        if delta.body is not None:
            yield delta.body | more
        elif more:
            head = {"id": self.completion_id, "created": int(time.time()), "model": self.model, "choices": []}
            yield head | {"object": self.chunk_kind} | more

    def completion(self, deltas: Sequence[TokenDelta]) -> Json:
        """The whole answer, which came in one piece."""
        [whole] = deltas
        assert isinstance(whole, UpstreamDelta)
        assert whole.body is not None
        return whole.body | extensions(self.form, whole, self.started)


class AnswerReader:
    """Reads one answer. `part` is the field with the content of its choices: `delta`, `message` or `text`."""

    def __init__(self, answer: UpstreamAnswer, part: str) -> None:
        self._answer = answer
        self._part = part
        self._num_tokens = 0
        self._usage: _Usage | None = None
        self._last: Json | None = None
        self._has_begun = False

    def chunk(self, content: Json) -> UpstreamDelta | None:
        """Reads a piece of a stream; None for its usage, which is kept for the end. Raises NoAnswerError."""
        read = self._checked(content)
        body = self._body(content)
        if not read.choices and read.usage is not None:
            self._last = body
            return None
        if not self._answer.form.include_usage:
            body.pop("usage", None)
        self._has_begun |= bool(read.choices)
        grown = sum(_has_grown(choice) for choice in read.choices)
        self._num_tokens += grown
        index = read.choices[0].index if read.choices else 0
        return UpstreamDelta("", "", index=index, body=body, num_tokens=grown)

    def end(self, **known: Any) -> UpstreamDelta:
        """The last item of a stream, with its token counts and the fields `known`. Raises NoAnswerError."""
        if not self._has_begun:
            raise NoAnswerError("a stream without an answer")
        body = self._last if self._answer.form.include_usage else None
        usage = self._counts()
        left = max(0, usage.completion_tokens - self._num_tokens)
        return UpstreamDelta("", "", usage=usage, body=body, num_tokens=left, **known)

    def whole(self, content: Json, **known: Any) -> UpstreamDelta:
        """Reads an answer in one piece, adding the fields `known`. Raises NoAnswerError."""
        read = self._checked(content)
        if not read.choices:
            raise NoAnswerError("an answer without choices")
        self._num_tokens = sum(_has_grown(choice) for choice in read.choices)
        usage = self._counts()
        return UpstreamDelta("", "", usage=usage, body=self._body(content), num_tokens=usage.completion_tokens, **known)

    def _checked(self, content: Json) -> _Content:
        try:
            read = _Content.model_validate(content)
        except ValidationError as error:
            where = ".".join(str(step) for step in error.errors(include_input=False)[0]["loc"][:4])
            raise NoAnswerError(f"an answer that is wrong at {where}") from None
        if any(getattr(choice, self._part) is None for choice in read.choices):
            raise NoAnswerError(f"a choice without {self._part}")
        self._usage = read.usage or self._usage
        return read

    def _body(self, content: Json) -> Json:
        head = {"id": self._answer.completion_id, "model": self._answer.model}
        return head | {name: content[name] for name in _PASSED_ON if name in content}

    def _counts(self) -> Usage:
        """The server's token counts; without them, our own count of what came."""
        if self._usage is None:
            return Usage(0, self._num_tokens)
        details = self._usage.prompt_tokens_details
        cached = (details.cached_tokens if details else None) or 0
        written = self._usage.completion_tokens
        return Usage(self._usage.prompt_tokens, self._num_tokens if written is None else written, cached_tokens=cached)


def read_object(data: bytes) -> Json:
    """Parses a JSON object. Raises NoAnswerError."""
    try:
        content = from_json(data, allow_inf_nan=False)
    except ValueError:
        raise NoAnswerError("something that is not JSON") from None
    if not isinstance(content, dict):
        raise NoAnswerError("JSON that is no object")
    return content


def _has_grown(choice: _Choice) -> bool:
    said = choice.delta or choice.message or {"text": choice.text}
    return any(value for name, value in said.items() if name != "role")
