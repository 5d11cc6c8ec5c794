"""Asking an OpenAI-compatible service: the request's form, answers in order, and refusals raised, not counted."""

import base64
import json
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest

from llava_core.client import synchronous
from llava_core.errors import LlavaError
from llava_core.evaluation.openai_answerer import OpenAIAnswerer, served_model
from llava_core.evaluation.task import Sample

Handler = Callable[[httpx.Request], httpx.Response]


def serve(handler: Handler) -> OpenAIAnswerer:
    """Returns an answerer whose requests go to `handler`."""
    return OpenAIAnswerer("http://service", "tiny", concurrency=2, transport=httpx.MockTransport(handler))


def echo(request: httpx.Request) -> httpx.Response:
    content = json.loads(request.content)["messages"][0]["content"]
    return httpx.Response(200, json={"choices": [{"message": {"content": f"re: {content[1]['text']}"}}]})


def test_answers_are_in_the_order_of_the_samples() -> None:
    samples = [Sample(str(index), "kind", f"q{index}", "", b"x") for index in range(7)]
    assert [answer.text for answer in serve(echo).answer(samples)] == [f"re: q{index}" for index in range(7)]


@pytest.mark.parametrize(("image", "kind"), [(b"\x89PNG\r\n\x1a\n...", "png"), (b"\xff\xd8\xff...", "jpeg")])
def test_the_request_is_greedy_and_holds_the_picture(image: bytes, kind: str) -> None:
    seen: list[httpx.Request] = []

    def record(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return echo(request)

    list(serve(record).answer([Sample("1", "kind", "q", "", image)]))
    body = json.loads(seen[0].content)
    assert seen[0].url == "http://service/v1/chat/completions"
    assert (body["model"], body["temperature"]) == ("tiny", 0)
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    assert url == f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def test_a_key_is_sent_if_given_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAVA_API_KEY", raising=False)
    seen: list[str | None] = []

    def record(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return echo(request) if request.method == "POST" else httpx.Response(200, json={"data": [{"id": "m"}]})

    answerer = serve(record)
    sample = Sample("1", "kind", "q", "", b"x")
    assert served_model("http://service", "a.key", transport=answerer.transport) == "m"
    for each in (replace(answerer, api_key="a.key"), answerer):
        list(each.answer([sample]))
        assert "a.key" not in repr(each)
    assert seen == ["Bearer a.key", "Bearer a.key", None]


def test_a_refusal_stops_the_evaluation() -> None:
    answerer = serve(lambda _: httpx.Response(400, json={"error": {"message": "too large"}}))
    with pytest.raises(LlavaError, match=r"did not answer sample 7: too large \(status 400"):
        list(answerer.answer([Sample("7", "kind", "q", "", b"x")]))


def test_an_unreachable_service_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    num_asked = 0

    def fail(request: httpx.Request) -> httpx.Response:
        nonlocal num_asked
        num_asked += 1
        raise httpx.ConnectError("refused", request=request)

    # The client's own tests cover its waits before retries.
    monkeypatch.setattr(synchronous, "sleep", lambda _: None)

    with pytest.raises(LlavaError, match="http://service did not answer"):
        list(serve(fail).answer([Sample("7", "kind", "q", "", b"x")]))
    assert num_asked > 1


@pytest.mark.parametrize("body", [b"not json", b"{}", b'{"choices": []}', b'{"choices": [3]}'])
def test_an_invalid_answer_is_reported_with_its_sample(body: bytes) -> None:
    with pytest.raises(LlavaError, match=r"sample 7: .*(not a JSON object|not a chat completion|without an answer)"):
        list(serve(lambda _: httpx.Response(200, content=body)).answer([Sample("7", "kind", "q", "", b"x")]))


def test_the_served_model_is_looked_up() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json={"data": [{"id": "tiny"}]}))
    assert served_model("http://service", transport=transport) == "tiny"


@pytest.mark.parametrize("status", [200, 500])
def test_a_server_without_models_is_named(status: int) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(status, content=b"hello"))
    with pytest.raises(LlavaError, match="http://service/v1/models does not list a model"):
        served_model("http://service", transport=transport)


def test_an_invalid_address_is_reported() -> None:
    with pytest.raises(LlavaError, match="does not list a model"):
        served_model("nonsense")
