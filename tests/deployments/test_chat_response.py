"""Answers, chunks and models look as OpenAI's do."""

from deployments.chat_response import Answer, model_body
from llava_core.types import TokenDelta
from tests.deployments.fakes import answer


def test_a_completion_is_the_joined_text_with_its_usage() -> None:
    body = Answer("chatcmpl-1", "m").completion(answer("Hel", "lo"))
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 11,
        "completion_tokens": 2,
        "total_tokens": 13,
        "prompt_tokens_details": {"image_tokens": 4, "cached_tokens": 0},
    }
    assert "timings" not in body


def test_a_stream_begins_with_the_role_and_ends_with_the_reason() -> None:
    form = Answer("chatcmpl-1", "m")
    chunks = [form.first_chunk(), *(chunk for delta in answer("Hel", "lo") for chunk in form.chunks(delta))]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-1"}
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_comes_last_without_choices_and_is_null_before() -> None:
    form = Answer("chatcmpl-1", "m", include_usage=True)
    chunks = [form.first_chunk(), *form.chunks(answer("x")[0])]
    assert [chunk["usage"] is None for chunk in chunks] == [True, True, True, False]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 12


def test_timings_are_on_the_last_chunk_whichever_that_is() -> None:
    for include_usage in (False, True):
        form = Answer("chatcmpl-1", "m", include_usage=include_usage, timings=True)
        chunks = list(form.chunks(answer("x")[0]))
        assert ["timings" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert set(chunks[-1]["timings"]) == {"prefill", "total"}


def test_a_delta_without_text_makes_no_chunk() -> None:
    assert list(Answer("chatcmpl-1", "m").chunks(TokenDelta("id", "", (5,)))) == []


def test_a_model_is_listed_as_openai_lists_it() -> None:
    assert model_body("m", 5) == {"id": "m", "object": "model", "created": 5, "owned_by": "llava-serve"}
