"""The gateway's metrics: routes rather than paths, errors by code, clients that hang up, answers piece by piece."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
from starlette.testclient import TestClient

from deployments.errors import RateLimitError
from deployments.gateway import Gateway
from deployments.http.request_context import current_request
from deployments.http.request_metrics import metered
from deployments.messages import Item, Rejected
from deployments.metrics import (
    CANCELLATIONS,
    CHUNK_GAP,
    ERRORS,
    HTTP_DURATION,
    HTTP_REQUESTS,
    REFUSALS,
    TIME_TO_FIRST_TOKEN,
)
from llava_core.errors import EngineError, OverloadedError
from llava_core.types import TokenDelta
from tests.deployments.fakes import FakeRecorder, ScriptedEngine, all_ready, answer
from tests.deployments.service import until

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}


def _gateway(engine: ScriptedEngine) -> tuple[Any, FakeRecorder]:
    recorder = FakeRecorder()
    return Gateway({"m": engine}, all_ready, recorder=recorder).app, recorder


def _requests(recorder: FakeRecorder) -> dict[tuple[str, ...], float]:
    return {labels: value for (metric, labels), value in recorder.counted.items() if metric is HTTP_REQUESTS}


def test_requests_are_counted_by_route_and_status() -> None:
    app, recorder = _gateway(ScriptedEngine(answer("a", "b")))
    with TestClient(app) as client:
        for path in ("/v1/models", "/v1/models/m", "/v1/models/other", "/nothing", "/nothing/else", "/health"):
            client.get(path)
        client.get(CHAT)
        client.request("BREW", "/health")
        client.post(CHAT, json=HELLO)
    assert _requests(recorder) == {
        ("GET", "/v1/models", "200"): 1,
        ("GET", "/v1/models/{name:path}", "200"): 1,
        ("GET", "/v1/models/{name:path}", "404"): 1,
        ("GET", "other", "404"): 2,
        ("GET", "/health", "200"): 1,
        ("GET", CHAT, "405"): 1,
        ("other", "/health", "405"): 1,
        ("POST", CHAT, "200"): 1,
    }
    assert len(recorder.observed[HTTP_DURATION, ("/health",)]) == 2
    assert not [labels for metric, labels in recorder.counted if metric is CANCELLATIONS]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("items", "code"),
    [
        ([Rejected(OverloadedError("full", limit="engine"))], "overloaded"),
        ([EngineError("broken")], "engine_error"),
        ([RuntimeError("a bug")], "internal_error"),
        ([TokenDelta("id", "a", (1,)), EngineError("broken")], "engine_error"),
    ],
)
def test_errors_are_counted_by_the_code_sent_to_the_client(items: Any, code: str, *, stream: bool) -> None:
    app, recorder = _gateway(ScriptedEngine(items))
    with TestClient(app, raise_server_exceptions=False) as client:
        text = client.post(CHAT, json={**HELLO, "stream": stream}).text
    assert f'"code":"{code}"' in text
    assert {labels: value for (metric, labels), value in recorder.counted.items() if metric is ERRORS} == {(code,): 1}


@pytest.mark.parametrize(
    "error", [OverloadedError("full", limit="engine"), RateLimitError("full", limit="tokens", retry_after_s=7)]
)
def test_refusals_are_counted_by_the_exhausted_limit(error: OverloadedError) -> None:
    app, recorder = _gateway(ScriptedEngine([error]))
    with TestClient(app) as client:
        assert client.post(CHAT, json=HELLO).status_code == 429
        assert client.post(CHAT, json={**HELLO, "model": "other"}).status_code == 404
    assert recorder.counted[REFUSALS, (error.limit,)] == 1
    assert sum(value for (metric, _), value in recorder.counted.items() if metric is REFUSALS) == 1


def test_internal_errors_are_counted_too() -> None:
    async def broken() -> Any:
        raise RuntimeError("a bug")

    recorder = FakeRecorder()
    app = Gateway({"m": ScriptedEngine()}, broken, recorder=recorder).app
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/health").status_code == 500
    assert _requests(recorder) == {("GET", "/health", "500"): 1}
    assert recorder.counted[ERRORS, ("internal_error",)] == 1


@pytest.mark.parametrize(
    ("items", "stream", "phase"),
    [([], True, "waiting"), (answer("a", "b")[:1], True, "streaming"), (answer("a", "b")[:1], False, "waiting")],
)
def test_a_client_disconnect_is_counted_once(items: list[Item], phase: str, *, stream: bool) -> None:
    engine = ScriptedEngine(items, hangs=True)
    app, recorder = _gateway(engine)

    async def run() -> None:
        is_begun = asyncio.Event()
        incoming = iter([{"type": "http.request", "body": json.dumps({**HELLO, "stream": stream}).encode()}])

        async def receive() -> Any:
            message = next(incoming, None)
            if message is None:
                await is_begun.wait()
                return {"type": "http.disconnect"}
            return message

        async def send(message: Any) -> None:
            if message.get("body"):
                is_begun.set()

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b"", "root_path": ""}
        task = asyncio.create_task(app(scope, receive, send))
        if phase == "waiting":
            while not engine.num_open:
                await asyncio.sleep(0)
            # As Serve does.
            task.cancel()
        await asyncio.wait([task], timeout=10)

    asyncio.run(run())
    assert _requests(recorder) == {("POST", CHAT, "499"): 1}
    assert recorder.counted[CANCELLATIONS, (phase,)] == 1


def test_time_to_first_token_and_chunk_gaps_are_measured() -> None:
    app, recorder = _gateway(ScriptedEngine(answer("a", "b", "c")))
    with TestClient(app) as client:
        for stream in (True, False):
            client.post(CHAT, json={**HELLO, "stream": stream})
    assert len(recorder.observed[TIME_TO_FIRST_TOKEN, ("m",)]) == 2
    assert len(recorder.observed[CHUNK_GAP, ("m",)]) == 4
    first, whole = recorder.observed[TIME_TO_FIRST_TOKEN, ("m",)], recorder.observed[HTTP_DURATION, (CHAT,)]
    assert all(0 < early < late for early, late in zip(first, whole, strict=True))


def test_gaps_are_measured_between_chunks_of_the_same_answer() -> None:
    pieces: list[Item] = [TokenDelta("id", "a", (1,), index=index) for index in (0, 1, 0, 1)]
    app, recorder = _gateway(ScriptedEngine([*pieces, *answer("end", index=2)]))
    with TestClient(app) as client:
        client.post(CHAT, json={**HELLO, "n": 3})
    assert len(recorder.observed[TIME_TO_FIRST_TOKEN, ("m",)]) == 1
    assert len(recorder.observed[CHUNK_GAP, ("m",)]) == 2


def test_leaving_an_answer_early_closes_its_stream() -> None:
    engine = ScriptedEngine(answer("a", "b"))
    recorder = FakeRecorder()

    async def leave() -> None:
        items: AsyncGenerator[Item, None] = engine.stream(None, lambda: None)  # type: ignore[arg-type]
        async with aclosing(metered(items, recorder, "m")) as metered_items:
            await anext(metered_items)

    asyncio.run(leave())
    assert (engine.num_open, engine.num_left_early) == (0, 1)


def test_each_request_is_logged_with_key_and_code_but_without_content(caplog: pytest.LogCaptureFixture) -> None:
    class Keyed(ScriptedEngine):
        def stream(self, *given: Any) -> AsyncGenerator[Item, None]:
            current_request().key_id = "key-7"
            return super().stream(*given)

    app, _ = _gateway(Keyed([Rejected(OverloadedError("full", limit="engine"))]))
    body = {"messages": [{"role": "user", "content": "planted words"}]}
    with caplog.at_level(logging.INFO, "deployments"), TestClient(app) as client:
        client.post(f"{CHAT}?planted=words", json=body)
        client.get("/health?planted=words")
        until(lambda: len(caplog.records) >= 2)
    refused, well = (record for record in caplog.records if record.name == "deployments.http.request_metrics")
    assert refused.getMessage().startswith(f"POST {CHAT} 429 ")
    assert (refused.__dict__["key_id"], refused.__dict__["error_code"]) == ("key-7", "overloaded")
    assert not {"key_id", "error_code"} & {*well.__dict__}
    assert "planted" not in str([record.__dict__ for record in caplog.records])
