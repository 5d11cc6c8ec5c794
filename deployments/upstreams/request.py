"""A request for a model that another server answers for: the client's body, with as few changes as possible.

Only fields named here or in the configuration are sent on; any other is refused by name, because some fields of other
engines name addresses, files or code. Pictures are only sent as data URLs. Knows neither HTTP nor Ray.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import ConfigDict, Field

from deployments.openai_api.chat_request import check_text, read_part
from deployments.openai_api.chat_schema import ChatBody, ChatMessage, ImageContent, Messages, TextContent
from deployments.openai_api.completion_request import CompletionBody, Prompt, read_prompts
from deployments.openai_api.reply_form import ReplyForm
from deployments.openai_api.response_parts import Json
from deployments.openai_api.sampling_schema import WHOLE_BOUND, StreamOptions
from deployments.openai_api.schema import Body, asks_for_nothing, parse_body
from deployments.upstreams.pictures import PortableImage
from llava_core.errors import RequestError
from llava_core.images.loading import ImageLimits
from llava_core.request_limits import RequestLimits, check_num_images
from llava_core.types import GenerationRequest, ImagePart, ImageUrl, Message, SamplingParams, TextPart

# OpenAI's fields: how an answer is sampled, whose it is and where it ends.
_OPENAI = """
    max_tokens temperature top_p frequency_penalty presence_penalty logit_bias logprobs seed stop user metadata store
    service_tier safety_identifier prompt_cache_key prompt_cache_retention
""".split()
_OPENAI_CHAT = """
    max_completion_tokens top_logprobs tools tool_choice parallel_tool_calls functions function_call response_format
    reasoning_effort verbosity prediction
""".split()
# Fields of vLLM and SGLang, none of which names anything outside the request.
_ENGINES = """
    top_k min_p repetition_penalty length_penalty stop_token_ids min_tokens ignore_eos skip_special_tokens
    spaces_between_special_tokens include_stop_str_in_output bad_words allowed_token_ids truncate_prompt_tokens
    add_special_tokens structured_outputs guided_json guided_regex guided_choice guided_grammar regex ebnf
""".split()
_ENGINES_CHAT = ["add_generation_prompt", "continue_final_message"]


class ModelName(Body):
    """The one field that decides who answers."""

    # Parsed before the rest, which may be megabytes of pictures, is turned into objects.
    model_config = ConfigDict(extra="ignore")

    model: str | None = None


class _ForwardedBody(Body):
    """The fields that are checked of a body that is sent on."""

    # Fields that are not sent on, with those values that change nothing; `forwarded` are sent on.
    ignored: ClassVar[Mapping[str, Sequence[object]]] = {}
    forwarded: ClassVar[Set[str]] = frozenset()

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, lt=WHOLE_BOUND)
    timings: bool | None = None


class ForwardedChat(_ForwardedBody):
    """A chat."""

    ignored: ClassVar[Mapping[str, Sequence[object]]] = ChatBody.neutral
    forwarded: ClassVar[Set[str]] = frozenset({*_OPENAI, *_OPENAI_CHAT, *_ENGINES, *_ENGINES_CHAT})

    messages: Messages
    image_transforms: bool | None = None


class ForwardedCompletion(_ForwardedBody):
    """A completion."""

    ignored: ClassVar[Mapping[str, Sequence[object]]] = CompletionBody.neutral
    forwarded: ClassVar[Set[str]] = frozenset({*_OPENAI, *_ENGINES, "suffix", "echo", "response_format"})

    prompt: Prompt


@dataclass(frozen=True)
class ForwardedRequest:
    """A body for another server, and the form of its answer. `pictures` has the pictures of `payload` in order, at the
    same indices of messages and parts; `_places` are the objects in `payload` that get their URLs."""

    payload: Json = field(repr=False)
    form: ReplyForm
    pictures: GenerationRequest | None = None
    _places: tuple[Json, ...] = field(default=(), repr=False)

    def encoded(self, pictures: Sequence[PortableImage] = ()) -> bytes:
        """The body, with these pictures in it. To be called once: it puts the URLs into `payload`."""
        for place, picture in zip(self._places, pictures, strict=True):
            place["url"] = f"data:{picture.media_type};base64,{b64encode(picture.data).decode('ascii')}"
        return json.dumps(self.payload, separators=(",", ":")).encode()


def read_forwarded_chat(
    body: bytes, request_id: str, limits: RequestLimits, *, model: str, forward: Set[str]
) -> ForwardedRequest:
    """Parses a body. Raises RequestError naming field and cause. `model` is the model's name on the other server."""
    parsed = parse_body(body, ForwardedChat, max_text=limits.max_text)
    payload = _payload(parsed, model, forward)
    _check_number(parsed.n or 1, limits, "n")
    check_text(parsed.messages, limits.max_text)
    places: list[Json] = []
    found: list[Message] = []
    payload["messages"] = []
    for index, message in enumerate(parsed.messages):
        sent = message.model_dump(exclude_unset=True, exclude={"content"})
        content, parts = _content(message, f"messages[{index}].content", limits.image, places)
        payload["messages"].append(sent | content)
        found.append(Message("user", parts))
    check_num_images(len(places), "messages", limits)
    form = _form(parsed, num_answers=parsed.n or 1, image_transforms=bool(parsed.image_transforms))
    pictures = GenerationRequest(request_id, tuple(found), SamplingParams()) if places else None
    return ForwardedRequest(payload, form, pictures, tuple(places))


