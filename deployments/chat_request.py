"""`POST /v1/chat/completions`: a body becomes a GenerationRequest, and what the gateway needs for the reply.

Differences to OpenAI: `temperature` is 0 (greedy) where it is not given; `top_k`, `ignore_eos` and `timings` are
extensions. The fields are in chat_schema.py. Knows nothing about HTTP, models or Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from deployments.chat_schema import ChatBody, ChatMessage, ImageContent, TextContent, parse_body
from llava_core.errors import RequestError
from llava_core.images.loading import ImageLimits, decode_data_url
from llava_core.prepare import RequestLimits
from llava_core.types import GenerationRequest, ImagePart, ImageUrl, Message, SamplingParams, TextPart

_SYSTEM_ROLES = ("system", "developer")
# Below this, dividing logits by the temperature overflows, and the most likely token is certain anyway.
_GREEDY_BELOW = 1e-4
_MAX_STOPS, _MAX_STOP_LENGTH = 4, 256


@dataclass(frozen=True)
class ReplyForm:
    """How the answer is to look. `num_leading` system messages stood before those that the stages get."""

    model: str | None
    stream: bool
    include_usage: bool
    timings: bool
    num_leading: int
    limit_field: str

    def locate(self, param: str | None) -> str | None:
        """A field as later stages name it, in the client's own terms."""
        if param == "max_tokens":
            return self.limit_field
        prefix = "messages["
        if param is None or not param.startswith(prefix):
            return param
        index, bracket, rest = param.removeprefix(prefix).partition("]")
        return f"{prefix}{int(index) + self.num_leading}{bracket}{rest}"


@dataclass(frozen=True)
class ChatRequest:
    """A request as the service understands it. The form outlives the request, which holds the pictures."""

    generation: GenerationRequest
    form: ReplyForm


def read_chat_request(body: bytes, request_id: str, limits: RequestLimits) -> ChatRequest:
    """Raises RequestError naming field and cause. `request_id` must be unique, so it cannot be the client's own."""
    parsed = parse_body(body, max_text=limits.max_text)
    _check_text(parsed, limits.max_text)
    leading = list(takewhile(lambda message: message.role in _SYSTEM_ROLES, parsed.messages))
    texts = [_system_text(message, index) for index, message in enumerate(leading)]
    messages = tuple(
        _turn(message, index, limits.image) for index, message in enumerate(parsed.messages) if index >= len(leading)
    )
    form = ReplyForm(
        model=parsed.model,
        stream=bool(parsed.stream),
        include_usage=parsed.stream_options is not None and parsed.stream_options.include_usage,
        timings=bool(parsed.timings),
        num_leading=len(leading),
        limit_field="max_tokens" if parsed.max_completion_tokens is None else "max_completion_tokens",
    )
    system = "\n\n".join(texts) if texts else None
    return ChatRequest(GenerationRequest(request_id, messages, _sampling(parsed), system), form)


def _check_text(body: ChatBody, max_text: int) -> None:
    """The preprocessor counts as well; here nothing that is too long crosses the graph."""
    total = sum(len(text) for message in body.messages for text in _texts(message))
    if total > max_text:
        raise RequestError(
            f"the messages have {total} characters; at most {max_text} are allowed",
            param="messages",
            code="text_too_long",
        )


def _texts(message: ChatMessage) -> Iterator[str]:
    if isinstance(message.content, str):
        return iter((message.content,))
    return (part.text for part in message.content if isinstance(part, TextContent))


def _system_text(message: ChatMessage, index: int) -> str:
    return "\n".join(part.text for part in _text_parts(message, index))


def _turn(message: ChatMessage, index: int, limits: ImageLimits) -> Message:
    if message.role in _SYSTEM_ROLES:
        raise RequestError("system messages must come before all others", param=f"messages[{index}].role")
    if message.role == "assistant":
        return Message("assistant", tuple(_text_parts(message, index)))
    if isinstance(message.content, str):
        return Message("user", (TextPart(message.content),))
    where = f"messages[{index}].content"
    return Message("user", tuple(_part(part, f"{where}[{i}]", limits) for i, part in enumerate(message.content)))


def _part(part: TextContent | ImageContent, where: str, limits: ImageLimits) -> TextPart | ImagePart | ImageUrl:
    if isinstance(part, TextContent):
        return TextPart(part.text)
    if part.image_url.url[:8].lower().startswith(("https://", "http://")):
        # Whether it may be fetched, the stage that does so knows.
        return ImageUrl(part.image_url.url)
    return ImagePart(decode_data_url(part.image_url.url, limits, param=f"{where}.image_url.url"))


def _text_parts(message: ChatMessage, index: int) -> list[TextPart]:
    if isinstance(message.content, str):
        return [TextPart(message.content)]
    for position, part in enumerate(message.content):
        if isinstance(part, ImageContent):
            raise RequestError(
                f"only user messages may hold images, not {message.role} messages",
                param=f"messages[{index}].content[{position}]",
            )
    return [TextPart(part.text) for part in message.content if isinstance(part, TextContent)]


def _sampling(request: ChatBody) -> SamplingParams:
    temperature = request.temperature or 0.0
    return SamplingParams(
        max_tokens=_max_tokens(request),
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(0, request.top_k or 0),
        seed=request.seed,
        stop=_stops(request.stop),
        ignore_eos=bool(request.ignore_eos),
    )


def _max_tokens(request: ChatBody) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestError(
            f"max_tokens is {old} and max_completion_tokens {new}; give one of them", param="max_completion_tokens"
        )
    return old if new is None else new


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    texts = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(texts) > _MAX_STOPS:
        raise RequestError(f"stop holds {len(texts)} strings; at most {_MAX_STOPS} are allowed", param="stop")
    for text in texts:
        if not 1 <= len(text) <= _MAX_STOP_LENGTH:
            raise RequestError(
                f"each stop string must have 1 to {_MAX_STOP_LENGTH} characters, not {len(text)}", param="stop"
            )
    return texts
