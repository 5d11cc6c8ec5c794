"""The HTTP surface on scripted answers, then bad input through the whole graph in this process."""

import asyncio
import contextlib
import gzip
import json
import logging
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from deployments.errors import StageLostError
from deployments.gateway import Gateway
from deployments.messages import Item, Rejected, StageHealth
from deployments.settings.app import LimitArgs
from llava_core.errors import EngineError, OverloadedError, RequestError
from llava_core.types import AnyRequest, CompletionRequest, GenerationRequest, TokenDelta
from tests.deployments.conftest import LIMITS
from tests.deployments.fakes import STAGES, ScriptedEngine, all_ready, answer
from tests.deployments.pictures import data_url, plain, unusable, unusual

PATH = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}


@contextlib.contextmanager
def _client(engine: ScriptedEngine, **options: Any) -> Iterator[TestClient]:
    gateway = Gateway({"m": engine}, **{"check_stages": all_ready, **options})
    with TestClient(gateway.app, raise_server_exceptions=False) as client:
        yield client


def _post(engine: ScriptedEngine, **fields: Any) -> Any:
    with _client(engine) as client:
        return client.post(PATH, json={**HELLO, **fields})


def _events(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    lines = [line.removeprefix("data: ") for line in text.strip().split("\n\n")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def _assert_is_error(response: Any, status: int, code: str) -> dict:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "request_id"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert body["request_id"] == response.headers["x-request-id"]
    return body["error"]


@pytest.mark.parametrize(
    ("modules", "foreign"), [("deployments.gateway", "{'ray', 'torch'}"), ("deployments.replicas", "{'torch'}")]
)
def test_the_gateway_imports_neither_ray_nor_torch(modules: str, foreign: str) -> None:
    program = f"import sys, {modules}; sys.exit(bool({foreign} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_an_unstreamed_answer() -> None:
    response = _post(ScriptedEngine(answer("Hel", "lo")), model="m")
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "Hello"
    assert response.json()["id"].startswith("chatcmpl-")
    assert response.headers["x-request-id"]


def test_a_streamed_answer() -> None:
    response = _post(ScriptedEngine(answer("Hel", "lo")), stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = _events(response.text)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Hello"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_stream_with_usage_and_timings() -> None:
    response = _post(ScriptedEngine(answer("x")), stream=True, stream_options={"include_usage": True}, timings=True)
    *chunks, last, _done = _events(response.text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 1
    assert "total" in last["timings"]


def test_the_clients_request_id_is_returned_but_not_used_internally() -> None:
    engine = ScriptedEngine(answer("x"))
    with _client(engine) as client:
        for _ in range(2):
            response = client.post(PATH, json=HELLO, headers={"x-request-id": "mine"})
            assert response.headers["x-request-id"] == "mine"
    first, second = (request.request_id for request in engine.requests)
    assert first != second


def test_the_request_id_header_is_left_to_a_server_that_adds_it() -> None:
    with _client(ScriptedEngine(), echo_request_id=False) as client:
        response = client.get("/v1/models/nothing", headers={"x-request-id": "mine"})
    assert "x-request-id" not in response.headers
    assert response.json()["request_id"] == "mine"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("first", "status", "code"),
    [
        (Rejected(RequestError("bad", param="messages[0].role", code="c")), 400, "c"),
        (Rejected(OverloadedError("full", limit="engine")), 429, "overloaded"),
        (Rejected(EngineError("broken")), 500, "engine_error"),
        (OverloadedError("full", limit="engine"), 429, "overloaded"),
        (StageLostError("gone"), 503, "replica_lost"),
        (ZeroDivisionError("oops"), 500, "internal_error"),
    ],
)
def test_an_error_before_the_first_token_has_its_own_status(
    *, first: Rejected | Exception, status: int, code: str, stream: bool
) -> None:
    engine = ScriptedEngine([first])  # type: ignore[list-item]
    response = _post(engine, stream=stream)
    error = _assert_is_error(response, status, code)
    assert "oops" not in error["message"]
    assert engine.num_open == 0
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    "failure", [Rejected(EngineError("broken")), StageLostError("gone"), ZeroDivisionError("oops")]
)
def test_a_later_error_is_the_last_event_of_the_stream(failure: Any) -> None:
    response = _post(ScriptedEngine([TokenDelta("id", "Hel", (1,)), failure]), stream=True)
    assert response.status_code == 200
    *_, text, last = _events(response.text)
    assert text["choices"][0]["delta"] == {"content": "Hel"}
    assert last["error"]["type"] == "server_error"
    assert last["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_an_end_is_an_error(*, stream: bool) -> None:
    response = _post(ScriptedEngine([TokenDelta("id", "Hel", (1,))]), stream=stream)
    body = _events(response.text)[-1] if stream else response.json()
    assert body["error"]["code"] == "engine_error"


def test_only_unexpected_errors_are_logged_with_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        _post(ScriptedEngine([Rejected(RequestError("bad"))]))
        _post(ScriptedEngine([OverloadedError("full", limit="engine")]))
        assert caplog.records == []
        _post(ScriptedEngine([ZeroDivisionError("oops")]))
    assert [record.name for record in caplog.records] == ["deployments.openai_api.responding"]


def test_errors_count_messages_including_the_system_message() -> None:
    engine = ScriptedEngine([Rejected(RequestError("bad", param="messages[0].content[1].image_url"))])
    response = _post(engine, messages=[{"role": "system", "content": "s"}, *HELLO["messages"]])
    assert response.json()["error"]["param"] == "messages[1].content[1].image_url"


def test_models_are_listed_and_found() -> None:
    with _client(ScriptedEngine()) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["m"]
        assert client.get("/v1/models/m").json()["object"] == "model"
        _assert_is_error(client.get("/v1/models/owner/other"), 404, "model_not_found")


def test_an_unknown_model_is_a_404() -> None:
    error = _assert_is_error(_post(ScriptedEngine(), model="gpt-9"), 404, "model_not_found")
    assert error["param"] == "model"
    assert "m" in error["message"]


ROUTES = [
    (PATH, HELLO),
    ("/v1/completions", {"prompt": "hi"}),
    ("/tokenize", HELLO),
    ("/detokenize", {"tokens": [1]}),
]


@contextlib.contextmanager
def _several(**engines: ScriptedEngine) -> Iterator[TestClient]:
    with TestClient(Gateway(engines, all_ready).app, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_request_goes_to_the_model_it_names(path: str, body: dict) -> None:
    engines = {name: ScriptedEngine(answer(f"of {name}")) for name in ("a", "owner/b")}
    engines["owner/b"].tokenized = Rejected(RequestError("of owner/b"))
    with _several(**engines) as client:
        replies = {name: client.post(path, json={**body, "model": name}).json() for name in engines}
        assert replies["a"] != replies["owner/b"]
        for name in engines:
            if "choices" in replies[name]:
                assert replies[name]["model"] == name
                assert f"of {name}" in json.dumps(replies[name])
        error = _assert_is_error(client.post(path, json={**body, "model": "c"}), 404, "model_not_found")
        assert error["message"] == "unknown model 'c'; known are: a, owner/b"
        for unnamed in (body, {**body, "model": None}):
            error = _assert_is_error(client.post(path, json=unnamed), 400, "missing_required_parameter")
            assert (error["param"], error["message"]) == ("model", "model is missing; it must be one of: a, owner/b")


def test_all_models_are_listed() -> None:
    with _several(a=ScriptedEngine(), **{"owner/b": ScriptedEngine()}) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["a", "owner/b"]
        assert client.get("/v1/models/owner/b").json()["id"] == "owner/b"
        error = _assert_is_error(client.get("/v1/models/b"), 404, "model_not_found")
        assert "known are: a, owner/b" in error["message"]


def test_a_template_applies_to_its_own_request_only() -> None:
    engine = ScriptedEngine(answer("x"))
    with _client(engine) as client:
        for fields in ({"template": "v0"}, {}, {"template": None}):
            assert client.post(PATH, json={**HELLO, **fields}).status_code == 200
            assert client.post("/tokenize", json={**HELLO, **fields}).status_code == 200
        error = _assert_is_error(client.post(PATH, json={**HELLO, "template": "v9"}), 400, "invalid_value")
    asked = [request for request in engine.requests if isinstance(request, GenerationRequest)]
    assert [request.template for request in asked] == ["v0", "v0", None, None, None, None]
    assert error["param"] == "template"
    assert "vicuna_v1" in error["message"]


def test_completions_are_answered_in_their_own_format() -> None:
    engine = ScriptedEngine(answer(" on", " a"))
    with _client(engine) as client:
        whole = client.post("/v1/completions", json={"prompt": "Once up", "model": "m"}).json()
        stream = client.post("/v1/completions", json={"prompt": "Once up", "stream": True})
    assert (whole["object"], whole["choices"][0]["text"]) == ("text_completion", " on a")
    assert whole["id"].startswith("cmpl-")
    *chunks, done = _events(stream.text)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " on a"
    assert all(isinstance(request, CompletionRequest) for request in engine.requests)


def test_a_stages_error_about_messages_names_a_completions_prompt() -> None:
    engine = ScriptedEngine([Rejected(RequestError("bad", param="messages"))])
    with _client(engine) as client:
        error = _assert_is_error(client.post("/v1/completions", json={"prompt": "x"}), 400, "invalid_value")
    assert error["param"] == "prompt"


def test_prompts_are_tokenized_by_the_graph() -> None:
    with _client(ScriptedEngine()) as client:
        for body in ({"prompt": "é"}, {"messages": HELLO["messages"], "return_token_strs": True}):
            reply = client.post("/tokenize", json=body).json()
            assert (reply["count"], reply["max_model_len"], reply["tokens"]) == (2, 512, [1, 5])
        assert reply["token_strs"] == ["<s>", "é"]
        assert client.post("/detokenize", json={"tokens": [1, 5]}).json() == {"prompt": "text of [1, 5]"}


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})])
def test_tokenizing_errors_have_the_same_shape(path: str, body: dict) -> None:
    engine = ScriptedEngine()
    with _client(engine) as client:
        _assert_is_error(client.post(path, json={}), 400, "missing_required_parameter")
        _assert_is_error(client.post(path, content=b"{"), 400, "invalid_json")
        _assert_is_error(client.post(path, json={**body, "model": "gpt-9"}), 404, "model_not_found")
        engine.tokenized = Rejected(RequestError("bad", param="messages", code="reserved_text"))
        _assert_is_error(client.post(path, json=body), 400, "reserved_text")


