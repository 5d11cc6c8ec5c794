"""Answers to completions have OpenAI's form."""

from deployments.openai_api.completion_response import CompletionAnswer
from llava_core.types import TokenDelta, TokenLogprob
from tests.deployments.fakes import answer

BYTES = {1: b" red", 2: b"\xc3", 3: b"\xa9"}


def test_a_completion_has_a_text() -> None:
    body = CompletionAnswer("cmpl-1", "m").completion(answer("Hel", "lo"))
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "Hello", "finish_reason": "stop", "logprobs": None}]


def test_chunks_have_texts() -> None:
    form = CompletionAnswer("cmpl-1", "m")
    assert list(form.first_chunks()) == []
    chunks = [chunk for delta in answer("Hel", "") for chunk in form.chunks(delta)]
    assert [(c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in chunks] == [
        ("Hel", None),
        ("", "stop"),
    ]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


def test_log_probabilities_are_four_lists_with_offsets_continued_across_chunks() -> None:
    form = CompletionAnswer("cmpl-1", "m")
    red = TokenLogprob(1, -0.5, ((1, -0.5), (2, -1.5)))

    def logprobs(index: int) -> dict:
        [chunk] = form.chunks(TokenDelta("id", " red", (1,), index=index, logprobs=(red,), token_bytes=BYTES))
        found: dict = chunk["choices"][0]["logprobs"]
        return found

    first = logprobs(0)
    assert first == {
        "tokens": [" red"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{" red": -0.5, "bytes:\\xc3": -1.5}],
        "text_offset": [0],
    }
    assert logprobs(0)["text_offset"] == [4]
    assert logprobs(1)["text_offset"] == [0]


def test_the_generated_token_is_among_the_alternatives() -> None:
    delta = TokenDelta("id", "", (3,), logprobs=(TokenLogprob(3, -9.0, ((1, -0.1),)),), token_bytes=BYTES)
    [chunk] = CompletionAnswer("cmpl-1", "m").chunks(delta)
    assert chunk["choices"][0]["logprobs"]["top_logprobs"] == [{" red": -0.1, "bytes:\\xa9": -9.0}]
