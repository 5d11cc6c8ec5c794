"""Bodies: bounded each, together and in time; test_gateway.py sends them over HTTP."""

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from deployments.errors import RequestTimeoutError, RequestTooLargeError, UnsupportedEncodingError
from deployments.http.bodies import BodyBudget, Lease, read_body
from llava_core.errors import OverloadedError


def _request(*pieces: bytes, is_whole: bool = True, **headers: str) -> Request:
    """Make a request that sends its end after its pieces, or nothing more if not `is_whole`."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    if is_whole:
        messages.append({"type": "http.request", "body": b"", "more_body": False})
    incoming = iter(messages)

    async def receive() -> Any:
        message = next(incoming, None)
        return message if message is not None else await asyncio.Event().wait()

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


def _read(lease: Lease, *pieces: bytes, **headers: str) -> bytes:
    return asyncio.run(read_body(_request(*pieces, **headers), lease, max_bytes=10, max_seconds=60))


def test_a_body_is_joined_and_held_until_it_is_released() -> None:
    budget = BodyBudget(10)
    lease = budget.lease()
    assert _read(lease, b"ab", b"cd") == b"abcd"
    assert budget.num_bytes == 4
    lease.release()
    lease.release()
    assert budget.num_bytes == 0


@pytest.mark.parametrize(("pieces", "headers"), [([b"x" * 6] * 2, {}), ([], {"content_length": "11"})])
def test_a_body_that_is_too_large_is_refused_announced_or_not(pieces: list[bytes], headers: dict[str, str]) -> None:
    with pytest.raises(RequestTooLargeError, match="10 bytes"):
        _read(BodyBudget(100).lease(), *pieces, **headers)


@pytest.mark.parametrize("encoding", ["gzip", "Identity, br", "identity, identity, zstd", "unknown"])
def test_an_encoded_body_is_refused_unread(encoding: str) -> None:
    budget = BodyBudget(10)
    with pytest.raises(UnsupportedEncodingError, match="Content-Encoding"):
        _read(budget.lease(), b"ab", content_encoding=encoding)
    assert budget.num_bytes == 0


@pytest.mark.parametrize("encoding", ["", "identity", "Identity , identity"])
def test_an_encoding_that_changes_nothing_is_accepted(encoding: str) -> None:
    assert _read(BodyBudget(10).lease(), b"ab", content_encoding=encoding) == b"ab"


def test_a_body_that_exceeds_the_budget_is_refused_and_not_counted() -> None:
    budget = BodyBudget(10)
    _read(budget.lease(), b"x" * 8)
    second = budget.lease()
    with pytest.raises(OverloadedError):
        _read(second, b"xx", b"x")
    second.release()
    assert budget.num_bytes == 8
    assert _read(budget.lease(), b"xx") == b"xx"


@pytest.mark.parametrize("pieces", [[], [b"ab", b"c"]])
def test_a_body_that_times_out_is_refused_and_returns_its_bytes(pieces: list[bytes]) -> None:
    budget = BodyBudget(10)
    lease = budget.lease()
    request = _request(*pieces, is_whole=False)
    with pytest.raises(RequestTimeoutError, match=rf"^after 0\.01 seconds, .* {len(b''.join(pieces))} bytes of the"):
        asyncio.run(read_body(request, lease, max_bytes=10, max_seconds=0.01))
    lease.release()
    assert budget.num_bytes == 0


def test_the_time_limit_covers_the_whole_body_not_each_piece() -> None:
    """A piece arrives every 25 seconds by the test's clock, so no wait between two reaches the limit."""

    async def trickle() -> None:
        loop = asyncio.get_running_loop()
        real, passed = loop.time, 0.0
        loop.time = lambda: real() + passed  # type: ignore[method-assign]

        async def receive() -> Any:
            nonlocal passed
            passed += 25
            # Let the timers that are due run.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return {"type": "http.request", "body": b"x", "more_body": True}

        request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)
        await read_body(request, BodyBudget(100).lease(), max_bytes=100, max_seconds=60)

    with pytest.raises(RequestTimeoutError, match=r"after 60 seconds, .* 2 bytes of the body"):
        asyncio.run(trickle())