def test_health_is_ok_when_a_stage_is_scaled_to_zero() -> None:
    async def check() -> list[StageHealth]:
        return [StageHealth("preprocessor", is_ready=True), StageHealth("generator", is_ready=True, has_replicas=False)]

    with _client(ScriptedEngine(), check_stages=check) as client:
        response = client.get("/health")
    assert response.status_code == 200
    assert response.json()["stages"] == {"preprocessor": "ok", "generator": "scaled_to_zero"}


def test_health_names_the_stages_that_are_not_ready() -> None:
    ready = dict.fromkeys(STAGES, True)

    async def check() -> list[StageHealth]:
        return [StageHealth(name, is_ready=is_ready) for name, is_ready in ready.items()]

    with _client(ScriptedEngine(), check_stages=check) as client:
        assert client.get("/health").json() == {"status": "ok", "stages": dict.fromkeys(STAGES, "ok")}
        ready["generator"] = False
        error = _assert_is_error(client.get("/health"), 503, "not_ready")
    assert "generator" in error["message"]
    assert "preprocessor" not in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", PATH, 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("POST", f"{PATH}/", 404, "not_found"),
        ("GET", "/health/", 404, "not_found"),
    ],
)
def test_routing_errors_have_the_same_shape(method: str, path: str, status: int, code: str) -> None:
    with _client(ScriptedEngine()) as client:
        _assert_is_error(client.request(method, path), status, code)


