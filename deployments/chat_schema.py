"""The schema of OpenAI's chat completion requests: which fields there are, of which types, and which are refused.

What would change the answer and is not supported is refused by name; what is harmless or unknown is ignored, because
clients add fields every month. Knows JSON, and not what the fields are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import ErrorDetails

from llava_core.errors import RequestError

# What torch takes as a seed.
_SEED_BOUND = 2**63
# Far beyond any conversation, and few enough to hold.
_MAX_MESSAGES, _MAX_PARTS = 1024, 256
# Commas and brackets beyond those that may stand in the text: each may cost hundreds of bytes once it is parsed.
_MAX_JSON_TOKENS = 65_536

# Fields that would change the answer, with the values that ask for nothing. Any other value is refused.
_NEUTRAL: Mapping[str, Sequence[object]] = {
    "n": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "stop_token_ids": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "echo": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class TextContent(_Part):
    """A piece of text."""

    type: Literal["text"]
    text: str


class _ImageUrl(_Part):
    url: str
    # Every picture is read at the model's own resolution, whatever is asked for.
    detail: Literal["auto", "low", "high", "original"] = "auto"


class ImageContent(_Part):
    """A picture."""

    type: Literal["image_url"]
    image_url: _ImageUrl


def _text_or_list(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def _part_type(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in ("text", "image_url") else None


# Tags in angle brackets tell unions apart and do not show in the paths of error messages (`_path`).
_AnyPart = Annotated[
    Annotated[TextContent, Tag("<text>")] | Annotated[ImageContent, Tag("<image_url>")],
    Discriminator(
        _part_type,
        custom_error_type="part_type",
        custom_error_message="must be an object whose type is 'text' or 'image_url'",
    ),
]
_Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[_AnyPart], Tag("<list>"), Field(min_length=1, max_length=_MAX_PARTS)],
    Discriminator(
        _text_or_list, custom_error_type="content_type", custom_error_message="must be a string or a list of parts"
    ),
]
_Stop = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], Tag("<list>")],
    Discriminator(
        _text_or_list, custom_error_type="stop_type", custom_error_message="must be a string or a list of strings"
    ),
]


class ChatMessage(_Part):
    """One message; `content` is a string or parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Content


class _StreamOptions(_Part):
    include_usage: bool = False


class ChatBody(_Part):
    """The body of a request."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=_MAX_MESSAGES)
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    seed: int | None = Field(default=None, ge=-_SEED_BOUND, lt=_SEED_BOUND)
    stop: _Stop | None = None
    ignore_eos: bool | None = None
    timings: bool | None = None


def parse_body(body: bytes, *, max_text: int) -> ChatBody:
    """Raises RequestError naming the field. `max_text` is how many characters of text any caller may send."""
    _refuse_swollen(body, max_text + _MAX_JSON_TOKENS)
    try:
        parsed = ChatBody.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _as_request_error(first) from None
    _refuse_unsupported(parsed.model_extra or {})
    return parsed


def _refuse_swollen(body: bytes, max_tokens: int) -> None:
    """A few bytes of JSON can become a hundred times as many in memory; base64 has none of these characters."""
    # numpy counts many times faster than bytes.count does, and lets other threads run meanwhile.
    characters = np.frombuffer(body, np.uint8)
    if sum(np.count_nonzero(characters == mark) for mark in b",[{") > max_tokens:
        raise RequestError("the body holds too many values", code="request_too_complex")


def _as_request_error(error: ErrorDetails) -> RequestError:
    if error["type"] == "json_invalid":
        return RequestError(f"the body is not JSON: {error['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json")
    path = _path(error["loc"])
    if not path:
        return RequestError("the body must be a JSON object", code="invalid_json")
    message = error["msg"][0].lower() + error["msg"][1:]
    code = "missing_required_parameter" if error["type"] == "missing" else "invalid_value"
    return RequestError(f"{path}: {message}", param=path, code=code)


def _path(location: Sequence[int | str]) -> str:
    """`messages[0].content[1].image_url.url`: the tags of unions are left out."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("<"):
            path += f".{step}" if path else step
    return path


def _refuse_unsupported(extra: Mapping[str, Any]) -> None:
    for name, value in extra.items():
        if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
            raise RequestError(
                f"{name} is not supported by this service; leave it out", param=name, code="unsupported_parameter"
            )
