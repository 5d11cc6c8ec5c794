"""The blocking client over sockets, against the real gateway with scripted answers and against misbehaving servers."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deployments.messages import Rejected, StageHealth
from llava_core.client import (
    AnswerInterruptedError,
    AuthenticationError,
    BadRequestError,
    Client,
    ConnectionFailedError,
    InvalidResponseError,
    NotFoundError,
    Question,
    RateLimitError,
    Reply,
    Retries,
    ServerError,
    ServiceError,
    TimeoutExceededError,
)
from llava_core.client import synchronous as module
from llava_core.errors import EngineError, ImageError, LlavaError, OverloadedError, RequestError
from llava_core.types import GenerationRequest, ImagePart, ImageUrl, Message, TextPart, TokenDelta, TokenLogprob, Usage
from llava_core.views import ImageTransform, Window
from tests.deployments.fakes import ScriptedEngine, answer
from tests.deployments.pictures import plain
from tests.deployments.service import until
from tests.sockets import SSE_HEAD, chunked, scripted, serving_engine, whole

RED = plain()
EVENT = b'data: {"choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": null}]}\n\n'
DONE = b"data: [DONE]\n\n"
ANSWERED = whole("200 OK", b'{"choices": [{"index": 0, "message": {"content": "yes"}, "finish_reason": "stop"}]}')
FULL = b'{"error": {"message": "full", "type": "overloaded_error", "param": null, "code": "overloaded"}}'
BUSY = whole("429 Too Many Requests", FULL, "retry-after: 2")
ONCE = Retries(most=0)
NO_ANSWER = r"not a JSON object|not a chat completion"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that clients asked for, without really waiting."""
    waited: list[float] = []
    monkeypatch.setattr(module, "sleep", waited.append)
    return waited


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(answer("Hel", "lo"))


@pytest.fixture
def client(engine: ScriptedEngine) -> Iterator[Client]:
    with serving_engine(engine) as url, Client(url) as client:
        yield client


def sent(engine: ScriptedEngine) -> GenerationRequest:
    request = engine.requests[-1]
    assert isinstance(request, GenerationRequest)
    return request


def test_a_question_about_a_picture_is_answered(client: Client, engine: ScriptedEngine) -> None:
    reply = client.ask("What?", RED)
    assert (reply.text, reply.finish_reason, reply.model) == ("Hello", "stop", "m")
    assert reply.usage == Usage(11, 2, image_tokens=4)
    assert set(reply.stage_ms) == {"prefill", "total"}
    assert reply.id.startswith("chatcmpl-")
    assert reply.request_id
    assert sent(engine).messages == (Message("user", (ImagePart(RED), TextPart("What?"))),)


def test_a_stream_ends_with_the_same_reply(client: Client) -> None:
    with client.stream("What?") as stream:
        assert [delta.text for delta in stream if delta.text] == ["Hel", "lo"]
    whole = client.ask("What?")
    assert (stream.reply.text, stream.reply.finish_reason, stream.reply.usage) == ("Hello", "stop", whole.usage)
    assert set(stream.reply.stage_ms) == set(whole.stage_ms)
    assert stream.reply.request_id != whole.request_id


def test_pictures_of_every_kind_are_sent_as_their_bytes(client: Client, engine: ScriptedEngine, tmp_path: Path) -> None:
    file = tmp_path / "a b.png"
    file.write_bytes(RED)
    client.ask("?", file, str(file), Image.new("RGB", (60, 40), "red"), "http://example.com/a.png")
    *pictures, address, _ = sent(engine).messages[0].parts
    assert pictures == [ImagePart(RED)] * 3
    assert address == ImageUrl("http://example.com/a.png")


def test_options_reach_the_service_and_override_the_clients_defaults(engine: ScriptedEngine) -> None:
    with serving_engine(engine) as url, Client(url, max_tokens=7, temperature=0.5) as client:
        client.ask("?", temperature=0.25, top_k=3, seed=1, stop=["x"], extra={"min_p": 0.125})
    sampling = sent(engine).sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.seed) == (7, 0.25, 3, 1)
    assert (sampling.stop, sampling.min_p) == (("x",), 0.125)


