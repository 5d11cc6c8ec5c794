"""The mix contains everything it should, and every fault in a response is detected."""

import json
from collections import Counter

import pytest

from benchmarks.service.mix import SHARES, Ask, Mix, bad_requests, judge
from benchmarks.service.pictures import PictureMaker
from deployments.openai_api.chat_request import read_chat_request
from deployments.openai_api.completion_request import read_completion_request
from llava_core.errors import RequestError
from llava_core.request_limits import RequestLimits

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
JSON = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n\r\n"


def body_of(ask: Ask) -> bytes:
    return ask.message.partition(b"\r\n\r\n")[2]


def test_a_mix_follows_its_shares_and_is_valid_for_the_service() -> None:
    mix = Mix(1, "seed")
    asks = [mix.next() for _ in range(300)]
    kinds = Counter(ask.kind if ask.kind in SHARES else "bad" for ask in asks)
    assert kinds.keys() == SHARES.keys()
    assert all(abs(kinds[kind] - 3 * share) < 4 * (3 * share) ** 0.5 for kind, share in SHARES.items())
    by_question: dict[str, set[str]] = {}
    for ask in asks:
        if ask.status == 200:
            read = (read_completion_request if ask.kind == "prompts" else read_chat_request)(
                body_of(ask), "1", RequestLimits()
            )
            assert read.generation.sampling.n * (1 + len(read.others)) == ask.num_answers
            assert ask.hangs_up == ask.kind.startswith("hang-up")
        if ask.same:
            body = json.loads(body_of(ask))
            assert body["temperature"] == 0
            asked = body["prompt"] if ask.kind == "prompts" else [body["messages"]] * ask.num_answers
            for question, content in zip(ask.same, asked, strict=True):
                by_question.setdefault(question, set()).add(json.dumps([content, body["max_tokens"]]))
    assert len(by_question) > 5
    assert {len(found) for found in by_question.values()} == {1}
    assert {ask.num_answers for ask in asks} == {1, 2}


def test_bad_requests_are_bad() -> None:
    refused = Counter[str | None]()
    for ask in bad_requests(1, PictureMaker(0)):
        assert ask.code is not None
        assert 400 <= ask.status < 500
        try:
            read_chat_request(body_of(ask), "1", RequestLimits())
        except RequestError:
            refused[ask.code] += 1
    # The others are detected by the gateway's routes or by later stages.
    assert refused.keys() >= {"invalid_json", "unsupported_parameter", "invalid_value"}


def chunk(index: int, text: str = "", reason: str | None = None) -> bytes:
    return event({"index": index, "delta": {"content": text}, "finish_reason": reason})


def event(choice: object) -> bytes:
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def text(index: int, text: str, reason: str) -> dict[str, object]:
    """Return a choice of a completion."""
    return {"index": index, "text": text, "finish_reason": reason}


def answer(*texts: str, reason: str = "stop") -> bytes:
    choices = [{"index": i, "message": {"content": t}, "finish_reason": reason} for i, t in enumerate(texts)]
    return JSON % 200 + json.dumps({"choices": choices}).encode()


DONE = b"data: [DONE]\n\n"
ONE, TWO, BAD = Ask("a", b""), Ask("a", b"", num_answers=2), Ask("b", b"", 400, "invalid_json")


@pytest.mark.parametrize(
    ("ask", "response", "texts"),
    [
        (ONE, answer("yes"), ("yes",)),
        (TWO, answer("yes", "no"), ("yes", "no")),
        (ONE, STREAM + chunk(0, "y") + chunk(0, "es", "length") + DONE, ("yes",)),
        (TWO, STREAM + chunk(1, "n") + chunk(0, "yes", "stop") + chunk(1, "o", "stop") + DONE, ("yes", "no")),
        (
            TWO,
            JSON % 200 + json.dumps({"choices": [text(0, "a", "stop"), text(1, "b", "length")]}).encode(),
            ("a", "b"),
        ),
        (TWO, STREAM + event(text(1, "b", "stop")) + event(text(0, "a", "stop")) + DONE, ("a", "b")),
        (BAD, JSON % 400 + b'{"error": {"code": "invalid_json"}}', ()),
    ],
)
def test_correct_responses_are_accepted(ask: Ask, response: bytes, texts: tuple[str, ...]) -> None:
    outcome = judge(ask, 1.0, [(1.5, response[:30]), (2.0, response[30:])])
    assert (outcome.error, outcome.texts) == ("", texts)
    assert (outcome.first_s, outcome.total_s) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("ask", "response", "error"),
    [
        (ONE, b"", "status 0 instead of 200"),
        (ONE, JSON % 429 + b"{}", "status 429 instead of 200"),
        (BAD, answer("yes"), "status 200 instead of 400"),
        (BAD, JSON % 400 + b'{"error": {"code": "other"}}', "code other instead of invalid_json"),
        (ONE, JSON % 200 + b'{"choi', "no JSON"),
        (TWO, answer("yes"), "1 answers instead of 2"),
        (ONE, answer("yes", reason="error"), "ended with"),
        (ONE, STREAM + chunk(0, "yes", "stop"), "the stream ended with"),
        (ONE, STREAM + chunk(0, "yes") + DONE, "0 answers instead of 1"),
        (TWO, STREAM + chunk(0, "yes", "stop") + DONE, "1 answers instead of 2"),
        (ONE, STREAM + chunk(0, "y") + b'data: {"error": {"code": "replica_lost"}}\n\n', "replica_lost"),
        (ONE, STREAM, "the stream ended with"),
    ],
)
def test_wrong_responses_are_detected(ask: Ask, response: bytes, error: str) -> None:
    assert error in judge(ask, 0.0, [(1.0, response)] if response else []).error
