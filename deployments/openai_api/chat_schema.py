"""The schema of OpenAI's chat completion requests: messages and their parts, and which fields are refused.

Knows JSON, but not what the fields are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from deployments.openai_api.sampling_schema import WHOLE_BOUND, SamplingBody, text_or_list
from deployments.openai_api.schema import Part
from llava_core.prompts.templates import TEMPLATES
from llava_core.types import MAX_LOGPROBS

# Far more than any conversation has, yet few enough to hold in memory.
_MAX_MESSAGES, _MAX_PARTS, _MAX_CALLS = 1024, 256, 128
_Asker = Literal["system", "developer", "user", "tool"]


class TextContent(Part):
    """A piece of text."""

    type: Literal["text"]
    text: str


class RefusalContent(Part):
    """The assistant's words when it refused to answer."""

    type: Literal["refusal"]
    refusal: str


def _window_type(value: Any) -> str | None:
    if isinstance(value, list):
        return "<pair>"
    return "<number>" if isinstance(value, int) and not isinstance(value, bool) else None


def _check_width(pair: list[float]) -> list[float]:
    if not pair[1] > 0:
        raise PydanticCustomError("window", "the width must be above 0")
    return pair


_Window = Annotated[
    Annotated[int, Field(ge=1, lt=WHOLE_BOUND), Tag("<number>")]
    | Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_check_width), Tag("<pair>")],
    Discriminator(
        _window_type,
        custom_error_type="window_type",
        custom_error_message="must be [centre, width] or the number of one of the file's windows, counted from 1",
    ),
]


class Dicom(Part):
    """The part of a DICOM file to look at. Not one of OpenAI's fields, so any unknown name in it is a mistake."""

    model_config = ConfigDict(extra="forbid")

    frame: int = Field(default=1, ge=1, lt=WHOLE_BOUND)
    window: _Window | None = None


class _ImageUrl(Part):
    url: str
    dicom: Dicom | None = None
    # Every picture is read at the model's own resolution; `low` leaves out the tiles that some models cut it into.
    detail: Literal["auto", "low", "high", "original"] = "auto"


class ImageContent(Part):
    """A picture."""

    type: Literal["image_url"]
    image_url: _ImageUrl


def _part_type(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in ("text", "image_url", "refusal") else None


_AnyPart = Annotated[
    Annotated[TextContent, Tag("<text>")]
    | Annotated[ImageContent, Tag("<image_url>")]
    | Annotated[RefusalContent, Tag("<refusal>")],
    Discriminator(
        _part_type,
        custom_error_type="part_type",
        custom_error_message="must be an object whose type is 'text', 'image_url' or 'refusal'",
    ),
]
_Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[_AnyPart], Tag("<list>"), Field(min_length=1, max_length=_MAX_PARTS)],
    Discriminator(
        text_or_list, custom_error_type="content_type", custom_error_message="must be a string or a list of parts"
    ),
]


class _Function(Part):
    name: str
    arguments: str


class _ToolCall(Part):
    type: Literal["function"] = "function"
    function: _Function


def _check_role(value: Any) -> Any:
    if value not in get_args(_Asker):
        # The schema's own message would list only _Asker's roles; an assistant's message has a schema of its own.
        raise PydanticCustomError("role", "must be 'system', 'developer', 'user', 'tool' or 'assistant'")
    return value


class AskedMessage(Part):
    """A message to the assistant: instructions, a question, or a tool's result."""

    role: Annotated[_Asker, BeforeValidator(_check_role)]
    content: _Content


class AssistantMessage(Part):
    """An earlier message of the assistant. Without content it must have a tool call or a refusal."""

    role: Literal["assistant"]
    content: _Content | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = Field(default=None, max_length=_MAX_CALLS)


def _speaker(value: Any) -> str | None:
    if not isinstance(value, dict) or "role" not in value:
        # Either branch then reports what is missing.
        return "<asked>"
    return "<assistant>" if value["role"] == "assistant" else "<asked>"


ChatMessage = Annotated[
    Annotated[AskedMessage, Tag("<asked>")] | Annotated[AssistantMessage, Tag("<assistant>")], Discriminator(_speaker)
]
Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=_MAX_MESSAGES)]


def _check_template(name: str) -> str:
    if name not in TEMPLATES:
        raise PydanticCustomError("template", "must be one of {known}", {"known": ", ".join(sorted(TEMPLATES))})
    return name


# A template by name; other servers take a Jinja program as `chat_template`.
TemplateName = Annotated[str, AfterValidator(_check_template), Field(json_schema_extra={"enum": sorted(TEMPLATES)})]

# Neutral values of the fields that every route with messages shares.
CHAT_NEUTRAL: Mapping[str, Sequence[object]] = {
    "tools": ([],),
    "functions": ([],),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
}


class ChatBody(SamplingBody):
    """The body of a request."""

    neutral: ClassVar[Mapping[str, Sequence[object]]] = {
        **SamplingBody.neutral,
        **CHAT_NEUTRAL,
        "tool_choice": ("none", "auto"),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "verbosity": ("medium",),
    }

    messages: Messages
    template: TemplateName | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=WHOLE_BOUND)
    image_transforms: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
