"""Models served by another server, through the gateway: a second gateway of ours behind it, and servers that misbehave
in every way."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from deployments.access.api_keys import ApiKey, editing, hash_key, make_key
from deployments.access.authorization import KeyRing
from deployments.gateway import Gateway
from deployments.messages import Rejected
from deployments.metrics import (
    CHUNK_GAP,
    REFUSALS,
    TIME_TO_FIRST_TOKEN,
    UPSTREAM_REQUESTS,
    UPSTREAM_RUNNING,
    UPSTREAM_TOKENS,
    UPSTREAM_UP,
)
from deployments.settings.app import LimitArgs
from deployments.settings.upstreams import UpstreamArgs
from deployments.upstreams.pictures import PortableImage
from deployments.upstreams.upstream import Upstream
from llava_core.errors import EngineError, ImageError, OverloadedError, RequestError
from llava_core.types import GenerationRequest, ImagePart
from tests.deployments.access.test_authorization import NOW
from tests.deployments.fakes import FakeRecorder, ScriptedEngine, all_ready, answer
from tests.deployments.pictures import plain
from tests.deployments.service import until
from tests.sockets import SSE_HEAD, Script, chunked, scripted, serving_app, serving_engine, whole

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = {"model": "big", "messages": [{"role": "user", "content": "hi"}]}
ONCE = {"model": "big", "prompt": "Once"}
SECRET = "sk-of-the-upstream"
CHUNK = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "Hel"}}], "model": "theirs"}
USAGE = {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13}


async def _no_pictures(_request: GenerationRequest) -> tuple[PortableImage, ...]:
    raise AssertionError("there are none")


def _upstream(url: str, *, make_portable: Any = _no_pictures, recorder: Any = None, **args: Any) -> Upstream:
    settings = UpstreamArgs.model_validate({"url": f"{url}/v1", "model": "m", "silence_seconds": 20, **args})
    return Upstream("big", settings, make_portable, key=SECRET, recorder=recorder)


@contextlib.contextmanager
def _client(url: str, *, others: dict[str, Any] | None = None, keys: KeyRing | None = None, **options: Any) -> Iterator:
    recorder = options.setdefault("recorder", FakeRecorder())
    upstream = _upstream(url, **options)
    gateway = Gateway({**(others or {}), "big": upstream}, all_ready, keys=keys, recorder=recorder)
    with TestClient(gateway.app, raise_server_exceptions=False) as client:
        yield client
        assert client.portal is not None
        client.portal.call(upstream.close)


def _events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.strip().split("\n\n")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def _event(content: Any) -> bytes:
    return chunked(b"data: " + (content if isinstance(content, bytes) else json.dumps(content).encode()) + b"\n\n")


def _stream(*contents: Any) -> bytes:
    return SSE_HEAD + b"".join(map(_event, contents)) + b"0\r\n\r\n"


def _assert_error_response(response: Any, status: int, code: str, *words: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"] == response.json()["request_id"]
    return _assert_error(response.json(), code, *words)


def _assert_error(body: dict[str, Any], code: str, *words: str) -> dict[str, Any]:
    assert set(body) == {"error", "request_id"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    for word in words:
        assert word in error["message"]
    for secret in (SECRET, "127.0.0.1", "http:"):
        assert secret not in json.dumps(body)
    return dict(error)


def test_a_chat_is_forwarded_and_answered_under_our_model_name() -> None:
    engine = ScriptedEngine(answer("Hel", "lo"))
    with serving_engine(engine) as url, _client(url) as client:
        response = client.post(CHAT, json={**HELLO, "temperature": 0.5, "seed": 3})
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["model"], body["choices"][0]["message"]["content"]) == ("big", "Hello")
    assert body["id"].startswith("chatcmpl-")
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (11, 2)
    [request] = engine.requests
    assert (request.sampling.temperature, request.sampling.seed) == (0.5, 3)


def test_a_stream_is_passed_on_chunk_by_chunk() -> None:
    with serving_engine(ScriptedEngine(answer("Hel", "lo"))) as url, _client(url) as client:
        *chunks, done = _events(client.post(CHAT, json={**HELLO, "stream": True}).text)
    assert done == "[DONE]"
    assert {chunk["model"] for chunk in chunks} == {"big"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Hello"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_completions_are_forwarded_with_usage_and_timings(*, stream: bool) -> None:
    asked = {**ONCE, "timings": True, "stream": stream, "stream_options": {"include_usage": True}}
    with serving_engine(ScriptedEngine(answer("Hel", "lo"))) as url, _client(url) as client:
        response = client.post(COMPLETE, json=asked)
    bodies = _events(response.text)[:-1] if stream else [response.json()]
    assert "".join(choice["text"] for body in bodies for choice in body["choices"]) == "Hello"
    assert {body["object"] for body in bodies} == {"text_completion"}
    assert bodies[-1]["usage"]["total_tokens"] == 13
    # The timings are this service's, not those of the one behind it, which was not asked for any.
    assert set(bodies[-1]["timings"]) == {"upstream", "total"}


def test_the_openai_client_sees_no_difference() -> None:
    with serving_engine(ScriptedEngine(answer("Hel", "lo"))) as url, _client(url) as http:
        client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http)
        assert [model.id for model in client.models.list()] == ["big"]
        conversation: Any = HELLO["messages"]
        pieces = client.chat.completions.create(model="big", messages=conversation, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "Hello"
        assert client.chat.completions.create(model="big", messages=conversation).choices[0].message.content == "Hello"


def test_no_header_is_forwarded_in_either_direction() -> None:
    body = {"choices": [{"index": 0, "message": {"content": "x"}}], "usage": USAGE}
    hostile = ["content-type: application/json", "set-cookie: a=b", "server: theirs", "x-request-id: theirs"]
    with scripted(whole("200 OK", json.dumps(body).encode(), *hostile)) as script, _client(script.url) as client:
        headers = {
            "authorization": "Bearer of-the-client",
            "cookie": "c=d",
            "x-forwarded-for": "1.2.3.4",
            "te": "trailers",
            "x-request-id": "mine",
            "proxy-authorization": "Basic x",
            "accept-encoding": "gzip",
        }
        response = client.post(CHAT, json=HELLO, headers=headers)
        # A second time: no cookie was kept.
        client.post(CHAT, json=HELLO, headers={"x-request-id": "sm\tuggled"})
    assert response.status_code == 200
    assert response.headers["x-request-id"] == "mine"
    assert not {"set-cookie", "server"} & set(response.headers)
    first, second = (
        dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:]) for head, _ in script.requests
    )
    known = {"host", "authorization", "content-type", "accept", "accept-encoding", "user-agent", "content-length"}
    assert set(first) == known | {"x-request-id"}
    assert first["authorization"] == f"bearer {SECRET}"
    assert (first["x-request-id"], first["accept-encoding"]) == ("mine", "identity")
    # An id that is invalid as a header is not forwarded.
    assert set(second) == known


def _refused(status: str, body: Any, *headers: str) -> bytes:
    return whole(status, body if isinstance(body, bytes) else json.dumps(body).encode(), *headers)


def _openai(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": None, **more}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("answered", "status", "code", "words"),
    [
        (
            _refused(
                "400 Bad Request", _openai("theirs has 5 tokens", code="context_length_exceeded", param="messages")
            ),
            400,
            "context_length_exceeded",
            ["big has 5 tokens"],
        ),
        # Engines invent codes, which are not used as metric labels here.
        (_refused("422 Unprocessable", _openai("bad", code=400)), 422, "upstream_refused", ["bad"]),
        (_refused("413 Too Large", b"<html>"), 413, "upstream_refused", ["it gave no reason"]),
        (_refused("401 Unauthorized", _openai(f"no key {SECRET}")), 502, "upstream_key_refused", ["'big'", "key"]),
        (_refused("403 Forbidden", b""), 502, "upstream_key_refused", ["'big'"]),
        (
            _refused("404 Not Found", _openai("no theirs")),
            502,
            "upstream_failed",
            ["'big' knows no such model"],
        ),
        (_refused("307 Redirect", b"", "location: http://10.0.0.1/"), 502, "upstream_failed", ["status 307"]),
        (_refused("500 Oops", b"Traceback at http://127.0.0.1"), 502, "upstream_failed", ["'big' failed (status 500)"]),
        (_refused("503 Busy", b"", "retry-after: 7"), 502, "upstream_failed", ["status 503"]),
        (_refused("504 Late", b""), 504, "upstream_timeout", ["'big' has not answered in time"]),
        (_refused("500 Oops", b"x" * 1_000_000), 502, "upstream_failed", []),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\ncontent-encoding: gzip\r\n\r\n123456789",
            502,
            "upstream_invalid",
            [],
        ),
        (b"garbage that is no HTTP\r\n\r\n", 502, "upstream_cut", ["'big' broke the connection"]),
        (b"", 502, "upstream_cut", ["'big' broke the connection"]),
    ],
)
def test_the_servers_refusals_and_failures_become_our_errors(
    answered: bytes, status: int, code: str, words: list[str], *, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = FakeRecorder()
    with scripted(answered) as script, _client(script.url, model="theirs", recorder=recorder) as client:
        response = client.post(CHAT, json={**HELLO, "stream": stream})
        assert client.get("/health").status_code == 200
    error = _assert_error_response(response, status, code, *words)
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    # Sent only once: a request that was sent may have been executed.
    assert len(script.requests) == 1
    assert recorder.counted[UPSTREAM_REQUESTS, ("big", code)] == 1
    assert recorder.readings()[UPSTREAM_RUNNING, ("big",)] == 0
    assert SECRET not in caplog.text
    assert response.headers.get("retry-after") == ("7" if b"retry-after" in answered else None)


def test_a_full_server_is_429_with_its_retry_after() -> None:
    recorder = FakeRecorder()
    with (
        scripted(_refused("429 Full", _openai("full"), "retry-after: 12")) as script,
        _client(script.url, recorder=recorder) as client,
    ):
        response = client.post(CHAT, json=HELLO)
    _assert_error_response(response, 429, "overloaded", "'big' takes no more requests")
    assert response.headers["retry-after"] == "12"
    assert recorder.counted[REFUSALS, ("upstream",)] == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>", "something that is not JSON"),
        (b"[]", "JSON that is no object"),
        (b"{}", "wrong at choices"),
        (b'{"choices": []}', "an answer without choices"),
        (b'{"choices": [{"index": 0, "delta": {}}]}', "a choice without message"),
    ],
)
def test_an_invalid_answer_is_reported_as_such(body: bytes, words: str) -> None:
    with scripted(whole("200 OK", body)) as script, _client(script.url) as client:
        _assert_error_response(client.post(CHAT, json=HELLO), 502, "upstream_invalid", "'big' answered with", words)


def test_a_truncated_answer_is_reported_as_such() -> None:
    cut = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n" + b'{"choices": ['
    with scripted(cut) as script, _client(script.url) as client:
        _assert_error_response(
            client.post(CHAT, json=HELLO), 502, "upstream_cut", "'big'", "before the answer was complete"
        )


ENDINGS: dict[str, tuple[bytes, str, str]] = {
    "the connection breaks": (b"", "upstream_cut", "broke the connection"),
    "the stream ends": (b"0\r\n\r\n", "upstream_cut", "ended the stream"),
    "no JSON": (_event(b"garbage"), "upstream_invalid", "not JSON"),
    "no chunk": (_event({"choices": [{"index": "x"}]}), "upstream_invalid", "wrong at choices"),
    "no HTTP": (b"garbage\r\n", "upstream_cut", "broke the connection"),
    "an event without end": (
        b"".join(chunked(b"x" * 65536) for _ in range(65)),
        "upstream_invalid",
        "an event that has no end",
    ),
    "an error": (_event(_openai("it broke at http://127.0.0.1", code=500)), "upstream_failed", "failed (status 500)"),
    "a refusal": (_event(_openai("m is too long", code=400)), "upstream_refused", "big is too long"),
}


@pytest.mark.parametrize("ending", sorted(ENDINGS))
def test_a_failing_stream_ends_with_an_error_event(ending: str) -> None:
    data, code, words = ENDINGS[ending]
    recorder = FakeRecorder()
    with scripted(SSE_HEAD + _event(CHUNK) + data) as script, _client(script.url, recorder=recorder) as client:
        response = client.post(CHAT, json={**HELLO, "stream": True})
    assert response.status_code == 200
    first, last = _events(response.text)
    assert first["choices"] == CHUNK["choices"]
    _assert_error(last, code, "" if code == "upstream_refused" else "'big'", words)
    assert recorder.counted[UPSTREAM_REQUESTS, ("big", code)] == 1


@pytest.mark.parametrize("ending", sorted(ENDINGS))
def test_a_stream_that_fails_before_its_first_chunk_has_an_error_status(ending: str) -> None:
    data, code, words = ENDINGS[ending]
    with scripted(SSE_HEAD + data) as script, _client(script.url) as client:
        response = client.post(CHAT, json={**HELLO, "stream": True})
    _assert_error_response(response, 400 if code == "upstream_refused" else 502, code, words)


@pytest.mark.parametrize(
    "answered", [_stream(b"[DONE]"), whole("200 OK", json.dumps(CHUNK).encode(), "content-type: application/json")]
)
def test_an_empty_stream_and_an_unstreamed_reply_to_a_stream_are_invalid(answered: bytes) -> None:
    with scripted(answered) as script, _client(script.url) as client:
        _assert_error_response(
            client.post(CHAT, json={**HELLO, "stream": True}), 502, "upstream_invalid", "'big' answered with"
        )


def test_event_comments_names_and_carriage_returns_are_ignored() -> None:
    lines = b": alive\r\n\r\nevent: message\r\nid: 1\r\ndata:" + json.dumps(CHUNK).encode() + b"\r\n\r\n"
    # Split anywhere, with two events in one piece.
    data = lines + b"data: [DONE]\n\n"
    pieces = b"".join(chunked(data[at : at + 7]) for at in range(0, len(data), 7))
    with scripted(SSE_HEAD + pieces + b"0\r\n\r\n") as script, _client(script.url) as client:
        chunk, done = _events(client.post(CHAT, json={**HELLO, "stream": True}).text)
    assert (chunk["choices"], done) == (CHUNK["choices"], "[DONE]")


@contextlib.contextmanager
def _hanging(*sent: bytes) -> Iterator[tuple[Script, threading.Event]]:
    """Yield a server that sends this and then nothing; the event is set when the other side has hung up."""
    hung_up = threading.Event()

    def hang(connection: socket.socket) -> None:
        connection.sendall(b"".join(sent))
        with contextlib.suppress(OSError):
            while connection.recv(1024):
                pass
        hung_up.set()

    with scripted(hang) as script:
        yield script, hung_up


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"])
def test_a_hanging_server_is_abandoned(sent: bytes, *, stream: bool) -> None:
    with _hanging(sent) as (script, hung_up), _client(script.url, silence_seconds=0.2, answer_seconds=0.2) as client:
        response = client.post(CHAT, json={**HELLO, "stream": stream})
        _assert_error_response(response, 504, "upstream_timeout", "'big' has fallen silent")
        assert hung_up.wait(10)


_WHOLE = whole("200 OK", json.dumps({"choices": [{"index": 0, "message": {"content": "x"}}]}).encode())
_HALVES = _WHOLE[: _WHOLE.index(b"{")], _WHOLE[_WHOLE.index(b"{") :]


def test_head_and_body_of_a_whole_answer_share_one_limit() -> None:
    def in_two_parts(connection: socket.socket) -> None:
        """Each of them comes within the limit, but both together do not."""
        connection.settimeout(0.6)
        for part in _HALVES:
            with contextlib.suppress(TimeoutError):
                # Ends early when the other side has hung up.
                connection.recv(1)
            connection.sendall(part)

    with scripted(in_two_parts) as script, _client(script.url, answer_seconds=1) as client:
        response = client.post(CHAT, json=HELLO)
        _assert_error_response(response, 504, "upstream_timeout", "'big' has fallen silent")


def test_a_stream_that_falls_silent_ends_with_an_error_event() -> None:
    with _hanging(SSE_HEAD, _event(CHUNK), chunked(b"data: {")) as (script, hung_up):
        with _client(script.url, silence_seconds=0.3) as client:
            _, last = _events(client.post(CHAT, json={**HELLO, "stream": True}).text)
        _assert_error(last, "upstream_timeout", "'big' has fallen silent")
        assert hung_up.wait(10)


@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_deadline_disconnects_the_server(*, stream: bool) -> None:
    with _hanging() as (script, hung_up), _client(script.url) as client:
        headers = {"x-request-timeout-seconds": "0.3"}
        response = client.post(CHAT, json={**HELLO, "stream": stream}, headers=headers)
        _assert_error_response(response, 504, "deadline_exceeded")
        assert hung_up.wait(10)


def test_a_client_disconnect_cancels_the_servers_work() -> None:
    engine, recorder = ScriptedEngine(answer("Hel", "lo")[:1], hangs=True), FakeRecorder()
    with serving_engine(engine) as url:
        gateway = Gateway({"big": _upstream(url, recorder=recorder)}, all_ready)
        with serving_app(gateway.app) as front:
            with httpx.stream("POST", front + CHAT, json={**HELLO, "stream": True}, trust_env=False) as response:
                lines = response.iter_lines()
                next(lines)
                assert engine.num_open == 1
                assert recorder.readings()[UPSTREAM_RUNNING, ("big",)] == 1
            until(lambda: (engine.num_open, engine.num_left_early) == (0, 1))
            until(lambda: recorder.counted[UPSTREAM_REQUESTS, ("big", "cancelled")] == 1)
            assert recorder.readings()[UPSTREAM_RUNNING, ("big",)] == 0


def _closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_an_unreachable_server_is_reported_and_other_models_still_answer() -> None:
    own = ScriptedEngine(answer("mine"))
    with _client(_closed_port(), others={"own": own}) as client:
        _assert_error_response(client.post(CHAT, json=HELLO), 502, "upstream_unreachable", "'big' cannot be reached")
        assert client.post(CHAT, json={**HELLO, "model": "own"}).status_code == 200
        assert client.get("/health").json()["status"] == "ok"
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["own", "big"]
        assert client.get("/v1/models/big").json()["id"] == "big"
        response = client.post(CHAT, json={"messages": HELLO["messages"]})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
        response = client.post(CHAT, json={**HELLO, "model": "other"})
        assert "known are: big, own" in response.json()["error"]["message"]


def test_requests_to_one_server_are_bounded() -> None:
    with _hanging(SSE_HEAD, _event(CHUNK)) as (script, _):
        gateway = Gateway({"big": _upstream(script.url, max_requests=1)}, all_ready)
        with (
            serving_app(gateway.app) as front,
            httpx.Client(trust_env=False, timeout=30) as client,
            client.stream("POST", front + CHAT, json={**HELLO, "stream": True}) as first,
        ):
            lines = first.iter_lines()
            next(lines)
            refused = client.post(front + CHAT, json=HELLO)
            _assert_http_error(refused, 429, "overloaded", "1 requests are in flight")
            assert refused.headers["retry-after"] == "1"
            assert len(script.requests) == 1


def _assert_http_error(response: httpx.Response, status: int, code: str, words: str) -> None:
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert words in response.json()["error"]["message"]


def test_tokens_are_charged_to_the_key_and_counted(tmp_path: Any) -> None:
    path, key, recorder = tmp_path / "keys.json", make_key("team"), FakeRecorder()
    path.write_text('{"keys": []}')
    with editing(path) as keys:
        keys["team"] = ApiKey(id="team", sha256=hash_key(key), created_at=NOW, tokens_per_minute=26)
    ring = KeyRing(path, max_age_s=0, now=lambda: NOW, clock=lambda: 0.0)
    headers = {"authorization": f"Bearer {key}"}
    engine = ScriptedEngine(answer("Hel", "lo"))
    with serving_engine(engine) as url, _client(url, keys=ring, recorder=recorder) as client:
        assert client.post(CHAT, json=HELLO).status_code == 401
        # Thirteen tokens each: eleven of the prompt, and two of the answer.
        assert client.post(CHAT, json=HELLO, headers=headers).status_code == 200
        assert client.post(CHAT, json={**HELLO, "stream": True}, headers=headers).status_code == 200
        refused = client.post(CHAT, json=HELLO, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert len(engine.requests) == 2
    assert recorder.counted[UPSTREAM_TOKENS, ("big", "prompt")] == 22
    assert recorder.counted[UPSTREAM_TOKENS, ("big", "completion")] == 4
    assert recorder.counted[UPSTREAM_REQUESTS, ("big", "answered")] == 2
    assert len(recorder.observed[TIME_TO_FIRST_TOKEN, ("big",)]) == 2
    assert recorder.observed[CHUNK_GAP, ("big",)]


def test_tokens_of_an_incomplete_answer_are_counted(tmp_path: Any) -> None:
    recorder = FakeRecorder()
    with scripted(SSE_HEAD + _event(CHUNK) * 3) as script, _client(script.url, recorder=recorder) as client:
        client.post(CHAT, json={**HELLO, "stream": True})
    assert recorder.counted[UPSTREAM_TOKENS, ("big", "completion")] == 3


def _with_picture(url: str) -> dict[str, Any]:
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "big", "messages": [{"role": "user", "content": parts}]}


def test_pictures_are_made_portable_and_sent_as_data() -> None:
    asked: list[GenerationRequest] = []

    async def make_portable(request: GenerationRequest) -> tuple[PortableImage, ...]:
        asked.append(request)
        return (PortableImage("image/png", plain("blue")),)

    engine = ScriptedEngine(answer("x"))
    with serving_engine(engine) as url, _client(url, make_portable=make_portable) as client:
        body = _with_picture("https://example.com/a.png") | {"image_transforms": True}
        response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    assert response.json()["image_transforms"] == [None]
    assert asked[0].has_addresses
    [request] = engine.requests
    assert isinstance(request, GenerationRequest)
    assert request.messages[0].parts[1] == ImagePart(plain("blue"))


def test_a_refused_picture_is_never_sent() -> None:
    error = ImageError("no", param="messages[0].content[1].image_url", code="image_url_not_allowed")

    async def refuse(_request: GenerationRequest) -> Rejected:
        return Rejected(error)

    with scripted(b"") as script, _client(script.url, make_portable=refuse) as client:
        response = client.post(CHAT, json=_with_picture("http://169.254.169.254/latest"))
    described = _assert_error_response(response, 400, "image_url_not_allowed")
    assert described["param"] == "messages[0].content[1].image_url"
    assert script.requests == []


def test_fetched_pictures_count_towards_the_bytes_in_flight() -> None:

    async def large(_request: GenerationRequest) -> tuple[PortableImage, ...]:
        return (PortableImage("image/png", b"x" * 2000),)

    limits = LimitArgs(max_body_bytes=1000, max_bytes_in_flight=2000)
    with scripted(b"") as script:
        gateway = Gateway({"big": _upstream(script.url, make_portable=large)}, all_ready, limits=limits)
        with TestClient(gateway.app) as client:
            for _ in range(2):
                response = client.post(CHAT, json=_with_picture("https://example.com/a.png"))
                assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
        assert gateway._intake._bodies.num_bytes == 0
        assert script.requests == []


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})])
def test_tokenizing_for_an_upstream_model_is_refused_by_name(path: str, body: dict[str, Any]) -> None:
    with scripted(b"") as script, _client(script.url) as client:
        error = _assert_error_response(client.post(path, json={"model": "big", **body}), 400, "model_not_here", "'big'")
        assert error["param"] == "model"
    assert script.requests == []


LISTED = json.dumps({"data": [{"id": "other"}, {"id": "m"}]}).encode()


@pytest.mark.parametrize(
    ("answered", "state"),
    [
        (whole("200 OK", LISTED), "ok"),
        (whole("404 Not Found", b""), "ok"),
        (whole("200 OK", b'{"data": [{"id": "other"}]}'), "model unknown there"),
        (whole("200 OK", b"<html>"), "no list of models"),
        (whole("200 OK", b'{"data": 1}'), "no list of models"),
        (whole("401 Unauthorized", b""), "key refused"),
        (whole("503 Busy", b""), "failing"),
        (b"", "unreachable"),
        (None, "unreachable"),
    ],
)
def test_the_servers_state_is_visible_and_does_not_affect_our_health(answered: bytes | None, state: str) -> None:
    recorder = FakeRecorder()

    async def look(url: str) -> Upstream:
        upstream = _upstream(url, recorder=recorder, connect_seconds=2)
        assert recorder.readings()[UPSTREAM_UP, ("big",)] == 0
        watch = asyncio.create_task(upstream.watch())
        while upstream.state == "not asked yet":
            await asyncio.sleep(0.01)
        watch.cancel()
        await upstream.close()
        return upstream

    with contextlib.nullcontext(None) if answered is None else scripted(answered) as script:
        upstream = asyncio.run(look(_closed_port() if script is None else script.url))
        if script is not None:
            assert script.requests[0][0].startswith("GET /v1/models HTTP/1.1\r\n")
    assert recorder.readings()[UPSTREAM_UP, ("big",)] == (state == "ok")
    with TestClient(Gateway({"big": upstream}, all_ready).app) as client:
        health = client.get("/health")
    assert (health.status_code, health.json()["upstreams"]) == (200, {"big": state})


def test_an_answer_marks_the_server_as_ok_at_once() -> None:
    with serving_engine(ScriptedEngine(answer("x"))) as url, _client(url) as client:
        assert client.get("/health").json()["upstreams"] == {"big": "not asked yet"}
        client.post(CHAT, json=HELLO)
        assert client.get("/health").json()["upstreams"] == {"big": "ok"}


@pytest.mark.parametrize(
    ("item", "status", "code"),
    [
        (Rejected(RequestError("bad", param="messages[0].role", code="invalid_value")), 400, "invalid_value"),
        (OverloadedError("full", limit="engine", retry_after_s=3), 429, "overloaded"),
        (EngineError("broken"), 502, "upstream_failed"),
    ],
)
def test_errors_of_a_second_gateway_are_passed_through(item: Any, status: int, code: str) -> None:
    with serving_engine(ScriptedEngine([item])) as url, _client(url) as client:
        response = client.post(CHAT, json=HELLO)
    error = _assert_error_response(response, status, code)
    assert error["param"] == ("messages[0].role" if status == 400 else None)
    assert response.headers.get("retry-after") == ("3" if status == 429 else None)