def test_several_answers_have_their_log_probabilities() -> None:
    logprobs = (TokenLogprob(1, -0.5, ((1, -0.5), (2, -1.5))),)
    spelled = {1: b"\xc3", 2: b"b"}
    items = [
        TokenDelta("id", "a", (1,), finish_reason="stop", logprobs=logprobs, token_bytes=spelled),
        TokenDelta("id", "b", (1,), finish_reason="length", usage=Usage(3, 2), index=1),
    ]
    with serving_engine(ScriptedEngine(items)) as url, Client(url) as client:
        for reply in (client.ask("?", n=2, logprobs=True, top_logprobs=2), _streamed(client, n=2)):
            assert [(choice.text, choice.finish_reason) for choice in reply.choices] == [("a", "stop"), ("b", "length")]
            (token,) = reply.logprobs
            assert (token.logprob, token.bytes) == (-0.5, b"\xc3")
            assert [other.token for other in token.top] == ["\N{REPLACEMENT CHARACTER}", "b"]
            assert [other.logprob for other in token.top] == [-0.5, -1.5]


def test_image_transforms_are_reported_on_request() -> None:
    seen = ImageTransform(
        "DICOM", "MONOCHROME1", 12, rescale=(2.0, -1024.0), window=Window(40, 400.5, "LINEAR", "request")
    )
    last = TokenDelta("id", "a", (1,), finish_reason="stop", usage=Usage(3, 1), transforms=(None, seen))
    with serving_engine(ScriptedEngine([last])) as url, Client(url) as client:
        for response in (client.ask("?", image_transforms=True), _streamed(client, image_transforms=True)):
            assert response.image_transforms == (None, seen)
        assert client.ask("?").image_transforms == ()


def _streamed(client: Client, **options: Any) -> Reply:
    with client.stream("?", **options) as stream:
        list(stream)
    return stream.reply


def test_any_character_is_kept_in_a_stream() -> None:
    """This includes characters that count as line breaks."""
    text = "a\u2028b\x85c\x0bd\u2029é😀\r\n"
    with serving_engine(ScriptedEngine(answer(text, text))) as url, Client(url) as client:
        assert _streamed(client).text == client.ask("?").text == text * 2


def test_a_conversation_sends_its_history_with_all_pictures(client: Client, engine: ScriptedEngine) -> None:
    talk = client.conversation("Be brief.", max_tokens=5)
    assert talk.ask("One?", RED).text == "Hello"
    with talk.stream("Two?", plain("blue")) as stream:
        list(stream)
    talk.ask("Three?")
    request = sent(engine)
    assert (request.system, request.sampling.max_tokens) == ("Be brief.", 5)
    hello = Message("assistant", (TextPart("Hello"),))
    assert request.messages == (
        Message("user", (ImagePart(RED), TextPart("One?"))),
        hello,
        Message("user", (ImagePart(plain("blue")), TextPart("Two?"))),
        hello,
        Message("user", (TextPart("Three?"),)),
    )


def test_a_failed_question_does_not_enter_the_conversation() -> None:
    engine = ScriptedEngine([Rejected(RequestError("bad", param="messages"))])
    with serving_engine(engine) as url, Client(url) as client:
        talk = client.conversation()
        with pytest.raises(BadRequestError):
            talk.ask("One?")
        engine.items = [*answer("Hel", "lo")[:1], EngineError("broken")]
        with pytest.raises(AnswerInterruptedError), talk.stream("One?") as stream:
            list(stream)
        assert talk.messages == []
        engine.items, engine.hangs = answer("Hel", "lo")[:1], True
        with talk.stream("One?") as stream:
            assert next(delta.text for delta in stream if delta.text) == "Hel"
    assert [message.parts[-1] for message in talk.messages] == [TextPart("One?"), TextPart("Hel")]


def test_closing_a_stream_frees_the_request() -> None:
    engine = ScriptedEngine(answer("a", "b")[:1], hangs=True)
    with serving_engine(engine) as url, Client(url) as client:
        with client.stream("?") as stream:
            next(stream)
            assert engine.num_open == 1
        until(lambda: engine.num_open == 0)
        assert engine.num_left_early == 1
        assert stream.reply.finish_reason is None


