"""Assembled chunks equal the completion; damaged responses are reported."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_core.client.answers import Choice, Collector, Logprob, read_models, read_reply
from llava_core.client.errors import InvalidResponseError
from llava_core.types import Usage
from llava_core.views import ImageTransform, Window

TOKEN = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [{"token": "b", "logprob": -2.0}]}
COMPLETION = {
    "id": "chatcmpl-1",
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello"},
            "finish_reason": "stop",
            "logprobs": {"content": [TOKEN]},
        }
    ],
    "usage": {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "prompt_tokens_details": {"image_tokens": 3, "cached_tokens": 1},
    },
    "timings": {"prefill": 2.5, "total": 9},
    "image_transforms": [
        None,
        {
            "format": "DICOM",
            "photometric": "MONOCHROME2",
            "bits": 12,
            "rescale": [1.0, -1024.0],
            "window": {"centre": 40.0, "width": 400.0, "function": "LINEAR", "source": "file"},
        },
    ],
}
CHUNKS = [
    {"id": "chatcmpl-1", "model": "m", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"index": 0, "delta": {"content": "Hel"}, "logprobs": {"content": [TOKEN]}}], "usage": None},
    {"choices": [{"index": 0, "delta": {"content": "lo"}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {"content": None}, "finish_reason": "stop"}]},
    {
        "choices": [],
        "usage": COMPLETION["usage"],
        **{name: COMPLETION[name] for name in ("timings", "image_transforms")},
    },
]


def test_chunks_and_completion_give_the_same_reply() -> None:
    collector = Collector("r")
    texts = [delta.text for chunk in CHUNKS for delta in collector.add(chunk)]
    assert texts == ["", "Hel", "lo", ""]
    reply = read_reply(json.dumps(COMPLETION).encode(), "r")
    assert collector.reply() == reply
    assert reply.choices == (Choice("Hello", "stop", (Logprob("a", -0.5, b"a", (Logprob("b", -2.0),)),)),)
    assert reply.usage == Usage(5, 2, image_tokens=3, cached_tokens=1)
    assert (dict(reply.stage_ms), reply.request_id) == ({"prefill": 2.5, "total": 9.0}, "r")
    window = Window(40, 400, "LINEAR", "file")
    assert reply.image_transforms == (
        None,
        ImageTransform("DICOM", "MONOCHROME2", 12, rescale=(1.0, -1024.0), window=window),
    )


def test_fields_that_other_servers_omit_are_none() -> None:
    reply = read_reply(b'{"choices": [{"message": {"content": null}}]}')
    assert (reply.text, reply.finish_reason, reply.usage, reply.logprobs) == ("", None, None, ())


def test_an_answer_that_has_not_started_is_empty() -> None:
    reply = Collector().reply()
    assert (reply.text, reply.finish_reason) == ("", None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
FIELDS = ["choices", "usage", "timings", "image_transforms", "index", "message", "content", "logprobs", "finish_reason"]


@given(field=st.sampled_from(FIELDS), value=JSON)
def test_any_damage_is_either_harmless_or_reported(field: str, value: object) -> None:
    damaged = json.loads(json.dumps(COMPLETION))
    holder = next(each for each in (damaged, damaged["choices"][0], damaged["choices"][0]["message"]) if field in each)
    holder[field] = value
    try:
        reply = read_reply(json.dumps(damaged).encode())
    except InvalidResponseError:
        return
    assert isinstance(reply.text, str)


def test_a_completion_without_an_answer_is_an_error() -> None:
    with pytest.raises(InvalidResponseError, match="without an answer"):
        read_reply(b'{"choices": []}')


@pytest.mark.parametrize("body", [b"{}", b'{"data": [{}]}', b'{"data": [3]}', b"[]", b"x"])
def test_an_invalid_list_of_models_is_an_error(body: bytes) -> None:
    with pytest.raises(InvalidResponseError):
        read_models(body)
