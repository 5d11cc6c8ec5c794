"""`POST /v1/chat/completions`: parses a body into a GenerationRequest, and what the gateway needs for the reply.

Tool results are given to the model as user messages, and earlier tool calls as assistant messages, because the
family's templates know no other roles. The fields are in chat_schema.py. Knows nothing about HTTP, models or Ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from deployments.openai_api.chat_schema import (
    AssistantMessage,
    ChatBody,
    ChatMessage,
    Dicom,
    ImageContent,
    RefusalContent,
    TextContent,
)
from deployments.openai_api.reply_form import ReadRequest, ReplyForm
from deployments.openai_api.schema import parse_body
from llava_core.errors import RequestError
from llava_core.images.loading import ImageLimits, decode_data_url
from llava_core.request_limits import RequestLimits
from llava_core.types import GenerationRequest, ImagePart, ImageUrl, Message, TextPart
from llava_core.views import DicomView

_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class Conversation:
    """Messages as the stages know them, the `num_leading` system messages at their head joined into one text."""

    messages: tuple[Message, ...]
    system: str | None
    num_leading: int


def read_chat_request(body: bytes, request_id: str, limits: RequestLimits) -> ReadRequest:
    """Parses a body. Raises RequestError naming field and cause. `request_id` must be unique: not the client's own."""
    parsed = parse_body(body, ChatBody, max_text=limits.max_text)
    sampling = parsed.sampling(max_tokens=_max_tokens(parsed), logprobs=_logprobs(parsed))
    chat = read_conversation(parsed.messages, limits)
    form = ReplyForm(
        model=parsed.model,
        stream=bool(parsed.stream),
        include_usage=parsed.wants_usage,
        timings=bool(parsed.timings),
        image_transforms=bool(parsed.image_transforms),
        num_answers=sampling.n,
        num_leading=chat.num_leading,
        limit_field="max_tokens" if parsed.max_completion_tokens is None else "max_completion_tokens",
    )
    return ReadRequest(GenerationRequest(request_id, chat.messages, sampling, chat.system, parsed.template), form)


def read_conversation(messages: Sequence[ChatMessage], limits: RequestLimits) -> Conversation:
    """Converts the messages. Raises RequestError naming the message."""
    check_text(messages, limits.max_text)
    leading = list(takewhile(lambda message: message.role in _SYSTEM_ROLES, messages))
    texts = ["\n".join(_texts_only(message, index)) for index, message in enumerate(leading)]
    turns = tuple(
        _turn(message, index, limits.image) for index, message in enumerate(messages) if index >= len(leading)
    )
    return Conversation(turns, "\n\n".join(texts) if texts else None, len(leading))


def check_text(messages: Sequence[ChatMessage], max_text: int) -> None:
    """Refuses text that is too long before it enters the graph; the preprocessor checks it again."""
    total = sum(len(text) for message in messages for text in _texts(message))
    if total > max_text:
        raise RequestError(
            f"the messages have {total} characters; at most {max_text} are allowed",
            param="messages",
            code="text_too_long",
        )


def _texts(message: ChatMessage) -> Iterator[str]:
    """Every text of a message, including those of refusals and tool calls."""
    if isinstance(message.content, str):
        yield message.content
    for part in message.content if isinstance(message.content, list) else ():
        if isinstance(part, TextContent):
            yield part.text
        elif isinstance(part, RefusalContent):
            yield part.refusal
    if isinstance(message, AssistantMessage):
        yield from () if message.refusal is None else (message.refusal,)
        for call in message.tool_calls or ():
            yield f'{{"name": {json.dumps(call.function.name)}, "arguments": {call.function.arguments}}}'


def _turn(message: ChatMessage, index: int, limits: ImageLimits) -> Message:
    if message.role in _SYSTEM_ROLES:
        raise RequestError("system messages must come before all others", param=f"messages[{index}].role")
    if isinstance(message, AssistantMessage):
        texts = _texts_only(message, index)
        if not texts:
            raise RequestError(
                "an assistant's message needs content, tool_calls or a refusal", param=f"messages[{index}].content"
            )
        return Message("assistant", tuple(map(TextPart, texts)))
    if isinstance(message.content, str):
        return Message("user", (TextPart(message.content),))
    where = f"messages[{index}].content"
    return Message("user", tuple(read_part(part, f"{where}[{i}]", limits) for i, part in enumerate(message.content)))


def read_part(
    part: TextContent | ImageContent | RefusalContent, where: str, limits: ImageLimits
) -> TextPart | ImagePart | ImageUrl:
    """A part of a message to the assistant, as the stages know it. Raises RequestError naming the field."""
    if isinstance(part, TextContent):
        return TextPart(part.text)
    if isinstance(part, RefusalContent):
        raise RequestError("only assistant messages may hold refusals", param=where)
    low_detail = part.image_url.detail == "low"
    view = None if part.image_url.dicom is None else _view(part.image_url.dicom)
    if part.image_url.url[:8].lower().startswith(("https://", "http://")):
        # The stage that fetches it decides whether it may be fetched.
        return ImageUrl(part.image_url.url, low_detail, view)
    return ImagePart(decode_data_url(part.image_url.url, limits, param=f"{where}.image_url.url"), low_detail, view)


def _view(dicom: Dicom) -> DicomView:
    window = (dicom.window[0], dicom.window[1]) if isinstance(dicom.window, list) else dicom.window
    return DicomView(dicom.frame, window)


def _texts_only(message: ChatMessage, index: int) -> list[str]:
    for position, part in enumerate(message.content if isinstance(message.content, list) else ()):
        if isinstance(part, ImageContent):
            raise RequestError(
                f"only user and tool messages may hold images, not {message.role} messages",
                param=f"messages[{index}].content[{position}]",
            )
    return list(_texts(message))


def _max_tokens(request: ChatBody) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestError(
            f"max_tokens is {old} and max_completion_tokens {new}; give one of them", param="max_completion_tokens"
        )
    return old if new is None else new


def _logprobs(request: ChatBody) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    return None
