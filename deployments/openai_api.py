"""`POST /v1/chat/completions`: the request schema of OpenAI's API, checked, and turned into a GenerationRequest.

What would change the answer and is not supported is refused by name; what is harmless or unknown is ignored, because
clients add fields every month. Differences to OpenAI: `temperature` is 0 (greedy) where it is not given; `top_k`,
`ignore_eos` and `timings` are extensions. Knows nothing about HTTP, models or Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import ErrorDetails

from llava_core.errors import RequestError
from llava_core.images.loading import ImageLimits, decode_data_url
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TextPart

_SYSTEM_ROLES = ("system", "developer")
# Below this, dividing logits by the temperature overflows, and the most likely token is certain anyway.
_GREEDY_BELOW = 1e-4
_MAX_STOPS, _MAX_STOP_LENGTH = 4, 256
# What torch takes as a seed.
_SEED_BOUND = 2**63

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


class _Text(_Part):
    type: Literal["text"]
    text: str


class _ImageUrl(_Part):
    url: str
    # Every picture is read at the model's own resolution, whatever is asked for.
    detail: Literal["auto", "low", "high", "original"] = "auto"


class _Image(_Part):
    type: Literal["image_url"]
    image_url: _ImageUrl


def _text_or_list(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def _part_type(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in ("text", "image_url") else None


# Tags in angle brackets tell unions apart and do not show in the paths of error messages (`_path`).
_AnyPart = Annotated[
    Annotated[_Text, Tag("<text>")] | Annotated[_Image, Tag("<image_url>")],
    Discriminator(
        _part_type,
        custom_error_type="part_type",
        custom_error_message="must be an object whose type is 'text' or 'image_url'",
    ),
]
_Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[_AnyPart], Tag("<list>"), Field(min_length=1)],
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


class _Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: _Content


class _StreamOptions(_Part):
    include_usage: bool = False


class _Request(_Part):
    messages: list[_Message] = Field(min_length=1)
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


@dataclass(frozen=True)
class ChatRequest:
    """A request as the service understands it. `num_leading` system messages stood before `generation.messages`."""

    generation: GenerationRequest
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


def read_chat_request(body: bytes, request_id: str, limits: ImageLimits) -> ChatRequest:
    """Raises RequestError naming field and cause. `request_id` must be unique, so it cannot be the client's own."""
    request = _parse(body)
    _refuse_unsupported(request.model_extra or {})
    leading = list(takewhile(lambda message: message.role in _SYSTEM_ROLES, request.messages))
    texts = [_system_text(message, index) for index, message in enumerate(leading)]
    messages = tuple(
        _turn(message, index, limits) for index, message in enumerate(request.messages) if index >= len(leading)
    )
    return ChatRequest(
        generation=GenerationRequest(request_id, messages, _sampling(request), "\n\n".join(texts) if texts else None),
        model=request.model,
        stream=bool(request.stream),
        include_usage=request.stream_options is not None and request.stream_options.include_usage,
        timings=bool(request.timings),
        num_leading=len(leading),
        limit_field="max_tokens" if request.max_completion_tokens is None else "max_completion_tokens",
    )


def _parse(body: bytes) -> _Request:
    try:
        return _Request.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _as_request_error(first) from None


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


def _system_text(message: _Message, index: int) -> str:
    return "\n".join(part.text for part in _text_parts(message, index))


def _turn(message: _Message, index: int, limits: ImageLimits) -> Message:
    if message.role in _SYSTEM_ROLES:
        raise RequestError("system messages must come before all others", param=f"messages[{index}].role")
    if message.role == "assistant":
        return Message("assistant", tuple(_text_parts(message, index)))
    if isinstance(message.content, str):
        return Message("user", (TextPart(message.content),))
    where = f"messages[{index}].content"
    return Message("user", tuple(_part(part, f"{where}[{i}]", limits) for i, part in enumerate(message.content)))


def _part(part: _Text | _Image, where: str, limits: ImageLimits) -> TextPart | ImagePart:
    if isinstance(part, _Text):
        return TextPart(part.text)
    return ImagePart(decode_data_url(part.image_url.url, limits, param=f"{where}.image_url.url"))


def _text_parts(message: _Message, index: int) -> list[TextPart]:
    if isinstance(message.content, str):
        return [TextPart(message.content)]
    for position, part in enumerate(message.content):
        if isinstance(part, _Image):
            raise RequestError(
                f"only user messages may hold images, not {message.role} messages",
                param=f"messages[{index}].content[{position}]",
            )
    return [TextPart(part.text) for part in message.content if isinstance(part, _Text)]


def _sampling(request: _Request) -> SamplingParams:
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


def _max_tokens(request: _Request) -> int | None:
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
