"""Answers to chats have OpenAI's form."""

import json

from deployments.openai_api.chat_response import ChatAnswer
from llava_core.types import TokenDelta, TokenLogprob
from tests.deployments.fakes import answer

BYTES = {1: b" red", 2: b"\xc3", 3: b"\xa9", 4: b"</s>"}


def test_a_completion_is_the_joined_text() -> None:
    body = ChatAnswer("chatcmpl-1", "m").completion(answer("Hel", "lo"))
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ]


def test_a_stream_begins_with_the_role_and_ends_with_the_finish_reason() -> None:
    form = ChatAnswer("chatcmpl-1", "m")
    chunks = [*form.first_chunks(), *(chunk for delta in answer("Hel", "lo") for chunk in form.chunks(delta))]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_log_probabilities_have_text_and_bytes_of_each_token() -> None:
    delta = TokenDelta("id", "", (2,), logprobs=(TokenLogprob(2, -0.5, ((2, -0.5), (1, -1.5))),), token_bytes=BYTES)
    [chunk] = ChatAnswer("chatcmpl-1", "m").chunks(delta)
    assert chunk["choices"][0]["delta"] == {"content": ""}
    half = {"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3]}
    red = {"token": " red", "logprob": -1.5, "bytes": list(b" red")}
    assert chunk["choices"][0]["logprobs"] == {"content": [half | {"top_logprobs": [half, red]}], "refusal": None}


def test_log_probabilities_of_a_completion_are_those_of_its_deltas() -> None:
    first, last = answer("é", "")
    deltas = [
        TokenDelta("id", "é", (2, 3), logprobs=(TokenLogprob(2, -1.0), TokenLogprob(3, -2.0)), token_bytes=BYTES),
        TokenDelta("id", "", (4,), "stop", last.usage, logprobs=(TokenLogprob(4, -3.0),), token_bytes=BYTES),
    ]
    content = ChatAnswer("chatcmpl-1", "m").completion(deltas)["choices"][0]["logprobs"]["content"]
    assert bytes(byte for each in content for byte in each["bytes"]).decode() == first.text + "</s>"
    assert [each["logprob"] for each in content] == [-1.0, -2.0, -3.0]


def test_a_log_probability_of_minus_infinity_is_a_finite_number() -> None:
    delta = TokenDelta("id", "x", (1,), logprobs=(TokenLogprob(1, float("-inf")),), token_bytes=BYTES)
    [chunk] = ChatAnswer("chatcmpl-1", "m").chunks(delta)
    assert json.loads(json.dumps(chunk, allow_nan=False))["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999
