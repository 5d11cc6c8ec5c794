"""Requests against a minimal server, and responses whose bytes arrive split in every possible way."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.exchange import _Connection, exchange, post, post_json, read_response

PLAIN = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\nRetry-After: 3\r\n\r\nbusy"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"8\r\ndata: 1\n\r\nc\r\n\n: beat\n\ndat\r\n9\r\na: [DONE]\r\n2\r\n\n\n\r\n0\r\n\r\n"
)


def pieces(data: bytes, size: int) -> list[tuple[float, bytes]]:
    return [(float(start), data[start : start + size]) for start in range(0, len(data), size)]


@contextlib.contextmanager
def listening(answer: Any) -> Iterator[tuple[int, list[bytes], asyncio.Runner]]:
    """Yield a port whose connections a coroutine serves, the request heads received there, and the loop's runner."""
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        heard.append(head)
        try:
            await answer(reader, writer)
        finally:
            writer.close()

    with asyncio.Runner() as runner:
        server = runner.run(asyncio.start_server(serve, "127.0.0.1", 0))
        yield server.sockets[0].getsockname()[1], heard, runner
        server.close()
        runner.run(server.wait_closed())


@pytest.mark.parametrize("size", [1, 3, 20, 1000])
def test_responses_are_read_however_their_bytes_are_split(size: int) -> None:
    plain = read_response(pieces(PLAIN, size))
    assert (plain.status, plain.body, plain.headers["retry-after"]) == (429, b"busy", "3")
    streamed = read_response(pieces(CHUNKED, size))
    assert streamed.status == 200
    assert [content for _, content in streamed.events()] == [b"1", b"[DONE]"]


@pytest.mark.parametrize("length", [0, 5, 30])
def test_no_response_has_the_status_0(length: int) -> None:
    assert read_response(pieces(CHUNKED[:length], 10)).status == (200 if length > 12 else 0)


def test_a_response_is_complete_at_its_length_even_if_kept_alive() -> None:
    left = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(PLAIN)
        # The client never sends the announced body; it disconnects.
        assert await reader.read() == b"{"
        left.set()

    with listening(answer) as (port, heard, runner):
        got = runner.run(asyncio.wait_for(exchange(port, post(port, b"{", length=1000)), 10))
        runner.run(asyncio.wait_for(left.wait(), 10))
    assert read_response(got).body == b"busy"
    assert b"content-length: 1000\r\n" in heard[0]


def test_data_after_the_maximum_of_pieces_is_ignored() -> None:
    async def receive() -> list[bytes]:
        connection = _Connection(b"", 2)
        # The event loop had no chance to close the connection in between.
        for piece in (CHUNKED[:60], CHUNKED[60:70], CHUNKED[70:]):
            connection.data_received(piece)
        return [data for _, data in connection.pieces]

    assert asyncio.run(receive()) == [CHUNKED[:60], CHUNKED[60:70]]


def test_the_client_hangs_up_after_the_maximum_of_pieces() -> None:
    hung_up = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED[:60])
        with contextlib.suppress(ConnectionResetError):
            await reader.read()
        hung_up.set()

    with listening(answer) as (port, _, runner):
        got = runner.run(asyncio.wait_for(exchange(port, post(port, b""), most_pieces=1), 10))
        runner.run(asyncio.wait_for(hung_up.wait(), 10))
    assert len(got) == 1


def test_a_cancelled_client_hangs_up() -> None:
    hung_up = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        hung_up.set()

    async def ask(port: int) -> None:
        asking = asyncio.ensure_future(exchange(port, post(port, b"")))
        await asked.wait()
        asking.cancel()
        await hung_up.wait()

    asked = asyncio.Event()
    with listening(answer) as (port, _, runner):
        runner.run(asyncio.wait_for(ask(port), 10))


def test_bodies_are_sent_as_json_to_the_given_route() -> None:
    head, _, content = post_json(80, {"é": [1]}, path="/tokenize").partition(b"\r\n\r\n")
    assert head.startswith(b"POST /tokenize HTTP/1.1\r\n")
    assert json.loads(content) == {"é": [1]}
    assert f"content-length: {len(content)}".encode() in head
