"""A refusal reaches a client that is still sending; what is read of its body is bounded, and nothing is held of it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks.ports import free_port
from deployments.access.authorization import KeyRing
from deployments.gateway import Gateway
from deployments.http.lingering import LingeringClose
from deployments.launch.load_balancer import LoadBalancer
from deployments.settings.app import LimitArgs
from tests.deployments.fakes import ScriptedEngine, all_ready
from tests.deployments.service import until
from tests.sockets import serving_app

PATH = "/v1/chat/completions"
# More than the buffers of all sockets on the way.
LARGE = b"x" * 20_000_000


async def refuse(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 429, "headers": []})
    await send({"type": "http.response.body", "body": b"no"})


async def take(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await refuse(scope, receive, send)


class Client:
    """Sends these pieces, then falls silent if it is not `whole`; remembers the response, and how much was read of the
    request when each of its parts came."""

    def __init__(self, *pieces: bytes, whole: bool = True, **headers: str) -> None:
        self._left = list(pieces)
        self._whole = whole
        named = headers or {"content-length": str(len(b"".join(pieces)))}
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()]
        self.scope = {"type": "http", "method": "POST", "path": "/", "headers": raw}
        self.num_read = 0
        self.sent: list[Message] = []
        self.read_before: list[int] = []

    async def receive(self) -> Message:
        if not self._left:
            await asyncio.Event().wait()
        piece = self._left.pop(0)
        self.num_read += len(piece)
        return {"type": "http.request", "body": piece, "more_body": bool(self._left) or not self._whole}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        self.read_before.append(self.num_read)

    async def ask(self, app: ASGIApp) -> None:
        async with asyncio.timeout(10):
            await app(self.scope, self.receive, self.send)


def test_the_refusal_is_sent_at_once_and_its_end_after_the_body() -> None:
    client = Client(b"abc", b"def")
    asyncio.run(client.ask(LingeringClose(refuse, max_bytes=100)))
    start, body, end = client.sent
    assert (start["status"], dict(start["headers"])[b"connection"]) == (429, b"close")
    assert (body["body"], body["more_body"]) == (b"no", True)
    assert not end.get("body")
    assert not end.get("more_body")
    assert client.read_before == [0, 0, 6]


@pytest.mark.parametrize(("app", "headers"), [(take, {}), (refuse, {"content_length": "0"}), (refuse, {"host": "x"})])
def test_a_response_after_the_whole_body_is_left_as_it_is(app: ASGIApp, headers: dict[str, str]) -> None:
    client = Client(b"abc", b"def", **headers)
    asyncio.run(client.ask(LingeringClose(app, max_bytes=100)))
    assert [message["type"] for message in client.sent] == ["http.response.start", "http.response.body"]
    assert client.sent[0]["headers"] == []
    assert "more_body" not in client.sent[1]


@pytest.mark.parametrize("headers", [{"transfer_encoding": "chunked"}, {"content_length": "100"}])
def test_what_is_read_is_bounded_in_bytes(headers: dict[str, str]) -> None:
    client = Client(*[b"x" * 10] * 10, **headers)
    asyncio.run(client.ask(LingeringClose(refuse, max_bytes=45)))
    # One announced to be longer is not begun.
    assert client.num_read == (50 if "transfer_encoding" in headers else 0)
    assert len(client.sent) == 3


def test_what_is_read_is_bounded_in_time() -> None:
    client = Client(b"abc", whole=False, transfer_encoding="chunked")
    asyncio.run(client.ask(LingeringClose(refuse, max_bytes=100, max_seconds=0.01)))
    assert (client.num_read, len(client.sent)) == (3, 3)


def test_only_so_many_bodies_are_read_at_once() -> None:
    async def ask() -> None:
        app = LingeringClose(refuse, max_bytes=100, max_connections=1)
        silent = asyncio.create_task(Client(b"abc", whole=False, transfer_encoding="chunked").ask(app))
        for is_read in (False, True):
            await asyncio.sleep(0)
            client = Client(b"abc")
            await client.ask(app)
            assert client.num_read == (3 if is_read else 0)
            silent.cancel()
            await asyncio.gather(silent, return_exceptions=True)

    asyncio.run(ask())


def test_the_app_has_ended_before_the_rest_is_read() -> None:
    running = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal running
        running += 1
        await refuse(scope, receive, send)
        running -= 1

    class Watching(Client):
        async def receive(self) -> Message:
            assert not running
            return await super().receive()

    client = Watching(b"abc")
    asyncio.run(client.ask(LingeringClose(app, max_bytes=100)))
    assert client.num_read == 3


# Over real connections, to the server and through HAProxy, with clients that send everything before they read.


@contextlib.contextmanager
def _served(way: str, engine: ScriptedEngine | None = None, **options: Any) -> Iterator[str]:
    app = Gateway({"m": engine or ScriptedEngine()}, all_ready, **options).app

    async def replica(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/-/routes":
            await app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"/": "llava"}'})

    with serving_app(replica) as direct:
        if way == "direct":
            yield direct
            return
        address = ("127.0.0.1", free_port())
        balancer = LoadBalancer(address, "127.0.0.1", [int(direct.rpartition(":")[2])], "llava")
        balancer.start()
        try:
            url = f"http://127.0.0.1:{address[1]}"
            until(lambda: httpx.get(f"{url}/health").status_code == 200)
            yield url
        finally:
            balancer.stop()


async def _statuses(url: str, *contents: Any, **headers: str) -> list[int]:
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        responses = [await client.post(PATH, content=each, headers=headers) for each in contents]
    assert all(response.json()["request_id"] for response in responses)
    return [response.status_code for response in responses]


async def _pieces() -> AsyncIterator[bytes]:
    for start in range(0, len(LARGE), 100_000):
        yield LARGE[start : start + 100_000]


WAYS = pytest.mark.parametrize("way", ["direct", "haproxy"])


@WAYS
def test_a_client_without_a_key_sees_401(way: str, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('{"keys": []}')
    with _served(way, keys=KeyRing(tmp_path / "keys.json")) as url:
        assert asyncio.run(_statuses(url, *[LARGE] * 3)) == [401] * 3


@WAYS
def test_a_client_whose_body_is_too_large_sees_413(way: str) -> None:
    with _served(way, limits=LimitArgs(max_body_bytes=15_000_000)) as url:
        assert asyncio.run(_statuses(url, LARGE, _pieces(), LARGE)) == [413] * 3


@WAYS
@pytest.mark.parametrize("limit", ["max_requests_in_flight", "max_bytes_in_flight"])
def test_a_client_of_a_busy_service_sees_429(limit: str, way: str) -> None:
    limits = LimitArgs(max_body_bytes=len(LARGE), **{limit: 1 if "requests" in limit else len(LARGE)})
    engine = ScriptedEngine(hangs=True)
    # Its bytes stay in memory, because the engine never takes them.
    held = json.dumps({"messages": [{"role": "user", "content": "hi"}], "metadata": "x" * 1_000_000})

    async def ask(url: str) -> list[int]:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
            holding = asyncio.create_task(client.post(PATH, content=held))
            async with asyncio.timeout(30):
                while not engine.num_open:
                    await asyncio.sleep(0.001)
            statuses = await _statuses(url, *[LARGE] * 3)
            holding.cancel()
        return statuses

    with _served(way, engine, limits=limits) as url:
        assert asyncio.run(ask(url)) == [429] * 3
