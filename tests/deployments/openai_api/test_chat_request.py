"""Chat requests: which fields are used, ignored, or refused with their location."""

import json
from typing import Any

import pytest

from deployments.openai_api.chat_request import read_chat_request
from deployments.openai_api.reply_form import ReadRequest
from llava_core.errors import RequestError
from llava_core.request_limits import RequestLimits
from llava_core.types import GenerationRequest, ImagePart, ImageUrl, Message, SamplingParams, TextPart
from llava_core.views import DicomView
from tests.deployments.pictures import data_url, plain

USER = {"role": "user", "content": "hi"}


def _read(**fields: Any) -> ReadRequest:
    return read_chat_request(json.dumps({"messages": [USER], **fields}).encode(), "id", RequestLimits())


def _generation(**fields: Any) -> GenerationRequest:
    generation = _read(**fields).generation
    assert isinstance(generation, GenerationRequest)
    return generation


def _refusal(body: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read_chat_request(body, "id", RequestLimits())
    return caught.value


def _refused(**fields: Any) -> RequestError:
    return _refusal(json.dumps({"messages": [USER], **fields}).encode())


def _content(*parts: Any) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def test_a_bare_request_is_greedy_and_unary() -> None:
    assert _generation() == GenerationRequest("id", (Message("user", (TextPart("hi"),)),), SamplingParams())
    request = _read()
    assert (request.form.stream, request.form.include_usage, request.form.timings) == (False, False, False)


def test_parts_keep_their_order_and_pictures_their_bytes() -> None:
    picture = plain()
    image = {"type": "image_url", "image_url": {"url": data_url(picture)}}
    request = _generation(messages=_content({"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}))
    assert request.messages[0].parts == (TextPart("a"), ImagePart(picture), TextPart("b"))


@pytest.mark.parametrize("detail", ["low", "high", "auto", "original"])
def test_low_detail_is_passed_to_the_stages(detail: str) -> None:
    urls = data_url(plain()), "https://a.example/x.png"
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": detail}} for url in urls]
    message = _generation(messages=_content(*parts)).messages[0]
    assert message.parts == (ImagePart(plain(), detail == "low"), ImageUrl(urls[1], detail == "low"))


@pytest.mark.parametrize(
    ("dicom", "view"),
    [
        ({}, DicomView()),
        ({"frame": 3}, DicomView(3)),
        ({"window": 2}, DicomView(window=2)),
        ({"frame": 2, "window": [40, 400.5]}, DicomView(2, (40.0, 400.5))),
        (None, None),
    ],
)
def test_frame_and_window_of_a_dicom_file_are_passed_on(dicom: Any, view: DicomView | None) -> None:
    for url, part in (
        ("data:application/dicom;base64,AAAA", ImagePart(bytes(3), dicom=view)),
        ("https://example.org/x.dcm", ImageUrl("https://example.org/x.dcm", dicom=view)),
    ):
        image = {"type": "image_url", "image_url": {"url": url, "dicom": dicom}}
        assert _generation(messages=_content(image)).messages[0].parts == (part,)


def test_image_transforms_are_returned_only_on_request() -> None:
    assert not _read().form.image_transforms
    assert _read(image_transforms=True).form.image_transforms


def test_leading_system_messages_become_the_system_text() -> None:
    messages = [{"role": "system", "content": "A"}, {"role": "developer", "content": [{"type": "text", "text": "B"}]}]
    request = _read(messages=[*messages, USER])
    generation = _generation(messages=[*messages, USER])
    assert generation.system == "A\n\nB"
    assert [message.role for message in generation.messages] == ["user"]
    assert request.form.locate("messages[0].content[1].image_url") == "messages[2].content[1].image_url"
    assert request.form.locate("messages") == "messages"
    assert request.form.locate(None) is None


def test_log_probabilities_are_requested_as_in_openais_api() -> None:
    assert _read(logprobs=True).generation.sampling.logprobs == 0
    assert _read(logprobs=True, top_logprobs=5).generation.sampling.logprobs == 5
    assert _read(logprobs=False, top_logprobs=0).generation.sampling.logprobs is None


def test_the_number_of_answers_reaches_engine_and_reply() -> None:
    request = _read(n=3)
    assert (request.generation.sampling.n, request.form.num_answers) == (3, 3)


def test_assistant_and_tool_messages_are_part_of_the_conversation() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "area", "arguments": '{"side": 2}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
        {"role": "tool", "content": [{"type": "text", "text": "5"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "refusal": None, "tool_calls": []},
        {"role": "assistant", "content": "", "audio": None, "name": "x"},
        USER,
    ]
    said = [
        (m.role, *(p.text for p in m.parts if isinstance(p, TextPart))) for m in _generation(messages=messages).messages
    ]
    assert said == [
        ("user", "hi"),
        ("assistant", '{"name": "area", "arguments": {"side": 2}}'),
        ("user", "4"),
        ("user", "5"),
        ("assistant", "No."),
        ("assistant", ""),
        ("user", "hi"),
    ]


def test_a_tool_message_may_contain_a_picture() -> None:
    image = {"type": "image_url", "image_url": {"url": data_url(plain())}}
    messages = [USER, {"role": "assistant", "content": "a"}, {"role": "tool", "content": [image]}]
    assert _generation(messages=messages).num_images == 1


def test_tool_calls_and_refusals_count_as_text() -> None:
    call = {"function": {"name": "f", "arguments": "x" * 100}}
    for message in ({"role": "assistant", "tool_calls": [call]}, {"role": "assistant", "refusal": "x" * 100}):
        body = json.dumps({"messages": [message, USER]}).encode()
        with pytest.raises(RequestError) as caught:
            read_chat_request(body, "id", RequestLimits(max_text=90))
        assert caught.value.code == "text_too_long"


def test_max_completion_tokens_is_understood_and_named_in_errors() -> None:
    request = _read(max_completion_tokens=5)
    assert request.generation.sampling.max_tokens == 5
    assert request.form.locate("max_tokens") == "max_completion_tokens"
    assert _read(max_tokens=5).form.locate("max_tokens") == "max_tokens"
    assert _read(max_tokens=5, max_completion_tokens=5).generation.sampling.max_tokens == 5
    assert _refused(max_tokens=5, max_completion_tokens=6).param == "max_completion_tokens"


def test_a_temperature_that_would_overflow_is_greedy() -> None:
    assert _read(temperature=1e-30).generation.sampling.temperature == 0
    assert _read(top_k=-1).generation.sampling.top_k == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "a_field_of_next_year": [1]},
        {"n": 1, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logprobs": False},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "audio": None, "modalities": ["text"]},
        {"temperature": None, "top_p": None, "seed": None, "stop": None, "stream": None, "stream_options": None},
    ],
)
def test_fields_that_change_nothing_are_ignored(fields: dict) -> None:
    assert _read(**fields).generation.sampling == SamplingParams()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": "hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "function", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant"}, USER]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}, USER]}, "messages[0].tool_calls[0].function"),
        ({"messages": _content({"type": "refusal", "refusal": "no"})}, "messages[0].content[0]"),
        ({"messages": [USER, {"role": "system", "content": "late"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": _content("hi")}, "messages[0].content[0]"),
        ({"messages": _content({"type": "video_url"})}, "messages[0].content[0]"),
        ({"messages": _content({"type": "text"})}, "messages[0].content[0].text"),
        ({"messages": _content({"type": "text", "text": 5})}, "messages[0].content[0].text"),
        ({"messages": _content({"type": "image_url", "image_url": "x"})}, "messages[0].content[0].image_url"),
        ({"messages": _content({"type": "image_url", "image_url": {}})}, "messages[0].content[0].image_url.url"),
        (
            {"messages": _content({"type": "image_url", "image_url": {"url": 5}})},
            "messages[0].content[0].image_url.url",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop[0]"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 5}, "stop"),
        ({"stop": ["x" * 300]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": True}, "stream_options"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"model": 5}, "model"),
        ({"timings": 1}, "timings"),
    ],
)
def test_a_wrong_value_is_refused_with_its_location(fields: dict, param: str) -> None:
    error = _refused(**fields)
    assert error.param == param
    assert error.code in ("invalid_value", "missing_required_parameter")


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://example.org/x.png", "//example.org/x.png", "data:text/plain;base64,AAAA", "x"]
)
def test_a_url_that_is_neither_picture_data_nor_http_is_refused(url: str) -> None:
    error = _refused(messages=_content({"type": "image_url", "image_url": {"url": url}}))
    assert (error.param, error.code) == ("messages[0].content[0].image_url.url", "invalid_image_url")


@pytest.mark.parametrize("url", ["https://example.org/x.png", "HTTP://127.0.0.1/x.png"])
def test_a_web_url_is_left_to_the_stage_that_fetches(url: str) -> None:
    request = _read(messages=_content({"type": "image_url", "image_url": {"url": url}}))
    assert request.generation.messages[0].parts == (ImageUrl(url),)


def test_pictures_belong_to_the_user() -> None:
    image = {"type": "image_url", "image_url": {"url": data_url(plain())}}
    for role in ("system", "assistant"):
        error = _refused(messages=[USER, {"role": role, "content": [image]}][:: -1 if role == "system" else 1])
        assert error.param is not None
        assert error.param.endswith("content[0]")


def test_the_text_limit_counts_all_messages() -> None:
    messages = [{"role": "system", "content": "12345"}, *_content({"type": "text", "text": "6789"})]
    body = json.dumps({"messages": messages}).encode()
    assert read_chat_request(body, "id", RequestLimits(max_text=9)).form.num_leading == 1
    with pytest.raises(RequestError, match="have 9 characters; at most 8") as caught:
        read_chat_request(body, "id", RequestLimits(max_text=8))
    assert (caught.value.param, caught.value.code) == ("messages", "text_too_long")


def test_the_reply_form_holds_no_picture() -> None:
    image = {"type": "image_url", "image_url": {"url": data_url(plain())}}
    assert len(repr(_read(messages=_content(image)).form)) < 200
