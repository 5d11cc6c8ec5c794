"""More concurrent requests than a gateway may work on: one is refused, whatever its body, and slots are freed."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.http.in_flight import InFlight


class Held:
    """An app whose requests last until they are released."""

    def __init__(self) -> None:
        self.running = 0
        self.let_go = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.running += 1
        try:
            await self.let_go.wait()
            if self.error is not None:
                raise self.error
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})
        finally:
            self.running -= 1


async def ask(app: ASGIApp, method: str = "POST") -> list[Message]:
    async def receive() -> Message:
        raise AssertionError("the body of what is refused is not read")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/", "headers": [], "state": {"request_id": "r"}}
    await app(scope, receive, send)
    return sent


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


def run(test: Callable[[Held, ASGIApp], Awaitable[Any]]) -> Any:
    async def inside() -> Any:
        held = Held()
        return await test(held, InFlight(held, limit=2))

    return asyncio.run(inside())


def test_one_request_too_many_is_refused_at_once_with_retry_after() -> None:
    async def test(held: Held, app: ASGIApp) -> None:
        first = [asyncio.create_task(ask(app)) for _ in range(2)]
        await until(lambda: held.running == 2)
        start, body = await ask(app)
        assert (start["status"], dict(start["headers"])[b"retry-after"]) == (429, b"1")
        assert b"works on 2 requests" in body["body"]
        # A request without a body takes no slot.
        look = asyncio.create_task(ask(app, "GET"))
        await until(lambda: held.running == 3)
        held.let_go.set()
        assert [sent[0]["status"] for sent in await asyncio.gather(*first, look)] == [200] * 3
        assert (await ask(app))[0]["status"] == 200

    run(test)


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_slot_is_freed_however_a_request_ends(how: str) -> None:
    async def test(held: Held, app: ASGIApp) -> None:
        tasks = [asyncio.create_task(ask(app)) for _ in range(2)]
        await until(lambda: held.running == 2)
        if how == "failed":
            held.error = RuntimeError("of the app")
            held.let_go.set()
        else:
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        held.error = None
        held.let_go.set()
        assert (await ask(app))[0]["status"] == 200

    run(test)
