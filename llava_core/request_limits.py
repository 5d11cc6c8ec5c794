"""Limits of one request, and their checks: pictures, characters, answers, the order of roles, control tokens.

All checks apply to a request as received, before pictures are decoded or text is tokenized.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from llava_core.errors import RequestError
from llava_core.images.loading import ImageLimits
from llava_core.prompts.conversation import IMAGE_PLACEHOLDER
from llava_core.prompts.tokenize import as_text
from llava_core.types import AnyRequest, GenerationRequest, Message, RenderedRequest, TextPart


@dataclass(frozen=True)
class RequestLimits:
    """Maxima for one request: pictures and characters in all messages, and the answers it asks for."""

    max_images: int = 8
    max_text: int = 200_000
    max_n: int = 16
    image: ImageLimits = field(default_factory=ImageLimits)

    def __post_init__(self) -> None:
        if self.max_images < 0 or self.max_text < 1 or self.max_n < 1:
            raise ValueError(f"max_images must not be negative, max_text and max_n at least 1: {self}")


def check_request(request: AnyRequest, limits: RequestLimits, reserved_texts: Set[str]) -> None:
    """Raise RequestError, which names the field, for a request outside the limits."""
    if request.sampling.n > limits.max_n:
        raise RequestError(f"n is {request.sampling.n}; at most {limits.max_n} are allowed", param="n")
    if isinstance(request, GenerationRequest):
        _check_messages(request, limits, reserved_texts)
    elif isinstance(request, RenderedRequest):
        check_rendered(request.prompt, request.num_images, limits)
    elif isinstance(request.prompt, str):
        _check_text(request.prompt, "prompt", reserved_texts)
        _check_length(len(request.prompt), "prompt", limits)
    elif any(token < 0 for token in request.prompt):
        raise RequestError("token ids are not negative", param="prompt")


def check_rendered(prompt: str, num_images: int, limits: RequestLimits) -> None:
    """The same for a prompt rendered by the client, and for the number of pictures that come with it."""
    check_num_images(num_images, "images", limits)
    _check_unicode(prompt, "prompt")
    _check_length(len(prompt), "prompt", limits)
    if prompt.count(IMAGE_PLACEHOLDER) != num_images:
        # LLaVA's own wording.
        raise RequestError(
            f"Number of images does not match number of {IMAGE_PLACEHOLDER} tokens in prompt", param="images"
        )


def _check_messages(request: GenerationRequest, limits: RequestLimits, reserved_texts: Set[str]) -> None:
    check_num_images(request.num_images, "messages", limits)
    check_roles(request.messages)
    texts = [(f"messages[{i}].content", message_text(m)) for i, m in enumerate(request.messages)]
    for param, text in [*texts, ("messages", request.system or "")]:
        _check_text(text, param, reserved_texts)
    _check_length(sum(len(text) for _, text in texts) + len(request.system or ""), "messages", limits)


def check_num_images(num_images: int, param: str, limits: RequestLimits) -> None:
    """Raise RequestError where there are too many pictures."""
    if num_images > limits.max_images:
        raise RequestError(
            f"the request has {num_images} images; at most {limits.max_images} are allowed",
            param=param,
            code="too_many_images",
        )


def _check_length(length: int, param: str, limits: RequestLimits) -> None:
    if length > limits.max_text:
        what = "prompt has" if param == "prompt" else "messages have"
        raise RequestError(
            f"the {what} {length} characters; at most {limits.max_text} are allowed",
            param=param,
            code="text_too_long",
        )


def _check_unicode(text: str, param: str) -> None:
    """JSON may escape one half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text holds half a surrogate pair (U+{ord(text[error.start]):04X}, character {error.start + 1}), "
            "which is no character; remove it, or give both halves",
            param=param,
        ) from error


def _check_text(text: str, param: str, reserved_texts: Set[str]) -> None:
    _check_unicode(text, param)
    left = as_text(text, reserved_texts)
    for reserved in sorted(reserved_texts):
        if reserved in left:
            raise RequestError(
                f"the text contains {reserved!r}, which is a control token of this model; remove it",
                param=param,
                code="reserved_text",
            )


def check_roles(messages: Sequence[Message]) -> None:
    """Raise RequestError unless the user speaks first and last."""
    if messages and messages[0].role != "user":
        raise RequestError(
            f"the role is {messages[0].role!r}; the first message after the system's must be the user's",
            param="messages[0].role",
        )
    if not messages or messages[-1].role != "user":
        raise RequestError("the last message must be the user's", param="messages")


def message_text(message: Message) -> str:
    """The text parts of a message, one per line."""
    return "\n".join(part.text for part in message.parts if isinstance(part, TextPart))
