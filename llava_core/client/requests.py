"""Requests: options by name, and the bytes of a request. Knows OpenAI's fields, and sends nothing."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from llava_core.client.messages import Json, message_json
from llava_core.types import Message

CHAT = "/v1/chat/completions"
_HEALTH_S = 10.0


class Options(TypedDict, total=False):
    """Options of an answer, described in docs/serving.md. The service's own defaults apply to options left out.

    `deadline_s` bounds the whole answer, retries included, and is sent to the service, which stops in time. `timings`
    defaults to True; set it to False for a server that rejects unknown fields. `extra` holds fields not named here.
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
    """One request, ready to be sent as often as necessary."""

    method: str
    path: str
    content: bytes | None = field(default=None, repr=False)
    deadline_s: float | None = None


def chat_body(messages: Sequence[Message], system: str | None = None, **options: Any) -> Json:
    """The JSON body of a chat completion."""
    spoken = [message_json(message) for message in messages]
    if system is not None:
        spoken.insert(0, {"role": "system", "content": system})
    return {"messages": spoken, **options}


def chat_call(messages: Sequence[Message], system: str | None, options: Options, *, stream: bool) -> Call:
    """A request for an answer as a whole, or as a stream that ends with its usage.

    Raises TypeError for an option that Options does not have: a service ignores fields that it does not know.
    """
    for name in options:
        if name not in Options.__annotations__:
            near = difflib.get_close_matches(name, Options.__annotations__, n=1)
            hint = f"did you mean {near[0]}?" if near else "other fields go into extra"
            raise TypeError(f"{name} is not an option of an answer; {hint}")
    fields: dict[str, Any] = {"timings": True, **options}
    deadline_s, extra = fields.pop("deadline_s", None), fields.pop("extra", {})
    if fields["timings"] is False:
        del fields["timings"]
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps(chat_body(messages, system, **fields, **extra), allow_nan=False)
    return Call("POST", CHAT, content.encode(), deadline_s)


def health_call(timeout_s: float) -> Call:
    """A health check; a service that takes longer than 10 s, or than `timeout_s`, counts as unhealthy."""
    return Call("GET", "/health", deadline_s=min(_HEALTH_S, timeout_s))