def test_internal_errors_have_the_same_shape() -> None:
    async def check() -> list[StageHealth]:
        raise ZeroDivisionError

    with _client(ScriptedEngine(), check_stages=check) as client:
        _assert_is_error(client.get("/health"), 500, "internal_error")


def test_a_body_beyond_the_limit_is_refused_announced_or_not() -> None:
    def pieces() -> Iterator[bytes]:
        yield from [b"x" * 60] * 2

    with _client(ScriptedEngine(), limits=LimitArgs(max_body_bytes=100)) as client:
        for content in (b"x" * 101, pieces()):
            error = _assert_is_error(client.post(PATH, content=content), 413, "request_too_large")
            assert "100" in error["message"]


@pytest.mark.parametrize("path", [PATH, "/tokenize", "/worker_generate_stream", "/register_worker"])
def test_a_compressed_body_is_refused(path: str) -> None:
    body = gzip.compress(json.dumps(HELLO).encode())
    with _client(ScriptedEngine()) as client:
        response = client.post(path, content=body, headers={"content-encoding": "gzip"})
    assert response.status_code == 415
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_content_encoding", "content-encoding")


def test_a_body_that_times_out_is_refused_and_its_connection_closed() -> None:
    engine = ScriptedEngine()
    app = Gateway({"m": engine}, all_ready, limits=LimitArgs(max_body_seconds=0.01)).app
    # One piece, nothing more in time, and the end of the connection.
    incoming = iter([{"type": "http.request", "body": b"{", "more_body": True}, None, {"type": "http.disconnect"}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(incoming) or await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = _scope() | {"headers": [(b"content-length", b"2")]}
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 10))
    start, body, _end = sent
    assert (start["status"], dict(start["headers"])[b"connection"]) == (408, b"close")
    error = json.loads(body["body"])["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "request_timeout")
    assert "after 0.01 seconds" in error["message"]
    assert engine.requests == []


def test_bodies_in_flight_are_bounded_in_total_until_sent_on() -> None:
    body = json.dumps({**HELLO, "stream": True}).encode()
    limits = LimitArgs(max_body_bytes=len(body), max_bytes_in_flight=len(body) + 10)
    held: list[Callable[[], None]] = []

    class Slow(ScriptedEngine):
        """Releases a request when told to."""

        async def stream(self, request: AnyRequest, on_sent: Callable[[], None]) -> AsyncGenerator[Item, None]:
            held.append(on_sent)
            await asyncio.Event().wait()
            yield Rejected(OverloadedError("never", limit="engine"))

    engine = Slow()
    app = Gateway({"m": engine}, all_ready, limits=limits).app

    async def statuses() -> list[int]:
        first = asyncio.create_task(_status(app, body))
        await _until(lambda: len(held) == 1)
        refused = await _status(app, body)
        held[0]()
        third = asyncio.create_task(_status(app, body))
        await _until(lambda: len(held) == 2)
        for task in (first, third):
            task.cancel()
        await asyncio.gather(first, third, return_exceptions=True)
        engine.stream = ScriptedEngine(answer("x")).stream  # type: ignore[method-assign]
        return [refused, await _status(app, body)]

    assert asyncio.run(statuses()) == [429, 200]


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def _status(app: Any, body: bytes) -> int:
    """Return the status of one request, made as a server would."""
    incoming = iter([{"type": "http.request", "body": body, "more_body": False}])
    statuses: list[int] = []

    async def receive() -> Any:
        message = next(incoming, None)
        if message is None:
            await asyncio.Event().wait()
        return message

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(_scope(), receive, send)
    return statuses[0]


def _scope(**asgi: str) -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": PATH, "headers": [], "query_string": b"", "asgi": asgi}


@pytest.mark.parametrize("asgi", [{}, {"spec_version": "2.4"}])
def test_a_disconnect_before_the_first_chunk_closes_the_engines_stream(asgi: dict[str, str]) -> None:
    engine = ScriptedEngine([TokenDelta("id", "Hel", (1,))], hangs=True)
    app = Gateway({"m": engine}, all_ready).app
    incoming = iter([{"type": "http.request", "body": json.dumps({**HELLO, "stream": True}).encode()}])

    async def receive() -> Any:
        return next(incoming, {"type": "http.disconnect"})

    async def send(_message: Any) -> None:
        if asgi:
            raise OSError("the connection is closed")
        await asyncio.Event().wait()

    asyncio.run(asyncio.wait_for(app(_scope(**asgi), receive, send), 10))
    assert len(engine.requests) == 1
    assert engine.num_open == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_complete_answer_is_read_to_its_end_and_not_cancelled(*, stream: bool) -> None:
    engine = ScriptedEngine(answer("Hel", "lo"))
    assert _post(engine, stream=stream).status_code == 200
    assert (engine.num_open, engine.num_left_early) == (0, 0)


def test_a_client_disconnect_closes_the_engines_stream() -> None:
    """Driven as an ASGI server would: a disconnect arrives while the answer hangs."""
    engine = ScriptedEngine([TokenDelta("id", "Hel", (1,))], hangs=True)
    app = Gateway({"m": engine}, all_ready).app
    body = json.dumps({**HELLO, "stream": True}).encode()

    async def request() -> list[str]:
        begun = asyncio.Event()
        incoming = iter([{"type": "http.request", "body": body, "more_body": False}])
        sent: list[str] = []

        async def receive() -> Any:
            message = next(incoming, None)
            if message is None:
                await begun.wait()
                return {"type": "http.disconnect"}
            return message

        async def send(message: Any) -> None:
            sent.append(message["type"])
            if message.get("body"):
                begun.set()

        await asyncio.wait_for(app(_scope(), receive, send), 10)
        return sent

    assert asyncio.run(request())[0] == "http.response.start"
    assert engine.num_open == 0


def test_a_cancelled_request_closes_the_engines_stream() -> None:
    """Serve cancels a request when its client leaves, streaming or not."""
    for stream in (False, True):
        engine = ScriptedEngine([TokenDelta("id", "Hel", (1,))], hangs=True)
        app = Gateway({"m": engine}, all_ready).app
        body = json.dumps({**HELLO, "stream": stream}).encode()
        asyncio.run(_cancel_when_open(app, body, lambda engine=engine: engine.num_open == 1))
        assert engine.num_open == 0


async def _cancel_when_open(app: Any, body: bytes, is_open: Callable[[], bool]) -> None:
    task = asyncio.create_task(_status(app, body))
    await _until(is_open)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


# Bad input through the whole graph, as a client sees it.


def _ask(client: TestClient, *parts: dict, **fields: Any) -> Any:
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
    return client.post(PATH, json={"messages": messages, "max_tokens": 3, **fields})


def _picture(data: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


@pytest.mark.parametrize("name", unusual())
def test_unusual_pictures_are_answered(name: str, local_client: TestClient) -> None:
    response = _ask(local_client, _picture(unusual()[name]))
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 4


@pytest.mark.parametrize("name", unusable())
def test_unusable_pictures_are_refused_naming_the_field(
    name: str, local_client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        response = _ask(local_client, _picture(unusable()[name]))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] in ("invalid_image", "image_too_large")
    assert error["param"].startswith("messages[0].content[0].image_url")
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    ("fields", "param", "code", "expected"),
    [
        ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded", "512"),
        (
            {"max_completion_tokens": 100_000, "max_tokens": None},
            "max_completion_tokens",
            "context_length_exceeded",
            "512",
        ),
        ({"messages": [{"role": "user", "content": "long " * 500}]}, "messages", "context_length_exceeded", "512"),
        ({"messages": [{"role": "user", "content": "x" * 300_000}]}, "messages", "text_too_long", "200000"),
        (
            {"messages": [{"role": "system", "content": "x" * 300_000}, *HELLO["messages"]]},
            "messages",
            "text_too_long",
            "200000",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages[0].role", "invalid_value", "assistant"),
    ],
)
def test_refusals_name_field_cause_and_limit(
    fields: dict, param: str, code: str, expected: str, local_client: TestClient
) -> None:
    response = _ask(local_client, **fields)
    error = _assert_is_error(response, 400, code)
    assert error["param"] == param
    assert expected in error["message"]


def test_more_pictures_or_bytes_than_allowed_are_refused(local_client: TestClient) -> None:
    many = _ask(local_client, *[_picture(plain())] * (LIMITS.max_images + 1))
    assert str(LIMITS.max_images) in _assert_is_error(many, 400, "too_many_images")["message"]
    heavy = _ask(local_client, _picture(b"\x89PNG" + b"x" * LIMITS.max_image_bytes))
    assert str(LIMITS.max_image_bytes) in _assert_is_error(heavy, 400, "image_too_large")["message"]


def test_more_answers_than_allowed_are_refused(local_client: TestClient) -> None:
    error = _assert_is_error(_ask(local_client, n=LIMITS.max_n + 1), 400, "invalid_value")
    assert error["param"] == "n"
    assert str(LIMITS.max_n) in error["message"]


@pytest.mark.parametrize("fields", [{"stop_token_ids": [10**6]}, {"logit_bias": {"1000000": 1}}])
def test_nonexistent_token_ids_are_refused_naming_the_field(fields: dict, local_client: TestClient) -> None:
    error = _assert_is_error(_ask(local_client, **fields), 400, "invalid_value")
    assert [error["param"]] == list(fields)
