"""Answers as values, assembled from OpenAI's JSON, whole or chunk by chunk.

Validates untrusted JSON: anything that is not a chat completion is an InvalidResponseError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llava_core.client.errors import InvalidResponseError
from llava_core.types import Usage
from llava_core.views import ImageTransform, Window

Json = dict[str, Any]


@dataclass(frozen=True)
class Logprob:
    """A token as text, the natural logarithm of its probability, its bytes, and alternatives, likeliest first."""

    token: str
    logprob: float
    bytes: bytes | None = None
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Delta:
    """An increment of an answer; `index` tells the answers of one request apart."""

    text: str
    index: int = 0
    finish_reason: str | None = None
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Choice:
    """One answer. `finish_reason` is `stop` or `length`, None where reading stopped before its end."""

    text: str
    finish_reason: str | None = None
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Reply:
    """All answers to a request, several with the option `n`, and their cost.

    `stage_ms` has milliseconds by stage. `image_transforms` has each picture's transform, if requested; None for a
    picture whose stored values are the values seen. `request_id` identifies the request in the service's logs.
    """

    choices: tuple[Choice, ...]
    usage: Usage | None = None
    stage_ms: Mapping[str, float] = field(default_factory=dict)
    image_transforms: tuple[ImageTransform | None, ...] = ()
    model: str = ""
    id: str = ""
    request_id: str | None = None

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        """The first answer's finish reason."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[Logprob, ...]:
        """The first answer's log-probabilities."""
        return self.choices[0].logprobs


class Collector:
    """Assembles chunks. A whole completion counts as one chunk."""

    def __init__(self, request_id: str | None = None) -> None:
        self._request_id = request_id
        self._choices: dict[int, list[Delta]] = {}
        self._head: dict[str, str] = {}
        self._usage: Usage | None = None
        self._stage_ms: dict[str, float] = {}
        self._transforms: tuple[ImageTransform | None, ...] = ()

    def add(self, chunk: Json) -> list[Delta]:
        """Add a chunk and return its deltas. Raises InvalidResponseError."""
        try:
            deltas = [_read_choice(choice) for choice in chunk["choices"]]
            self._head |= {name: str(chunk[name]) for name in ("id", "model") if chunk.get(name)}
            self._usage = _read_usage(chunk.get("usage")) or self._usage
            self._stage_ms |= {str(stage): float(ms) for stage, ms in (chunk.get("timings") or {}).items()}
            self._transforms += tuple(map(_read_transform, chunk.get("image_transforms") or ()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            shown = json.dumps(chunk)[:200]
            raise InvalidResponseError(
                f"the response is not a chat completion: {shown}", request_id=self._request_id
            ) from error
        for delta in deltas:
            self._choices.setdefault(delta.index, []).append(delta)
        return deltas

    @property
    def text(self) -> str:
        """The first answer's text so far."""
        return "".join(delta.text for delta in self._choices.get(0, ()))

    def reply(self) -> Reply:
        """Everything received so far."""
        choices = tuple(_in_one(self._choices[index]) for index in sorted(self._choices)) or (Choice(""),)
        return Reply(choices, self._usage, self._stage_ms, self._transforms, **self._head, request_id=self._request_id)


def read_object(data: bytes, request_id: str | None = None) -> Json:
    """Parse a JSON object. Raises InvalidResponseError for anything else."""
    try:
        content = json.loads(data)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        shown = data[:200].decode(errors="replace")
        raise InvalidResponseError(f"the response is not a JSON object: {shown!r}", request_id=request_id)
    return content


def read_reply(body: bytes, request_id: str | None = None) -> Reply:
    """Parse a completion that was sent as a whole. Raises InvalidResponseError."""
    collector = Collector(request_id)
    if not collector.add(read_object(body, request_id)):
        raise InvalidResponseError("the service sent a completion without an answer", request_id=request_id)
    return collector.reply()


def read_models(body: bytes) -> list[str]:
    """The names in a list of models. Raises InvalidResponseError."""
    try:
        return [str(model["id"]) for model in read_object(body)["data"]]
    except (LookupError, TypeError) as error:
        raise InvalidResponseError("the response is not a list of models") from error


def _in_one(deltas: list[Delta]) -> Choice:
    reasons = [delta.finish_reason for delta in deltas if delta.finish_reason is not None]
    logprobs = tuple(logprob for delta in deltas for logprob in delta.logprobs)
    return Choice("".join(delta.text for delta in deltas), reasons[-1] if reasons else None, logprobs)


def _read_choice(choice: Json) -> Delta:
    piece = choice["delta"] if "delta" in choice else choice["message"]
    logprobs = (choice.get("logprobs") or {}).get("content") or ()
    reason = choice.get("finish_reason")
    return Delta(
        # Some servers send null for no text.
        _text(piece.get("content") or ""),
        int(choice.get("index", 0)),
        None if reason is None else _text(reason),
        tuple(map(_read_logprob, logprobs)),
    )


def _read_logprob(entry: Json) -> Logprob:
    spelled = entry.get("bytes")
    alternatives = tuple(map(_read_logprob, entry.get("top_logprobs") or ()))
    return Logprob(
        _text(entry["token"]), float(entry["logprob"]), None if spelled is None else bytes(spelled), alternatives
    )


def _read_usage(usage: Json | None) -> Usage | None:
    if usage is None:
        return None
    details = usage.get("prompt_tokens_details") or {}
    parts = (int(details.get(name) or 0) for name in ("image_tokens", "cached_tokens"))
    return Usage(int(usage["prompt_tokens"]), int(usage["completion_tokens"]), *parts)


def _read_transform(entry: Json | None) -> ImageTransform | None:
    if entry is None:
        return None
    read = dict(entry)
    if read.get("window") is not None:
        read["window"] = Window(**read["window"])
    if read.get("rescale") is not None:
        read["rescale"] = tuple(read["rescale"])
    return ImageTransform(**read)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text is wanted, not {type(value).__name__}")
    return value
