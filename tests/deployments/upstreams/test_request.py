"""Forwarding a client's body: only known fields, and only necessary changes."""

import base64
import json
from typing import Any

import pytest

from deployments.upstreams.pictures import PortableImage
from deployments.upstreams.request import ForwardedRequest, read_forwarded_chat, read_forwarded_completion
from llava_core.errors import RequestError
from llava_core.request_limits import RequestLimits
from llava_core.types import ImagePart, ImageUrl, TextPart
from tests.deployments.pictures import data_url, plain

HELLO = [{"role": "user", "content": "hi"}]
LIMITS = RequestLimits(max_images=2, max_text=1000, max_n=4)


def _chat(*, forward: frozenset[str] = frozenset(), **fields: Any) -> ForwardedRequest:
    body = json.dumps({"model": "ours", "messages": HELLO, **fields}).encode()
    return read_forwarded_chat(body, "id", LIMITS, model="theirs/7b", forward=forward)


def _completion(**fields: Any) -> ForwardedRequest:
    body = json.dumps({"model": "ours", "prompt": "Once", **fields}).encode()
    return read_forwarded_completion(body, "id", LIMITS, model="theirs/7b", forward=frozenset())


def test_only_the_model_name_changes() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "é"}], "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [_call()]},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
        {"role": "system", "content": "Now in French."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": "and?"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "x-deep": [1.5, None]}}}]
    sent = {
        "messages": messages,
        "tools": tools,
        "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
        "temperature": 0.7,
        "top_k": 5,
        "logit_bias": {"7": -100},
        "seed": 2**60,
        "n": 2,
        "max_completion_tokens": 9,
    }
    assert json.loads(_chat(**sent).encoded()) == {**sent, "model": "theirs/7b", "stream": False}


def _call() -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


def test_a_completion_is_forwarded_in_each_of_its_forms() -> None:
    for prompt in ("Once", [1, 2], ["a", "b"], [[1], [2, 3]]):
        sent = {"prompt": prompt, "suffix": "end", "echo": True, "logprobs": 3}
        assert json.loads(_completion(**sent).encoded()) == {**sent, "model": "theirs/7b", "stream": False}


def test_usage_is_always_requested_for_a_stream() -> None:
    for options, wants in ((None, False), ({"include_usage": False}, False), ({"include_usage": True}, True)):
        asked = _chat(stream=True, stream_options=options)
        sent = json.loads(asked.encoded())
        assert (sent["stream"], sent["stream_options"]) == (True, {"include_usage": True})
        assert asked.form.include_usage is wants
    assert "stream_options" not in json.loads(_chat(stream_options={"include_usage": True}).encoded())


@pytest.mark.parametrize(
    "field",
    [
        # SGLang's and vLLM's fields for addresses, files, programs and pickles.
        "bootstrap_host",
        "kv_transfer_params",
        "lora_path",
        "custom_logit_processor",
        "chat_template",
        "chat_template_kwargs",
        "prompt_embeds",
        "mm_processor_kwargs",
        "session_params",
        "best_of",
        "use_beam_search",
        "audio",
        "nobody has heard of",
        "template",
    ],
)
def test_an_unlisted_field_is_refused_and_nothing_is_sent(field: str) -> None:
    with pytest.raises(RequestError, match="is not sent on") as raised:
        _chat(**{field: {"remote_host": "10.0.0.1"}})
    assert (raised.value.param, raised.value.code) == (field, "unsupported_parameter")


def test_a_field_without_effect_is_left_out() -> None:
    sent = json.loads(_chat(chat_template=None, use_beam_search=False, best_of=1, modalities=["text"]).encoded())
    assert set(sent) == {"model", "stream", "messages"}


def test_the_configuration_may_list_further_fields() -> None:
    kwargs = {"enable_thinking": False}
    sent = json.loads(_chat(chat_template_kwargs=kwargs, forward=frozenset({"chat_template_kwargs"})).encoded())
    assert sent["chat_template_kwargs"] == kwargs


def _picture(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def test_picture_urls_are_replaced_by_data_urls() -> None:
    address = "https://10.0.0.1/secret.png"
    content = [{"type": "text", "text": "x"}, _picture(address, detail="low"), _picture(data_url(plain()))]
    asked = _chat(messages=[*HELLO, {"role": "user", "content": content}])
    assert asked.pictures is not None
    assert asked.pictures.messages[1].parts == (TextPart(""), ImageUrl(address, low_detail=True), ImagePart(plain()))
    given = (PortableImage("image/jpeg", b"one"), PortableImage("image/png", b"two"))
    body = asked.encoded(given)
    assert b"10.0.0.1" not in body
    assert json.loads(body)["messages"][1]["content"] == [
        {"type": "text", "text": "x"},
        _picture(f"data:image/jpeg;base64,{base64.b64encode(b'one').decode()}", detail="low"),
        _picture(f"data:image/png;base64,{base64.b64encode(b'two').decode()}"),
    ]


def test_a_picture_without_its_bytes_is_never_sent() -> None:
    asked = _chat(messages=[{"role": "user", "content": [_picture("https://example.com/a.png")]}])
    with pytest.raises(ValueError, match="zip"):
        asked.encoded()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "http://10.0.0.1/"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_data": "x"}},
        {"image_url": "http://10.0.0.1/"},
        "text",
    ],
)
def test_other_types_of_parts_are_refused(part: object) -> None:
    with pytest.raises(RequestError) as raised:
        _chat(messages=[{"role": "user", "content": [part]}])
    assert str(raised.value.param).startswith("messages[0].content[0]")


def test_extra_fields_of_a_part_that_could_hold_a_url_are_dropped() -> None:
    text = {"type": "text", "text": "x", "image_url": {"url": "http://10.0.0.1/"}}
    picture = {**_picture(data_url(plain()), video_url="http://10.0.0.1/"), "audio_url": "http://10.0.0.1/"}
    body = _chat(messages=[{"role": "user", "content": [text, picture]}]).encoded([PortableImage("image/png", b"p")])
    assert b"10.0.0.1" not in body


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": [{"role": "user", "content": [_picture(data_url(plain()))] * 3}]}, "messages", "too_many_images"),
        ({"messages": [{"role": "user", "content": "x" * 1001}]}, "messages", "text_too_long"),
        ({"n": 5}, "n", "invalid_value"),
        ({"messages": [{"role": "user", "content": [_picture("file:///etc/passwd")]}]}, None, "invalid_image_url"),
        ({"messages": []}, "messages", "invalid_value"),
    ],
)
def test_the_services_limits_apply(fields: dict[str, Any], param: str | None, code: str) -> None:
    with pytest.raises(RequestError) as raised:
        _chat(**fields)
    assert raised.value.code == code
    assert raised.value.param == (param or "messages[0].content[0].image_url.url")


def test_each_of_several_prompts_counts_as_an_answer() -> None:
    assert _completion(prompt=["a", "b"], n=2).form.num_answers == 4
    with pytest.raises(RequestError, match="6 answers are asked for; at most 4"):
        _completion(prompt=["a", "b", "c"], n=2)
    with pytest.raises(RequestError, match="at most 1000"):
        _completion(prompt="x" * 1001)
