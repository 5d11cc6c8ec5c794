"""What is asked: options by name, and the bytes of a request. Knows OpenAI's fields, and sends nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from llava_core.client.messages import Json, message_json
from llava_core.types import Message

CHAT = "/v1/chat/completions"
_HEALTH_S = 10.0


class Options(TypedDict, total=False):
    """Of an answer; docs/serving.md says what each does. What is left out is the service's own default.

    `deadline_s` bounds the whole answer, further attempts included, and is told to the service, which stops in time.
    `timings` is True where it is left out; a server that refuses fields it does not know wants False. `extra` holds
    fields that are not named here.
    """

    model: str
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    n: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[str, float]
    logprobs: bool
    top_logprobs: int
    timings: bool
    image_transforms: bool
    deadline_s: float
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """One request, ready to be sent as often as it takes."""

    method: str
    path: str
    content: bytes | None = field(default=None, repr=False)
    deadline_s: float | None = None


def chat_body(messages: Sequence[Message], system: str | None = None, **options: Any) -> Json:
    """The JSON of a chat."""
    spoken = [message_json(message) for message in messages]
    if system is not None:
        spoken.insert(0, {"role": "system", "content": system})
    return {"messages": spoken, **options}


def chat_call(messages: Sequence[Message], system: str | None, options: Options, *, stream: bool) -> Call:
    """A request for an answer in one piece, or as a stream that ends with what it cost."""
    fields: dict[str, Any] = {"timings": True, **options}
    deadline_s, extra = fields.pop("deadline_s", None), fields.pop("extra", {})
    if fields["timings"] is False:
        del fields["timings"]
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps(chat_body(messages, system, **fields, **extra), allow_nan=False)
    return Call("POST", CHAT, content.encode(), deadline_s)


def health_call(timeout_s: float) -> Call:
    """Whether the service can answer; who takes longer than this, or than it may be silent, cannot."""
    return Call("GET", "/health", deadline_s=min(_HEALTH_S, timeout_s))