@pytest.mark.parametrize(
    ("error", "kind", "status", "code", "param"),
    [
        (RequestError("bad", param="messages[0].role", code="c"), BadRequestError, 400, "c", "messages[0].role"),
        (ImageError("no picture", param="messages[0]"), BadRequestError, 400, "invalid_image", "messages[0]"),
        (OverloadedError("full", limit="engine", retry_after_s=7), RateLimitError, 429, "overloaded", None),
        (EngineError("secret"), ServerError, 500, "engine_error", None),
    ],
)
def test_errors_carry_the_services_details(
    error: LlavaError, kind: type[ServiceError], status: int, code: str, param: str | None
) -> None:
    with serving_engine(ScriptedEngine([Rejected(error)])) as url, Client(url, retries=ONCE) as client:
        with pytest.raises(kind) as asked:
            client.ask("?")
        with pytest.raises(kind), client.stream("?"):
            pass
    raised = asked.value
    assert (raised.status, raised.code, raised.param) == (status, code, param)
    assert raised.request_id
    assert raised.request_id in str(raised)
    assert raised.retry_after_s == (7 if status == 429 else None)
    assert "secret" not in str(raised)


def test_an_unknown_model_is_not_found(client: Client) -> None:
    with pytest.raises(NotFoundError, match="unknown model 'gpt'") as raised:
        client.ask("?", model="gpt")
    assert raised.value.code == "model_not_found"


def test_a_broken_stream_reports_the_cause_and_the_text_so_far() -> None:
    engine = ScriptedEngine([*answer("Hel", "lo")[:1], EngineError("broken")])
    with (
        serving_engine(engine) as url,
        Client(url) as client,
        client.stream("?") as stream,
        pytest.raises(AnswerInterruptedError, match="could not be generated") as raised,
    ):
        list(stream)
    assert (raised.value.code, raised.value.text) == ("engine_error", "Hel")
    assert raised.value.request_id == stream.reply.request_id
    assert len(engine.requests) == 1, "what has begun is not asked again"


def test_an_error_after_a_heartbeat_is_raised_despite_status_200() -> None:
    """After a heartbeat the status can no longer change."""
    with (
        scripted(SSE_HEAD + chunked(b": \n\n") + chunked(b"data: " + FULL + b"\n\n") + b"0\r\n\r\n") as server,
        Client(server.url) as client,
        client.stream("?") as stream,
        pytest.raises(AnswerInterruptedError, match="full") as raised,
    ):
        list(stream)
    assert raised.value.code == "overloaded"


def test_retry_after_is_respected(waits: list[float]) -> None:
    unavailable = whole("503 Service Unavailable", b"<html>no server</html>", "Retry-After: 3")
    with scripted(BUSY, unavailable, ANSWERED) as server, Client(server.url) as client:
        assert client.ask("?").text == "yes"
    assert [2 <= waits[0] <= 2.5, 3 <= waits[1] <= 3.5, len(waits)] == [True, True, 2]
    bodies = {body for _, body in server.requests}
    assert len(server.requests) == 3
    assert len(bodies) == 1


def test_a_stream_is_retried_until_it_has_started(waits: list[float]) -> None:
    begun = SSE_HEAD + chunked(EVENT) + chunked(DONE) + b"0\r\n\r\n"
    with scripted(BUSY, begun) as server, Client(server.url) as client:
        assert _streamed(client).text == "Hel"
    assert len(waits) == 1


def test_retries_are_limited_and_the_last_error_is_raised(waits: list[float]) -> None:
    with (
        scripted(BUSY) as server,
        Client(server.url, retries=Retries(most=2)) as client,
        pytest.raises(RateLimitError, match="full"),
    ):
        client.ask("?")
    assert (len(server.requests), len(waits)) == (3, 2)


def test_a_wait_above_the_limit_is_not_waited_for(waits: list[float]) -> None:
    with (
        scripted(whole("429 Too Many", FULL, "retry-after: 3600")) as server,
        Client(server.url) as client,
        pytest.raises(RateLimitError) as raised,
    ):
        client.ask("?")
    assert (raised.value.retry_after_s, waits, len(server.requests)) == (3600, [], 1)


@pytest.mark.parametrize("status", ["400 Bad Request", "422 No", "500 Internal Server Error", "504 Gateway Timeout"])
def test_permanent_errors_are_not_retried(status: str, waits: list[float]) -> None:
    with scripted(whole(status, FULL)) as server, Client(server.url) as client, pytest.raises(ServiceError):
        client.ask("?")
    assert (len(server.requests), waits) == (1, [])


