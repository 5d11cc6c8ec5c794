"""`POST /v1/completions`: a text, or token ids, that the model goes on with as they are, without a template.

One prompt a request, and no pictures. As OpenAI has it, an answer has 16 tokens where no number is given. Knows nothing
about HTTP, models or Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from deployments.reply_form import ReadRequest, ReplyForm
from deployments.sampling_schema import SamplingBody, Token
from deployments.schema import parse_body
from llava_core.errors import RequestError
from llava_core.prepare import RequestLimits
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
        custom_error_message="must be a string, a list of token ids, or a list of one such prompt",
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
    """Raises RequestError naming field and cause. `request_id` must be unique, so it cannot be the client's own."""
    parsed = parse_body(body, CompletionBody, max_text=limits.max_text)
    max_tokens = _DEFAULT_MAX_TOKENS if parsed.max_tokens is None else parsed.max_tokens
    sampling = parsed.sampling(max_tokens=max_tokens, logprobs=parsed.logprobs)
    form = ReplyForm(
        model=parsed.model,
        stream=bool(parsed.stream),
        include_usage=parsed.wants_usage,
        timings=bool(parsed.timings),
        num_answers=sampling.n,
        prompt_field="prompt",
    )
    return ReadRequest(CompletionRequest(request_id, read_prompt(parsed.prompt, limits), sampling), form)


def read_prompt(
    prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]], limits: RequestLimits
) -> str | tuple[int, ...]:
    """The only prompt there is. Raises RequestError for several, and for one that is too long."""
    if isinstance(prompt, str):
        if len(prompt) > limits.max_text:
            raise RequestError(
                f"the prompt has {len(prompt)} characters; at most {limits.max_text} are allowed",
                param="prompt",
                code="text_too_long",
            )
        return prompt
    tokens = tuple(each for each in prompt if isinstance(each, int))
    if tokens:
        return tokens
    if len(prompt) > 1:
        raise RequestError(f"{len(prompt)} prompts came; send a request for each", param="prompt")
    [only] = (each for each in prompt if not isinstance(each, int))
    return read_prompt(only, limits)
