"""Bodies: bounded one by one and together; test_gateway.py sends them."""

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from deployments.bodies import BodyBudget, Lease, read_body
from deployments.errors import RequestTooLargeError
from llava_core.errors import OverloadedError


def _request(*pieces: bytes, **headers: str) -> Request:
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    incoming = iter([*messages, {"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Any:
        return next(incoming)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


def _read(lease: Lease, *pieces: bytes, **headers: str) -> bytes:
    return asyncio.run(read_body(_request(*pieces, **headers), 10, lease))


def test_a_body_is_joined_and_held_until_it_is_released() -> None:
    budget = BodyBudget(10)
    lease = budget.lease()
    assert _read(lease, b"ab", b"cd") == b"abcd"
    assert budget.num_bytes == 4
    lease.release()
    lease.release()
    assert budget.num_bytes == 0


@pytest.mark.parametrize(("pieces", "headers"), [([b"x" * 6] * 2, {}), ([], {"content_length": "11"})])
def test_one_that_is_too_large_is_refused_announced_or_not(pieces: list[bytes], headers: dict[str, str]) -> None:
    with pytest.raises(RequestTooLargeError, match="10 bytes"):
        _read(BodyBudget(100).lease(), *pieces, **headers)


def test_what_is_too_much_together_is_refused_and_not_counted() -> None:
    budget = BodyBudget(10)
    _read(budget.lease(), b"x" * 8)
    second = budget.lease()
    with pytest.raises(OverloadedError):
        _read(second, b"xx", b"x")
    second.release()
    assert budget.num_bytes == 8
    assert _read(budget.lease(), b"xx") == b"xx"
