"""Properties of every reply: choices in order, token counts at the end, times on its last part."""

from dataclasses import replace
from typing import Any

import pytest

from deployments.openai_api.chat_response import ChatAnswer
from deployments.openai_api.completion_response import CompletionAnswer
from deployments.openai_api.reply_form import ReplyForm
from deployments.openai_api.response_parts import Answer, model_body, usage_body
from llava_core.types import TokenDelta, Usage
from llava_core.views import ImageTransform, Window
from tests.deployments.fakes import answer


@pytest.fixture(params=[ChatAnswer, CompletionAnswer])
def kind(request: pytest.FixtureRequest) -> type[Answer]:
    found: type[Answer] = request.param
    return found


def _two_answers() -> list[TokenDelta]:
    """Return two answers whose deltas alternate; the second ends first."""
    usage = Usage(11, 4)
    return [
        TokenDelta("id", "a", (1,), index=1),
        TokenDelta("id", "b", (1,), index=0),
        TokenDelta("id", "c", (2,), finish_reason="length", index=1),
        TokenDelta("id", "d", (2,), finish_reason="stop", index=0, usage=usage),
    ]


def _text(choice: dict[str, Any]) -> str:
    inner = choice.get("message") or choice.get("delta") or choice
    return str(inner.get("content", inner.get("text", "")))


def test_choices_of_an_unstreamed_reply_are_in_order(kind: type[Answer]) -> None:
    body = kind("x", "m", ReplyForm(num_answers=2)).completion(_two_answers())
    assert [(c["index"], _text(c), c["finish_reason"]) for c in body["choices"]] == [
        (0, "bd", "stop"),
        (1, "ac", "length"),
    ]
    assert body["usage"]["completion_tokens"] == 4
    assert (body["id"], body["model"], body["object"]) == ("x", "m", kind.kind)
    assert "timings" not in body


def test_chunks_carry_the_index_of_their_answer(kind: type[Answer]) -> None:
    form = kind("x", "m", ReplyForm(num_answers=2))
    chunks = [*form.first_chunks(), *(chunk for delta in _two_answers() for chunk in form.chunks(delta))]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index, (text, reason) in enumerate([("bd", "stop"), ("ac", "length")]):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(map(_text, own)) == text
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [reason]
        assert own[-1]["finish_reason"] == reason
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_comes_last_without_choices_and_is_null_before(kind: type[Answer]) -> None:
    form = kind("x", "m", ReplyForm(include_usage=True))
    chunks = [*form.first_chunks(), *form.chunks(answer("x")[0])]
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 12


def test_timings_are_on_the_last_chunk_with_or_without_usage(kind: type[Answer]) -> None:
    for include_usage in (False, True):
        form = kind("x", "m", ReplyForm(include_usage=include_usage, timings=True))
        chunks = list(form.chunks(answer("x")[0]))
        assert ["timings" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert set(chunks[-1]["timings"]) == {"prefill", "total"}


def test_a_delta_without_text_yields_no_chunk(kind: type[Answer]) -> None:
    assert list(kind("x", "m").chunks(TokenDelta("id", "", (5,)))) == []


def test_usage_details_image_and_cached_tokens() -> None:
    assert usage_body(Usage(11, 2, 4, 8)) == {
        "prompt_tokens": 11,
        "completion_tokens": 2,
        "total_tokens": 13,
        "prompt_tokens_details": {"image_tokens": 4, "cached_tokens": 8},
    }


def test_a_model_is_listed_as_openai_lists_it() -> None:
    assert model_body("m", 5) == {"id": "m", "object": "model", "created": 5, "owned_by": "llava-serve"}


def test_image_transforms_are_on_the_last_chunk_on_request(kind: type[Answer]) -> None:
    window = Window(40.0, 400.0, "LINEAR", "request")
    seen = ImageTransform(format="DICOM", photometric="MONOCHROME1", bits=12, window=window, is_inverted=True)
    deltas = [*_two_answers()[:-1], replace(_two_answers()[-1], transforms=(None, seen))]
    assert "image_transforms" not in kind("x", "m", ReplyForm(num_answers=2)).completion(deltas)
    form = kind("x", "m", ReplyForm(num_answers=2, image_transforms=True))
    none, transform = form.completion(deltas)["image_transforms"]
    assert none is None
    assert (transform["photometric"], transform["is_inverted"], transform["frame"]) == ("MONOCHROME1", True, 1)
    assert transform["window"] == {"centre": 40.0, "width": 400.0, "function": "LINEAR", "source": "request"}
    chunks = [chunk for delta in deltas for chunk in form.chunks(delta)]
    assert ["image_transforms" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
