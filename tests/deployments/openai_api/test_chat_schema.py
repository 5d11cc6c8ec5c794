"""The schema of chats: which fields are refused by name, and how much a conversation may hold."""

import json
from typing import Any

import pytest

from deployments.openai_api.chat_schema import AssistantMessage, ChatBody
from deployments.openai_api.schema import parse_body
from llava_core.errors import RequestError
from llava_core.prompts.templates import TEMPLATES

USER = {"role": "user", "content": "hi"}


def _parse(**fields: Any) -> ChatBody:
    return parse_body(json.dumps({"messages": [USER], **fields}).encode(), ChatBody, max_text=1000)


def _refused(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        _parse(**fields)
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("structured_outputs", {"json": {}}),
        ("audio", {"voice": "x"}),
        ("modalities", ["audio"]),
        ("web_search_options", {}),
        ("verbosity", "low"),
        ("prompt_logprobs", 0),
        ("best_of", 2),
        ("echo", True),
        ("add_generation_prompt", False),
        ("continue_final_message", True),
        ("chat_template", "{{ x }}"),
        ("chat_template_kwargs", {"a": 1}),
        ("mm_processor_kwargs", {"a": 1}),
        ("media_io_kwargs", {"a": 1}),
        ("bad_words", ["x"]),
        ("allowed_token_ids", [1]),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
    ],
)
def test_unsupported_fields_that_would_change_the_answer_are_refused_by_name(field: str, value: Any) -> None:
    error = _refused(**{field: value})
    assert (error.param, error.code) == (field, "unsupported_parameter")
    assert field in error.message


def test_a_template_must_be_a_known_one() -> None:
    for name in TEMPLATES:
        assert _parse(template=name).template == name
    for name in ("v9", "", "VICUNA_V1", 5, ["v0"]):
        error = _refused(template=name)
        assert (error.param, error.code) == ("template", "invalid_value")
    assert _refused(template="v9").message == f"template: must be one of {', '.join(sorted(TEMPLATES))}"


@pytest.mark.parametrize(
    ("dicom", "where"),
    [
        ({"windw": 1}, ".windw"),
        ({"frame": 0}, ".frame"),
        ({"frame": "1"}, ".frame"),
        ({"frame": 2**40}, ".frame"),
        ({"window": 0}, ".window"),
        ({"window": True}, ".window"),
        ({"window": "1"}, ".window"),
        ({"window": [40]}, ".window"),
        ({"window": [40, 400, 1]}, ".window"),
        ({"window": [40, 0]}, ".window"),
        ({"window": [40, "400"]}, ".window[1]"),
        (5, ""),
    ],
)
def test_a_dicom_view_must_have_a_valid_frame_and_window(dicom: Any, where: str) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:application/dicom;base64,AAAA", "dicom": dicom}}
    error = _refused(messages=[{"role": "user", "content": [image]}])
    assert error.param == f"messages[0].content[0].image_url.dicom{where}"


def test_the_numbers_of_messages_and_parts_are_bounded() -> None:
    part = {"type": "text", "text": "x"}
    assert len(_parse(messages=[USER] * 1024).messages) == 1024
    assert _refused(messages=[USER] * 1025).param == "messages"
    assert len(_parse(messages=[{"role": "user", "content": [part] * 256}]).messages) == 1
    assert _refused(messages=[{"role": "user", "content": [part] * 257}]).param == "messages[0].content"


def test_only_an_assistant_message_may_have_no_content() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = _parse(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}]).messages[0]
    assert isinstance(message, AssistantMessage)
    assert _refused(messages=[{"role": "tool", "tool_call_id": "1"}]).param == "messages[0].content"


@pytest.mark.parametrize("role", ["root", None, ["user"]])
def test_an_unknown_role_is_refused_listing_the_known_ones(role: Any) -> None:
    error = _refused(messages=[{"role": role, "content": "hi"}])
    assert error.param == "messages[0].role"
    for known in ("system", "developer", "user", "tool", "assistant"):
        assert repr(known) in error.message
        call = {"function": {"name": "f", "arguments": "{}"}}
        assert _parse(messages=[{"role": known, "content": "hi", "tool_calls": [call]}])


def test_an_unknown_part_type_is_refused_listing_the_known_ones() -> None:
    error = _refused(messages=[{"role": "user", "content": [{"type": "video"}]}])
    for known in ("text", "image_url", "refusal"):
        assert repr(known) in error.message
    assert _parse(messages=[{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}])


def test_only_the_text_response_format_is_accepted() -> None:
    assert _parse(response_format={"type": "text", "json_schema": None})
    assert _refused(response_format={"type": "json_object"}).param == "response_format"
    assert _refused(response_format={}).param == "response_format"
