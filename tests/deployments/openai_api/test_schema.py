"""Any JSON body: invalid bodies, fields refused by name, and bodies that would take too much memory to parse."""

import json
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from deployments.openai_api.chat_schema import ChatBody
from deployments.openai_api.schema import Body, parse_body
from llava_core.errors import RequestError

USER = {"role": "user", "content": "hi"}


def _parse(**fields: Any) -> ChatBody:
    return parse_body(json.dumps({"messages": [USER], **fields}).encode(), ChatBody, max_text=1000)


def _refusal(body: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_body(body, ChatBody, max_text=1000)
    return caught.value


def _refused(**fields: Any) -> RequestError:
    return _refusal(json.dumps({"messages": [USER], **fields}).encode())


class _Plain(Body):
    neutral: ClassVar[dict[str, Sequence[object]]] = {"echo": (False,), "tools": ([],), "audio": ()}


@pytest.mark.parametrize("body", [b'{"echo": true}', b'{"tools": [1]}', b'{"audio": {}}', b'{"echo": "no"}'])
def test_unsupported_fields_are_refused_by_name(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_body(body, _Plain, max_text=1000)
    assert caught.value.param == next(iter(json.loads(body)))
    assert caught.value.code == "unsupported_parameter"


def test_unknown_fields_and_values_without_effect_are_ignored() -> None:
    assert parse_body(b'{"echo": false, "tools": [], "audio": null, "of_next_year": [1]}', _Plain, max_text=1000)


@pytest.mark.parametrize(
    "body",
    [b"", b"hello", b'{"messages": [', b"[1, 2]", b'"text"', b"\xff\xfe", b"[" * 60_000, b'{"messages": "\\ud800"}'],
)
def test_a_body_that_is_not_a_json_object_is_refused(body: bytes) -> None:
    error = _refusal(body)
    assert error.code == "invalid_json"
    assert len(error.message) < 200


def test_a_long_name_is_truncated_in_the_error() -> None:
    error = _refused(logit_bias={"9" * 5000: 101})
    assert error.param == f"logit_bias.{'9' * 100}"
    assert len(error.message) < 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_nonfinite_numbers_are_refused(number: str) -> None:
    assert _refusal(b'{"messages": [{"role": "user", "content": "x"}], "temperature": %s}' % number.encode()).param == (
        "temperature"
    )


def test_the_error_does_not_quote_what_was_sent() -> None:
    assert "secret" not in _refused(temperature="secret").message


@pytest.mark.parametrize("filling", [b"[],", b"{},", b"1,"])
def test_too_many_small_values_are_refused_before_parsing(filling: bytes) -> None:
    body = b'{"messages": [{"role": "user", "content": "hi"}], "metadata": [%s1]}' % (filling * 1_000_000)
    started = time.process_time()
    assert _refusal(body).code == "request_too_complex"
    assert time.process_time() - started < 1


def test_brackets_in_a_text_and_a_large_picture_do_not_count_as_values() -> None:
    url = "data:image/png;base64," + "A" * 5_000_000
    content = [{"type": "text", "text": "[{," * 300}, {"type": "image_url", "image_url": {"url": url}}]
    assert len(_parse(messages=[{"role": "user", "content": content}]).messages[0].content) == 2
