"""Reading a stream that may be too long."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from deployments.outgoing.bounded import read_up_to


@pytest.mark.parametrize(
    ("max_bytes", "expected", "num_read"), [(4, b"abcd", 3), (3, None, 3), (2, None, 2), (0, None, 1)]
)
def test_reading_stops_once_the_limit_is_exceeded(max_bytes: int, expected: bytes | None, num_read: int) -> None:
    read: list[bytes] = []

    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b"ab", b"c", b"d"):
            read.append(piece)
            yield piece

    assert asyncio.run(read_up_to(pieces(), max_bytes)) == expected
    assert len(read) == num_read


def test_an_empty_stream_yields_no_bytes() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in ():
            yield piece

    assert asyncio.run(read_up_to(pieces(), 0)) == b""
