"""Another server's answers: passed on under our names, counted, and refused where they are invalid."""

from typing import Any

import pytest

from deployments.messages import UpstreamDelta
from deployments.openai_api.reply_form import ReplyForm
from deployments.upstreams.answer import AnswerReader, NoAnswerError, UpstreamAnswer, read_object
from llava_core.types import Usage
from llava_core.views import ImageTransform


def _answer(**form: Any) -> UpstreamAnswer:
    return UpstreamAnswer("chatcmpl-ours", "ours", ReplyForm(**form), "chat.completion.chunk")


def _chunk(*contents: str, **more: Any) -> dict[str, Any]:
    choices = [
        {"index": index, "delta": {"content": text}, "finish_reason": None} for index, text in enumerate(contents)
    ]
    head = {"id": "theirs", "object": "chat.completion.chunk", "created": 5, "model": "theirs/7b"}
    return {**head, "choices": choices, **more}


USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


def _streamed(*chunks: dict[str, Any], **form: Any) -> tuple[list[UpstreamDelta], list[dict[str, Any]]]:
    answer = _answer(stream=True, **form)
    reader = AnswerReader(answer, "delta")
    deltas = [delta for delta in map(reader.chunk, chunks) if delta is not None]
    deltas.append(reader.end(stage_ms={"upstream": 2.0}, transforms=(None,)))
    return deltas, [body for delta in deltas for body in answer.chunks(delta)]


def test_chunks_are_passed_on_under_our_names() -> None:
    first = _chunk("a", system_fingerprint="f", kv_transfer_params={"remote_host": "10.0.0.1"}, provider="x")
    first["choices"][0]["delta"]["reasoning_content"] = "hm"
    _, [body] = _streamed(first, _chunk(choices=[], usage=USAGE))
    kept = {name: first[name] for name in ("object", "created", "choices", "system_fingerprint")}
    assert body == {"id": "chatcmpl-ours", "model": "ours", **kept}


def test_usage_comes_last_and_only_on_request() -> None:
    chunks = _chunk("a", usage=None), _chunk("b", usage=USAGE), _chunk(choices=[], usage=USAGE)
    _, without = _streamed(*chunks)
    assert len(without) == 2
    assert all("usage" not in body for body in without)
    _, with_usage = _streamed(*chunks, include_usage=True)
    assert [body["usage"] for body in with_usage] == [None, USAGE, USAGE]
    assert with_usage[-1]["choices"] == []


def test_tokens_are_counted_as_they_arrive_then_by_the_servers_count() -> None:
    role = _chunk("")
    role["choices"][0]["delta"] = {"role": "assistant", "content": ""}
    deltas, _ = _streamed(role, _chunk("a"), _chunk("b", "c"), _chunk(choices=[], usage=USAGE))
    assert [delta.num_tokens for delta in deltas] == [0, 1, 2, 2]
    assert deltas[-1].usage == Usage(7, 5)
    # Tokens are not refunded if the server counts fewer.
    deltas, _ = _streamed(_chunk("a", "b", "c"), _chunk(choices=[], usage={**USAGE, "completion_tokens": 1}))
    assert [delta.num_tokens for delta in deltas] == [3, 0]
    # Nor are they free if it counts none.
    deltas, _ = _streamed(_chunk("a"), _chunk("b"))
    assert deltas[-1].usage == Usage(0, 2)


def test_this_services_own_fields_are_added() -> None:
    _, bodies = _streamed(_chunk("a"), timings=True, image_transforms=True)
    assert bodies[-1]["choices"] == []
    assert bodies[-1]["object"] == "chat.completion.chunk"
    assert set(bodies[-1]["timings"]) == {"upstream", "total"}
    assert bodies[-1]["image_transforms"] == [None]
    _, bodies = _streamed(_chunk("a"), _chunk(choices=[], usage=USAGE), timings=True, include_usage=True)
    assert (len(bodies), bodies[-1]["usage"]) == (2, USAGE)
    assert bodies[-1]["timings"]["upstream"] == 2.0


def test_an_unstreamed_answer() -> None:
    content = {
        "id": "theirs",
        "object": "chat.completion",
        "created": 5,
        "model": "theirs/7b",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}],
        "usage": {**USAGE, "prompt_tokens_details": {"cached_tokens": 3}},
        "prompt_logprobs": None,
    }
    answer = _answer(image_transforms=True)
    transform = ImageTransform("PNG", "MONOCHROME2", 16, is_inverted=False)
    whole = AnswerReader(answer, "message").whole(content, transforms=(transform,))
    assert (whole.usage, whole.num_tokens) == (Usage(7, 5, cached_tokens=3), 5)
    body = answer.completion([whole])
    assert body.pop("image_transforms")[0]["bits"] == 16
    del content["prompt_logprobs"]
    assert body == {**content, "id": "chatcmpl-ours", "model": "ours"}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({}, "wrong at choices"),
        ({"choices": "none"}, "wrong at choices"),
        ({"choices": [{"delta": {}}]}, r"wrong at choices\.0\.index"),
        ({"choices": [{"index": -1, "delta": {}}]}, r"wrong at choices\.0\.index"),
        ({"choices": [{"index": "0", "delta": {}}]}, r"wrong at choices\.0\.index"),
        ({"choices": [{"index": 0, "message": {}}]}, "a choice without delta"),
        ({"choices": [{"index": 0, "delta": None}]}, "a choice without delta"),
        (_chunk("a", usage={"prompt_tokens": -1}), r"wrong at usage\.prompt_tokens"),
        (_chunk("a", usage={"prompt_tokens": 10**12, "completion_tokens": 1}), r"wrong at usage\.prompt_tokens"),
        (_chunk("a", usage=[]), "wrong at usage"),
    ],
)
def test_an_invalid_chunk_is_reported_with_its_fault(content: dict[str, Any], what: str) -> None:
    with pytest.raises(NoAnswerError, match=what):
        AnswerReader(_answer(), "delta").chunk(content)


def test_a_stream_or_answer_without_choices_is_invalid() -> None:
    reader = AnswerReader(_answer(), "delta")
    reader.chunk(_chunk(choices=[], usage=USAGE))
    with pytest.raises(NoAnswerError, match="without an answer"):
        reader.end()
    with pytest.raises(NoAnswerError, match="without choices"):
        AnswerReader(_answer(), "message").whole({"choices": [], "usage": USAGE})


@pytest.mark.parametrize("data", [b"", b"<html>", b"[1]", b"null", b'{"a": NaN}', b'{"a": "\xff"}', b"[" * 100_000])
def test_data_that_is_not_a_json_object_is_invalid(data: bytes) -> None:
    with pytest.raises(NoAnswerError):
        read_object(data)
