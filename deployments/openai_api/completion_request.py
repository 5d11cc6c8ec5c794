"""`POST /v1/completions`: a text, or token ids, that the model continues as they are, without a template.

No pictures; one prompt or several. As with OpenAI, an answer has up to 16 tokens by default. Knows nothing about HTTP,
models or Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from deployments.openai_api.reply_form import ReadRequest, ReplyForm
from deployments.openai_api.sampling_schema import SamplingBody, Token
from deployments.openai_api.schema import parse_body
from llava_core.errors import RequestError
from llava_core.request_limits import RequestLimits
from llava_core.types import MAX_LOGPROBS, CompletionRequest

_DEFAULT_MAX_TOKENS = 16


def _prompt_type(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list) or not value:
        return None
    return {str: "<texts>", int: "<tokens>", list: "<lists>"}.get(type(value[0]))


_Tokens = Annotated[list[Token], Field(min_length=1)]
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[_Tokens, Tag("<tokens>")]
    | Annotated[list[str], Tag("<texts>")]
    | Annotated[list[_Tokens], Tag("<lists>")],
    Discriminator(
        _prompt_type,
        custom_error_type="prompt_type",
        custom_error_message="must be a string, a list of token ids, or a list of such prompts",
    ),
]


class CompletionBody(SamplingBody):
    """The body of a request."""

    neutral: ClassVar[Mapping[str, Sequence[object]]] = {
        **SamplingBody.neutral,
        "suffix": ("",),
        "prompt_embeds": (),
        "template": (),
        "max_completion_tokens": (),
    }

    prompt: Prompt
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)


def read_completion_request(body: bytes, request_id: str, limits: RequestLimits) -> ReadRequest:
    """Parses a body. Raises RequestError naming field and cause. `request_id` must be unique: not the client's own."""
    parsed = parse_body(body, CompletionBody, max_text=limits.max_text)
    max_tokens = _DEFAULT_MAX_TOKENS if parsed.max_tokens is None else parsed.max_tokens
    sampling = parsed.sampling(max_tokens=max_tokens, logprobs=parsed.logprobs)
    prompts = read_prompts(parsed.prompt, limits)
    num_answers = len(prompts) * sampling.n
    if len(prompts) > 1 and num_answers > limits.max_n:
        raise RequestError(
            f"{len(prompts)} prompts with n {sampling.n} are {num_answers} answers; at most {limits.max_n} are allowed",
            param="prompt",
        )
    form = ReplyForm(
        model=parsed.model,
        stream=bool(parsed.stream),
        include_usage=parsed.wants_usage,
        timings=bool(parsed.timings),
        num_answers=num_answers,
        prompt_field="prompt",
    )
    first, *others = (
        CompletionRequest(f"{request_id}-{place}" if place else request_id, prompt, sampling)
        for place, prompt in enumerate(prompts)
    )
    return ReadRequest(first, form, tuple(others))


def read_prompts(
    prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]], limits: RequestLimits
) -> tuple[str | tuple[int, ...], ...]:
    """One or more prompts. Raises RequestError if their texts together are too long."""
    prompts = tuple(map(_prompt, [prompt] if _is_one(prompt) else prompt))
    num_characters = sum(len(each) for each in prompts if isinstance(each, str))
    if num_characters > limits.max_text:
        raise RequestError(
            f"the prompt has {num_characters} characters; at most {limits.max_text} are allowed",
            param="prompt",
            code="text_too_long",
        )
    return prompts


def _is_one(prompt: object) -> bool:
    return isinstance(prompt, str) or (isinstance(prompt, Sequence) and isinstance(prompt[0], int))


def _prompt(given: object) -> str | tuple[int, ...]:
    return given if isinstance(given, str) else tuple(given)  # type: ignore[arg-type]
