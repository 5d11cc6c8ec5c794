"""Requests with a deadline: which times are accepted, what is cancelled, and what the client is told."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from deployments.errors import DeadlineError
from deployments.gateway import Gateway
from deployments.http.deadlines import TIMEOUT_HEADER, Deadline, read_deadline
from deployments.settings.app import LimitArgs
from llava_core.errors import RequestError
from llava_core.types import TokenDelta
from tests.deployments.fakes import ScriptedEngine, all_ready, answer

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


class _Stuck(ScriptedEngine):
    """Never returns the tokens of a prompt."""

    async def tokenize(self, request: object) -> Any:
        await asyncio.Event().wait()

    async def detokenize(self, ids: object) -> Any:
        await asyncio.Event().wait()


def _post(engine: ScriptedEngine, seconds: str, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    gateway = Gateway({"m": engine}, all_ready, limits=LimitArgs(max_timeout_seconds=100))
    with TestClient(gateway.app) as client:
        return client.post(
            path, json=fields if "token" in path else {**CHAT, **fields}, headers={TIMEOUT_HEADER: seconds}
        )


def _assert_is_too_late(body: Any) -> None:
    assert set(body) == {"error", "request_id"}
    assert (body["error"]["type"], body["error"]["code"]) == ("server_error", "deadline_exceeded")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_does_not_begin_in_time_is_cancelled_with_504(*, stream: bool) -> None:
    engine = ScriptedEngine(hangs=True)
    response = _post(engine, "0.5", stream=stream)
    assert response.status_code == 504
    _assert_is_too_late(response.json())
    assert (engine.num_open, engine.num_left_early) == (0, 1)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_does_not_end_in_time_is_cancelled_with_an_error(*, stream: bool) -> None:
    engine = ScriptedEngine([TokenDelta("id", "Hel", (1,))], hangs=True)
    response = _post(engine, "0.5", stream=stream)
    assert response.status_code == (200 if stream else 504)
    body = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    _assert_is_too_late(body)
    assert (engine.num_open, engine.num_left_early) == (0, 1)


@pytest.mark.parametrize("fields", [{"path": "/tokenize", "prompt": "x"}, {"path": "/detokenize", "tokens": [1]}])
def test_tokenizing_obeys_the_deadline(fields: dict[str, Any]) -> None:
    response = _post(_Stuck(), "0.5", **fields)
    assert response.status_code == 504
    _assert_is_too_late(response.json())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_in_time_is_unaffected_by_the_deadline(*, stream: bool) -> None:
    response = _post(ScriptedEngine(answer("Hel", "lo")), "100", stream=stream)
    assert response.status_code == 200
    assert "Hel" in response.text


@pytest.mark.parametrize(
    "seconds", ["", "0", "0.0", "-1", "nan", "inf", "1e2", "100.001", "soon", "\u0661", "1,2", " "]
)
def test_an_invalid_timeout_is_refused_naming_the_header(seconds: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_deadline(Headers(raw=[(TIMEOUT_HEADER.encode(), seconds.encode())]), max_seconds=100)
    assert caught.value.param == TIMEOUT_HEADER
    assert "100" in caught.value.message


def test_an_invalid_timeout_is_a_bad_request() -> None:
    response = _post(ScriptedEngine(), "-1")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == TIMEOUT_HEADER


def test_two_timeout_headers_are_refused() -> None:
    with pytest.raises(RequestError):
        read_deadline(Headers(raw=[(TIMEOUT_HEADER.encode(), b"1")] * 2), max_seconds=100)


def test_our_deadline_fires_before_serves_own() -> None:
    async def seconds_of(asked: float) -> float:
        clock = asyncio.get_running_loop()
        begun = clock.time()
        with pytest.raises(DeadlineError):
            async with Deadline(asked).around():
                await asyncio.Event().wait()
        return clock.time() - begun

    assert 0.074 <= asyncio.run(seconds_of(0.1)) < 0.1


def test_an_unrelated_timeout_error_is_passed_through() -> None:
    async def items() -> AsyncGenerator[int, None]:
        yield 1
        raise TimeoutError("of a file system")

    async def run() -> None:
        watched = Deadline(100).watch(items())
        assert await anext(watched) == 1
        with pytest.raises(TimeoutError, match="file system"):
            await anext(watched)

    asyncio.run(run())
