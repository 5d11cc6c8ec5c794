"""Intake of requests: bytes are counted, a deadline applies, and a body is parsed off the event loop."""

import asyncio
import threading
from typing import Any

import pytest
from starlette.requests import Request

from deployments.errors import DeadlineError, RequestTooLargeError
from deployments.http.intake import Intake
from deployments.settings.app import LimitArgs
from llava_core.errors import OverloadedError, RequestError
from llava_core.request_limits import RequestLimits


def request(*pieces: bytes, **headers: str) -> Request:
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": named}, receive)


def test_a_body_is_parsed_with_the_limits_in_a_separate_thread() -> None:
    seen: list[Any] = []

    def read(body: bytes, request_id: str, limits: RequestLimits) -> str:
        seen.extend([body, request_id, limits, threading.current_thread() is threading.main_thread()])
        return "what it says"

    limits = LimitArgs(max_text=7)
    intake = Intake(limits)
    assert asyncio.run(intake.read(request(b"ab", b"c"), intake.lease(), read, "id")) == "what it says"
    assert seen == [b"abc", "id", limits.request, False]


def test_bodies_are_bounded_singly_and_in_total() -> None:
    intake = Intake(LimitArgs(max_body_bytes=5, max_bytes_in_flight=8))
    leases = [intake.lease() for _ in range(2)]

    async def read(content: bytes, lease: Any) -> bytes:
        return await intake.read(request(content), lease, lambda body, *_: body, "id")

    with pytest.raises(RequestTooLargeError):
        asyncio.run(read(b"123456", intake.lease()))
    assert asyncio.run(read(b"12345", leases[0])) == b"12345"
    with pytest.raises(OverloadedError):
        asyncio.run(read(b"12345", leases[1]))
    leases[0].release()
    assert asyncio.run(read(b"12345", leases[1])) == b"12345"


def test_a_client_may_set_a_deadline_up_to_the_limit() -> None:
    intake = Intake(LimitArgs(max_timeout_seconds=10))

    async def wait(seconds: str) -> None:
        async with intake.deadline(request(x_request_timeout_seconds=seconds)).around():
            await asyncio.Event().wait()

    with pytest.raises(DeadlineError):
        asyncio.run(wait("0.01"))
    with pytest.raises(RequestError, match="not above 10"):
        asyncio.run(wait("11"))
