"""The schema: what is no request, what is refused by name, and what would take too much memory to read."""

import json
import time
from typing import Any

import pytest

from deployments.chat_schema import ChatBody, parse_body
from llava_core.errors import RequestError

USER = {"role": "user", "content": "hi"}


def _parse(**fields: Any) -> ChatBody:
    return parse_body(json.dumps({"messages": [USER], **fields}).encode(), max_text=1000)


def _refusal(body: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_body(body, max_text=1000)
    return caught.value


def _refused(**fields: Any) -> RequestError:
    return _refusal(json.dumps({"messages": [USER], **fields}).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("audio", {"voice": "x"}),
        ("modalities", ["audio"]),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("logit_bias", {"50": 1}),
        ("min_p", 0.1),
        ("repetition_penalty", 1.2),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(field: str, value: Any) -> None:
    error = _refused(**{field: value})
    assert (error.param, error.code) == (field, "unsupported_parameter")
    assert field in error.message


@pytest.mark.parametrize(
    "body",
    [b"", b"hello", b'{"messages": [', b"[1, 2]", b'"text"', b"\xff\xfe", b"[" * 60_000, b'{"messages": "\\ud800"}'],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    error = _refusal(body)
    assert error.code == "invalid_json"
    assert len(error.message) < 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(number: str) -> None:
    assert _refusal(b'{"messages": [{"role": "user", "content": "x"}], "temperature": %s}' % number.encode()).param == (
        "temperature"
    )


def test_what_was_sent_is_not_repeated_in_the_error() -> None:
    assert "secret" not in _refused(temperature="secret").message


def test_there_is_an_end_to_messages_and_parts() -> None:
    part = {"type": "text", "text": "x"}
    assert len(_parse(messages=[USER] * 1024).messages) == 1024
    assert _refused(messages=[USER] * 1025).param == "messages"
    assert len(_parse(messages=[{"role": "user", "content": [part] * 256}]).messages) == 1
    assert _refused(messages=[{"role": "user", "content": [part] * 257}]).param == "messages[0].content"


@pytest.mark.parametrize("filling", [b"[],", b"{},", b"1,"])
def test_small_values_in_great_numbers_are_refused_before_they_are_read(filling: bytes) -> None:
    body = b'{"messages": [{"role": "user", "content": "hi"}], "metadata": [%s1]}' % (filling * 1_000_000)
    started = time.monotonic()
    assert _refusal(body).code == "request_too_complex"
    assert time.monotonic() - started < 1


def test_a_text_of_brackets_and_a_large_picture_are_no_great_number_of_values() -> None:
    url = "data:image/png;base64," + "A" * 5_000_000
    content = [{"type": "text", "text": "[{," * 300}, {"type": "image_url", "image_url": {"url": url}}]
    assert len(_parse(messages=[{"role": "user", "content": content}]).messages[0].content) == 2