def read_forwarded_completion(
    body: bytes, _request_id: str, limits: RequestLimits, *, model: str, forward: Set[str]
) -> ForwardedRequest:
    """See read_forwarded_chat."""
    parsed = parse_body(body, ForwardedCompletion, max_text=limits.max_text)
    payload = _payload(parsed, model, forward)
    num_answers = len(read_prompts(parsed.prompt, limits)) * (parsed.n or 1)
    _check_number(num_answers, limits, "n" if parsed.n else "prompt")
    payload["prompt"] = parsed.prompt
    return ForwardedRequest(payload, _form(parsed, num_answers=num_answers))


def _form(parsed: _ForwardedBody, **more: Any) -> ReplyForm:
    return ReplyForm(
        model=parsed.model,
        stream=bool(parsed.stream),
        include_usage=parsed.stream_options is not None and parsed.stream_options.include_usage,
        timings=bool(parsed.timings),
        **more,
    )


def _payload(parsed: _ForwardedBody, model: str, forward: Set[str]) -> Json:
    payload: Json = {"model": model, "stream": bool(parsed.stream)}
    if parsed.stream:
        # This service counts tokens, whether or not the client wants to know them.
        payload["stream_options"] = {"include_usage": True}
    if parsed.n is not None:
        payload["n"] = parsed.n
    for name, value in (parsed.model_extra or {}).items():
        if value is None:
            continue
        if name in parsed.forwarded or name in forward:
            payload[name] = value
        elif not asks_for_nothing(value, parsed.ignored.get(name, ())):
            raise RequestError(
                f"{name[:100]} is not sent on to the server that answers for this model; leave it out",
                param=name[:100],
                code="unsupported_parameter",
            )
    return payload


def _check_number(num_answers: int, limits: RequestLimits, param: str) -> None:
    if num_answers > limits.max_n:
        raise RequestError(f"{num_answers} answers are asked for; at most {limits.max_n} are allowed", param=param)


def _content(
    message: ChatMessage, where: str, limits: ImageLimits, places: list[Json]
) -> tuple[Json, tuple[TextPart | ImagePart | ImageUrl, ...]]:
    """A message's content as it is sent on, and its pictures at their indices among the parts."""
    if not isinstance(message.content, list):
        return ({"content": message.content} if "content" in message.model_fields_set else {}), ()
    sent: list[Json] = []
    found: list[TextPart | ImagePart | ImageUrl] = []
    for position, part in enumerate(message.content):
        # Only the known fields of each part: other engines take further fields for addresses.
        if isinstance(part, ImageContent):
            place: Json = {} if "detail" not in part.image_url.model_fields_set else {"detail": part.image_url.detail}
            places.append(place)
            sent.append({"type": "image_url", "image_url": place})
            found.append(read_part(part, f"{where}[{position}]", limits))
        else:
            text = part.text if isinstance(part, TextContent) else part.refusal
            sent.append({"type": part.type, part.type: text})
            found.append(TextPart(""))
    return {"content": sent}, tuple(found)
