"""Access through the gateway: no request without a valid key gets in, except on the open route."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from deployments.access import authorization
from deployments.access.api_keys import ApiKey, editing, hash_key, make_key, read_keys
from deployments.access.authorization import KeyRing
from deployments.errors import KeysFileError
from deployments.gateway import Gateway
from llava_core.types import TokenDelta, Usage
from tests.deployments.fakes import ScriptedEngine, all_ready, answer

PATH = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "keys.json").write_text('{"keys": []}')
    return tmp_path / "keys.json"


def _add(path: Path, key_id: str = "team", **fields: Any) -> dict[str, str]:
    """Add a key to the file, and return the header that carries it."""
    key = make_key(key_id)
    with editing(path) as keys:
        keys[key_id] = ApiKey(id=key_id, sha256=hash_key(key), created_at=NOW, **fields)
    return {"authorization": f"Bearer {key}"}


@contextmanager
def _client(path: Path, engine: ScriptedEngine | None = None, **options: Any) -> Iterator[TestClient]:
    ring = KeyRing(path, max_age_s=0, now=lambda: NOW, **options)
    gateway = Gateway({"m": engine or ScriptedEngine(answer("x"))}, all_ready, keys=ring)
    with TestClient(gateway.app, raise_server_exceptions=False) as client:
        yield client


def _assert_refused(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert body["error"]["code"] == code
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["request_id"] == response.headers["x-request-id"]
    return body["error"]


def test_no_route_but_health_answers_without_a_key(path: Path) -> None:
    """This checks every existing route, so that a new one is checked too."""
    engine = ScriptedEngine(answer("x"))
    gateway = Gateway({"m": engine}, all_ready, keys=KeyRing(path))
    routes = [route.path.replace("{name:path}", "m") for route in gateway.routes]
    assert {PATH, "/v1/models", "/health"} <= set(routes)
    with _client(path, engine) as client:
        for route in [*routes, "/", "/nothing", "/health/", "/v1"]:
            for method in ("GET", "HEAD", "POST", "OPTIONS", "DELETE"):
                response = client.request(method, route, json=HELLO, follow_redirects=False)
                if route == "/health" and method in ("GET", "HEAD"):
                    assert response.status_code == 200
                else:
                    assert response.status_code == 401, (method, route)
                    assert response.headers["www-authenticate"] == "Bearer"
    assert engine.requests == []


def test_a_valid_key_is_accepted(path: Path) -> None:
    headers = _add(path)
    with _client(path) as client:
        assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.post(PATH, json=HELLO, headers=headers).status_code == 200
        assert client.get("/nothing", headers=headers).status_code == 404
        lower = {"authorization": headers["authorization"].replace("Bearer", "bearer")}
        assert client.get("/v1/models", headers=lower).status_code == 200


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        ("", "invalid_api_key"),
        ("Bearer", "invalid_api_key"),
        ("Bearer unused", "invalid_api_key"),
        ("Bearer {other}", "invalid_api_key"),
        ("Bearer {key}x", "invalid_api_key"),
        ("Bearer {upper}", "invalid_api_key"),
        ("Basic {key}", "invalid_api_key"),
        ("{key}", "invalid_api_key"),
        ("Bearer {expired}", "expired_api_key"),
    ],
)
def test_an_invalid_key_is_refused(header: str | None, code: str, path: Path) -> None:
    key = _add(path)["authorization"].removeprefix("Bearer ")
    expired = _add(path, "old", expires_at=NOW)["authorization"].removeprefix("Bearer ")
    words = {"key": key, "other": make_key("team"), "upper": key.swapcase(), "expired": expired}
    headers = {} if header is None else {"authorization": header.format(**words)}
    with _client(path) as client:
        error = _assert_refused(client.get("/v1/models", headers=headers), 401, code)
    assert key not in error["message"]


def test_the_log_names_the_key_that_was_used(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    headers = _add(path)
    with caplog.at_level("INFO", "deployments"), _client(path) as client:
        client.get("/v1/models", headers=headers)
        client.get("/v1/models")
    assert [getattr(record, "key_id", None) for record in caplog.records if hasattr(record, "status")] == ["team", None]
    assert headers["authorization"].rsplit(".", 1)[1] not in caplog.text


def test_two_authorization_headers_are_refused(path: Path) -> None:
    given = _add(path)["authorization"]
    with _client(path) as client:
        twice = [("authorization", given), ("authorization", "Bearer other")]
        _assert_refused(client.get("/v1/models", headers=twice), 401, "invalid_api_key")


@pytest.mark.parametrize("host", ["x/health?", "x/health#", "127.0.0.1/health", "health", "x@y/health?/../"])
def test_host_header_cannot_bypass_the_key_check(host: str, path: Path) -> None:
    with _client(path) as client:
        for route in ("/v1/models", PATH):
            response = client.post(route, json=HELLO, headers={"host": host})
            _assert_refused(response, 401, "missing_api_key")


@pytest.mark.parametrize("target", ["/health/../v1/models", "//health/v1/models", "/%68ealth", "/health%2f", "/HEALTH"])
def test_only_the_exact_health_path_is_open(target: str, path: Path) -> None:
    """Sent without the client, which would normalise paths; only what the router itself takes for /health is open."""
    app = Gateway({"m": ScriptedEngine()}, all_ready, keys=KeyRing(path)).app
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    scope = {
        "type": "http",
        "method": "GET",
        "path": target,
        "raw_path": b"/health",
        "headers": [],
        "query_string": b"",
    }
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 401


def test_a_key_may_be_restricted_to_some_routes(path: Path) -> None:
    headers = _add(path, routes=("models",))
    with _client(path) as client:
        assert client.get("/v1/models", headers=headers).status_code == 200
        error = _assert_refused(client.post(PATH, json=HELLO, headers=headers), 403, "permission_denied")
        assert "models" in error["message"]
        _assert_refused(client.get("/nothing", headers=headers), 403, "permission_denied")


def test_added_and_revoked_keys_take_effect_at_once(path: Path) -> None:
    headers = _add(path)
    with _client(path) as client:
        assert client.get("/v1/models", headers=headers).status_code == 200
        with editing(path) as keys:
            keys.clear()
        _assert_refused(client.get("/v1/models", headers=headers), 401, "invalid_api_key")
        assert client.get("/v1/models", headers=_add(path)).status_code == 200


def test_a_damaged_or_missing_keys_file_lets_nobody_in(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    headers = _add(path)
    content = path.read_text()
    with _client(path) as client:
        for damage in (lambda: path.write_text("damaged"), path.unlink):
            damage()
            response = client.get("/v1/models", headers=headers)
            error = _assert_refused(response, 503, "keys_unavailable")
            assert int(response.headers["retry-after"]) >= 1
            assert str(path) not in error["message"]
            assert str(path) in caplog.text
            assert client.get("/health").status_code == 200
            path.write_text(content)
            assert client.get("/v1/models", headers=headers).status_code == 200


def test_a_missing_keys_file_aborts_the_start(tmp_path: Path) -> None:
    with pytest.raises(KeysFileError):
        KeyRing(tmp_path / "none.json")


def test_the_keys_file_is_not_checked_on_every_request(path: Path) -> None:
    now = [0.0]
    _add(path)
    ring = KeyRing(path, max_age_s=1, clock=lambda: now[0])
    gateway = Gateway({"m": ScriptedEngine(answer("x"))}, all_ready, keys=ring)
    with TestClient(gateway.app) as client:
        headers = _add(path, "later")
        assert client.get("/v1/models", headers=headers).status_code == 401
        now[0] = 1.0
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_each_key_has_its_own_limits_and_keeps_them_when_others_change(path: Path) -> None:
    first, second = _add(path, "a", requests_per_minute=2), _add(path, "b", requests_per_minute=2)
    with _client(path) as client:
        for _ in range(2):
            assert client.get("/v1/models", headers=first).status_code == 200
        _add(path, "c")
        response = client.get("/v1/models", headers=first)
        error = _assert_refused(response, 429, "rate_limit_exceeded")
        assert error["type"] == "requests"
        assert 1 <= int(response.headers["retry-after"]) <= 30
        assert client.get("/v1/models", headers=second).status_code == 200
        # Health needs no key, and is charged to nobody.
        assert client.get("/health", headers=first).status_code == 200


def test_limits_survive_a_temporarily_unreadable_keys_file(path: Path) -> None:
    headers = _add(path, requests_per_minute=1)
    content = path.read_text()
    with _client(path) as client:
        assert client.get("/v1/models", headers=headers).status_code == 200
        path.write_text("damaged")
        _assert_refused(client.get("/v1/models", headers=headers), 503, "keys_unavailable")
        path.write_text(content)
        _assert_refused(client.get("/v1/models", headers=headers), 429, "rate_limit_exceeded")


def test_a_keys_file_is_read_again_once_its_permissions_are_fixed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = _add(path)

    def read_unless_forbidden(path: Path) -> dict[str, ApiKey]:
        # Behave as for a user who is not root.
        if not path.stat().st_mode & 0o400:
            raise KeysFileError("it cannot be read")
        return read_keys(path)

    monkeypatch.setattr(authorization, "read_keys", read_unless_forbidden)
    with _client(path) as client:
        path.chmod(0o000)
        _assert_refused(client.get("/v1/models", headers=headers), 503, "keys_unavailable")
        path.chmod(0o600)
        assert client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_and_completion_tokens_are_charged(*, stream: bool, path: Path) -> None:
    # 11 prompt tokens and 3 completion tokens, as `answer` reports.
    engine = ScriptedEngine(answer("a", "b", "c"))
    now = [0.0]
    headers = _add(path, tokens_per_minute=14)
    with _client(path, engine, clock=lambda: now[0]) as client:
        body = {**HELLO, "stream": stream}
        assert client.post(PATH, json=body, headers=headers).status_code == 200
        response = client.post(PATH, json=body, headers=headers)
        assert _assert_refused(response, 429, "rate_limit_exceeded")["type"] == "tokens"
        # One token takes a fourteenth of a minute.
        assert response.headers["retry-after"] == "5"
        now[0] = 4.3
        assert client.post(PATH, json=body, headers=headers).status_code == 200


def test_a_prompt_shared_by_several_answers_is_charged_once(path: Path) -> None:
    ends = [
        TokenDelta("id", "x", (1,), "stop", usage, index=index)
        for index, usage in enumerate((None, None, Usage(10, 3)))
    ]
    now = [0.0]
    headers = _add(path, tokens_per_minute=20)
    with _client(path, ScriptedEngine(ends), clock=lambda: now[0]) as client:
        client.post(PATH, json={**HELLO, "n": 3}, headers=headers)
        # 13 of 20 are used; it would be 33 if the prompt were charged three times.
        assert client.post(PATH, json={**HELLO, "n": 3}, headers=headers).status_code == 200


def test_an_abandoned_answer_frees_its_slot_and_is_charged_for_its_tokens(path: Path) -> None:
    headers = _add(path, max_concurrent=1, tokens_per_minute=2)
    engine = ScriptedEngine([TokenDelta("id", "Hel", (1, 2, 3))], hangs=True)
    ring = KeyRing(path)
    app = Gateway({"m": engine}, all_ready, keys=ring).app
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def ask(*, until_body: asyncio.Event) -> list[Any]:
        incoming = iter([{"type": "http.request", "body": json.dumps({**HELLO, "stream": True}).encode()}])
        sent: list[Any] = []

        async def receive() -> Any:
            message = next(incoming, None)
            return message if message is not None else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)
            if message.get("body"):
                until_body.set()

        scope = {"type": "http", "method": "POST", "path": PATH, "headers": raw, "query_string": b"", "asgi": {}}
        await app(scope, receive, send)
        return sent

    async def run() -> list[tuple[int, str]]:
        begun = asyncio.Event()
        first = asyncio.create_task(ask(until_body=begun))
        await asyncio.wait_for(begun.wait(), 10)
        refused = await ask(until_body=asyncio.Event())
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        again = await ask(until_body=asyncio.Event())
        return [(sent[0]["status"], json.loads(sent[1]["body"])["error"]["type"]) for sent in (refused, again)]

    assert asyncio.run(run()) == [(429, "concurrent_requests"), (429, "tokens")]


def test_a_websocket_connection_is_closed(path: Path) -> None:
    headers = _add(path)
    with (
        _client(path) as client,
        pytest.raises(WebSocketDisconnect) as caught,
        client.websocket_connect("/health", headers=headers),
    ):
        pass
    assert caught.value.code == 1008


def test_keys_expire_while_the_service_runs(path: Path) -> None:
    headers = _add(path, expires_at=NOW + timedelta(seconds=1))
    now = [NOW]
    ring = KeyRing(path, now=lambda: now[0])
    with TestClient(Gateway({"m": ScriptedEngine()}, all_ready, keys=ring).app) as client:
        assert client.get("/v1/models", headers=headers).status_code == 200
        now[0] += timedelta(seconds=1)
        _assert_refused(client.get("/v1/models", headers=headers), 401, "expired_api_key")
