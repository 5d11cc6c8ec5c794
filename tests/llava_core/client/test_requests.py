"""The JSON of a request, field by field."""

import json
from typing import Any

import pytest

from llava_core.client.messages import user_message
from llava_core.client.requests import chat_body, chat_call


def test_a_stream_asks_for_usage() -> None:
    call = chat_call([user_message("?")], None, {"max_tokens": 3, "deadline_s": 2.5}, stream=True)
    assert (call.method, call.path, call.deadline_s) == ("POST", "/v1/chat/completions", 2.5)
    assert json.loads(call.content or b"") == {
        "messages": [{"role": "user", "content": "?"}],
        "max_tokens": 3,
        "timings": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_extra_fields_are_passed_on_and_disabled_ones_left_out() -> None:
    call = chat_call([user_message("?")], "s", {"timings": False, "extra": {"priority": 1}}, stream=False)
    body = json.loads(call.content or b"")
    assert body == chat_body([user_message("?")], "s", priority=1)
    assert body["messages"][0] == {"role": "system", "content": "s"}


def test_unknown_options_are_refused() -> None:
    for name, hint in (("temprature", "did you mean temperature"), ("guided_json", "go into extra")):
        options: Any = {name: 1}
        with pytest.raises(TypeError, match=f"{name} is not an option .* {hint}"):
            chat_call([], None, options, stream=False)


def test_numbers_that_json_cannot_express_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        chat_call([], None, {"temperature": float("nan")}, stream=False)


def test_the_repr_of_a_call_does_not_contain_pictures() -> None:
    assert "iVBOR" not in repr(chat_call([user_message("?", [b"\x89PNG\r\n\x1a\n"])], None, {}, stream=False))