def test_a_connection_lost_before_an_answer_is_retried(waits: list[float]) -> None:
    with scripted(b"", b"HTTP/1.1 200 OK\r\n", ANSWERED) as server, Client(server.url) as client:
        assert client.ask("?").text == "yes"
    assert len(waits) == 2


def test_a_connection_lost_after_the_first_byte_is_not_retried(waits: list[float]) -> None:
    for cut in (SSE_HEAD + chunked(EVENT), SSE_HEAD + b"ff\r\n" + EVENT):
        with (
            scripted(cut) as server,
            Client(server.url) as client,
            client.stream("?") as stream,
            pytest.raises(AnswerInterruptedError, match="connection broke") as raised,
        ):
            list(stream)
        assert (raised.value.text, len(server.requests), waits) == ("Hel", 1, [])
    with scripted(ANSWERED[:-5]) as server, Client(server.url) as client, pytest.raises(AnswerInterruptedError):
        client.ask("?")
    assert len(server.requests) == 1


def test_a_stream_without_its_end_is_interrupted() -> None:
    """As happens behind a proxy that loses its server."""
    with (
        scripted(SSE_HEAD + chunked(EVENT) + b"0\r\n\r\n") as server,
        Client(server.url) as client,
        pytest.raises(AnswerInterruptedError, match="ended before the answer did"),
        client.stream("?") as stream,
    ):
        list(stream)


def test_a_connection_lost_after_the_end_is_no_error() -> None:
    with scripted(SSE_HEAD + chunked(EVENT) + chunked(DONE)) as server, Client(server.url) as client:
        assert _streamed(client).text == "Hel"


@pytest.mark.parametrize(
    "body",
    [
        b"garbage",
        b"[1]",
        b"{}",
        b'{"choices": [3]}',
        b'{"choices": [{"delta": {"content": 3}}]}',
        b'{"choices": [], "usage": {"prompt_tokens": "x"}}',
        b"\xff\xfe",
    ],
)
def test_invalid_answers_are_reported(body: bytes) -> None:
    with (
        scripted(whole("200 OK", body)) as server,
        Client(server.url) as client,
        pytest.raises(InvalidResponseError, match=NO_ANSWER),
    ):
        client.ask("?")
    with (
        scripted(SSE_HEAD + chunked(b"data: " + body + b"\n\n")) as server,
        Client(server.url) as client,
        pytest.raises(InvalidResponseError, match=NO_ANSWER),
        client.stream("?") as stream,
    ):
        list(stream)


