"""`POST /tokenize` and `/detokenize`, as in vLLM: shows a prompt as the model would see it, without asking the model.

Messages are rendered as for a chat; a text is taken as it is, as for a completion. Knows nothing about HTTP or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from deployments.openai_api.chat_request import read_conversation
from deployments.openai_api.chat_schema import CHAT_NEUTRAL, Messages, TemplateName
from deployments.openai_api.completion_request import Prompt, read_prompts
from deployments.openai_api.reply_form import ReadRequest, ReplyForm
from deployments.openai_api.sampling_schema import Token
from deployments.openai_api.schema import Body, parse_body
from llava_core.errors import RequestError
from llava_core.prompts.tokenize import Tokenized
from llava_core.request_limits import RequestLimits
from llava_core.types import CompletionRequest, GenerationRequest, SamplingParams


class TokenizeBody(Body):
    """Messages or a prompt."""

    neutral: ClassVar[Mapping[str, Sequence[object]]] = {**CHAT_NEUTRAL, "add_special_tokens": (True, False)}

    model: str | None = None
    messages: Messages | None = None
    prompt: Prompt | None = None
    template: TemplateName | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[Token] = Field(min_length=0)


@dataclass(frozen=True)
class TokenizeRequest:
    """What to tokenize, and whether to return each token's text, too."""

    read: ReadRequest
    with_texts: bool


@dataclass(frozen=True)
class DetokenizeRequest:
    """Token ids to turn into text."""

    model: str | None
    ids: tuple[int, ...]


def read_tokenize_request(body: bytes, request_id: str, limits: RequestLimits) -> TokenizeRequest:
    """Raises RequestError naming field and cause."""
    parsed = parse_body(body, TokenizeBody, max_text=limits.max_text)
    if (parsed.messages is None) == (parsed.prompt is None):
        raise RequestError("give either messages or a prompt", param="messages", code="missing_required_parameter")
    with_texts, sampling = bool(parsed.return_token_strs), SamplingParams()
    if parsed.messages is not None:
        chat = read_conversation(parsed.messages, limits)
        form = ReplyForm(model=parsed.model, num_leading=chat.num_leading)
        request = GenerationRequest(request_id, chat.messages, sampling, chat.system, parsed.template)
        return TokenizeRequest(ReadRequest(request, form), with_texts)
    assert parsed.prompt is not None
    if parsed.template is not None:
        raise RequestError("template is for messages; a prompt is taken as it is", param="template")
    form = ReplyForm(model=parsed.model, prompt_field="prompt")
    prompt, *others = read_prompts(parsed.prompt, limits)
    if others:
        raise RequestError(f"{len(others) + 1} prompts are given; send a request for each", param="prompt")
    completion = CompletionRequest(request_id, prompt, sampling)
    return TokenizeRequest(ReadRequest(completion, form), with_texts)


def read_detokenize_request(body: bytes, _request_id: str, limits: RequestLimits) -> DetokenizeRequest:
    """Raises RequestError naming field and cause."""
    parsed = parse_body(body, DetokenizeBody, max_text=limits.max_text)
    return DetokenizeRequest(parsed.model, tuple(parsed.tokens))


def tokenized_body(tokenized: Tokenized, *, with_texts: bool) -> dict[str, Any]:
    """The reply to /tokenize."""
    texts = [spelled.decode("utf-8", errors="replace") for spelled in tokenized.token_bytes] if with_texts else None
    return {
        "count": len(tokenized.ids),
        "max_model_len": tokenized.context_length,
        "tokens": list(tokenized.ids),
        "token_strs": texts,
    }