def test_an_unreachable_service_is_named(waits: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with Client(url, retries=Retries(most=1)) as client:
        with pytest.raises(ConnectionFailedError, match=f"connection to {url} failed"):
            client.ask("?")
        assert not client.is_healthy()
    assert len(waits) == 1


def test_the_service_is_healthy_only_if_all_stages_are(client: Client) -> None:
    assert client.is_healthy()

    async def one_missing() -> list[StageHealth]:
        return [StageHealth("generator", is_ready=False)]

    with serving_engine(ScriptedEngine(), check_stages=one_missing) as url, Client(url) as other:
        assert not other.is_healthy()


@pytest.mark.parametrize("url", ["nonsense", "ftp://x", "http://", "http://[::1"])
def test_an_invalid_address_is_refused(url: str) -> None:
    with pytest.raises(ServiceError, match="is not a valid address"):
        Client(url)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_an_address_may_end_in_v1_and_localhost_bypasses_proxies(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with scripted(ANSWERED) as server:
        for prefix in ("", "/vision"):
            with Client(server.url + prefix + suffix) as client:
                client.ask("?")
    paths = [head.split()[1] for head, _ in server.requests]
    assert paths == ["/v1/chat/completions", "/vision/v1/chat/completions"]


def test_the_key_is_an_argument_or_from_the_environment_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAVA_API_KEY", raising=False)
    with scripted(ANSWERED) as server:
        with Client(server.url) as without:
            without.ask("?")
        monkeypatch.setenv("LLAVA_API_KEY", "environments")
        for given in (None, "given"):
            with Client(server.url, api_key=given) as client:
                client.ask("?")
                assert "given" not in repr(client._service)
    keys = [[line for line in head.lower().splitlines() if "authorization" in line] for head, _ in server.requests]
    assert keys == [[], ["authorization: bearer environments"], ["authorization: bearer given"]]


def test_a_missing_key_is_an_authentication_error() -> None:
    refused = b'{"error": {"message": "no key", "code": "missing_api_key", "param": null}, "request_id": "r"}'
    with (
        scripted(whole("401 Unauthorized", refused)) as server,
        Client(server.url) as client,
        pytest.raises(AuthenticationError, match=r"no key \(status 401, code missing_api_key, request r\)"),
    ):
        client.ask("?")


def test_a_deadline_ends_the_request_on_the_service() -> None:
    engine = ScriptedEngine(answer("Hel", "lo")[:1], hangs=True)
    with serving_engine(engine) as url, Client(url) as client:
        with pytest.raises(TimeoutExceededError) as raised:
            client.ask("?", deadline_s=0.3)
        assert (raised.value.status, raised.value.code) == (504, "deadline_exceeded")
        with pytest.raises(AnswerInterruptedError) as late, client.stream("?", deadline_s=1) as stream:
            list(stream)
        assert (late.value.code, late.value.text) == ("deadline_exceeded", "Hel")
        until(lambda: engine.num_open == 0)


def test_a_deadline_holds_even_if_the_service_ignores_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_core.client.exchange._GRACE_S", 0.05)
    released = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(SSE_HEAD)
        while not released.wait(0.01):
            connection.sendall(chunked(EVENT))

    with scripted(drip) as server, Client(server.url) as client:
        with pytest.raises(TimeoutExceededError, match=r"within 0\.7 s"), client.stream("?", deadline_s=0.7) as stream:
            list(stream)
        released.set()
    with scripted(lambda _: released.wait(30)) as server, Client(server.url) as client:
        released.clear()
        with pytest.raises(TimeoutExceededError, match="not answered in time"):
            client.ask("?", deadline_s=0.1)
        released.set()


def test_no_attempt_is_made_without_enough_time_left(waits: list[float]) -> None:
    with scripted(BUSY) as server, Client(server.url) as client:
        with pytest.raises(RateLimitError):
            client.ask("?", deadline_s=1)
        with pytest.raises(TimeoutExceededError):
            client.ask("?", deadline_s=0)
    assert (len(server.requests), waits) == (1, [])
    assert re.search(r"x-request-timeout-seconds: (1\.0|0\.[5-9])", server.requests[0][0])


def test_a_silent_stream_times_out() -> None:
    released = threading.Event()

    def begin(connection: socket.socket) -> None:
        connection.sendall(SSE_HEAD + chunked(EVENT))
        released.wait(30)

    with scripted(begin) as server, Client(server.url, timeout_s=0.2) as client:
        with pytest.raises(AnswerInterruptedError, match="fallen silent"), client.stream("?") as stream:
            list(stream)
        released.set()


def test_a_batch_is_in_order_and_reports_errors_per_item(tmp_path: Path) -> None:
    questions = [
        Question("a", (RED,)),
        Question("b", (tmp_path / "none.png",)),
        Question("c", options={"temperature": 9}),
        Question("d", system="s", options={"seed": 4}),
    ]
    engine = ScriptedEngine(answer("yes"))
    with serving_engine(engine) as url, Client(url) as client:
        results = list(client.batch(questions, concurrency=2))
    assert [result.index for result in results] == [0, 1, 2, 3]
    assert [result.reply.text if result.reply else None for result in results] == ["yes", None, None, "yes"]
    assert "none.png cannot be read" in str(results[1].error)
    with pytest.raises(BadRequestError, match="temperature"):
        results[2].unwrap()
    assert results[3].unwrap().text == "yes"
    assert len(engine.requests) == 2


def test_models_are_listed(client: Client) -> None:
    assert client.models() == ["m"]
    with (
        scripted(whole("200 OK", b'{"data": 3}')) as server,
        Client(server.url) as other,
        pytest.raises(InvalidResponseError, match="not a list of models"),
    ):
        other.models()


def test_a_request_is_json_in_openais_format() -> None:
    with scripted(ANSWERED) as server, Client(server.url, timings=False) as client:
        client.ask("?", history=[Message("assistant", (TextPart("a"), TextPart("b")))], system="s")
    assert json.loads(server.requests[0][1]) == {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "assistant", "content": "ab"},
            {"role": "user", "content": "?"},
        ]
    }
