"""HTTP requests, each on its own connection, with the arrival times of the response's bytes.

Clients share the machine's cores with the server, so under load they only record bytes; HTTP and events are parsed
afterwards. Knows nothing of the requests' content.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from llava_core.client.requests import CHAT

_TIMEOUT_S = 1800.0
_LENGTH = re.compile(rb"(?is)HTTP/[^\r]*\r\n(?:[^\r]+\r\n)*?content-length: *(\d+)\r\n(?:[^\r]+\r\n)*\r\n")
# When bytes arrived, and the bytes.
Piece = tuple[float, bytes]


@dataclass(frozen=True)
class Response:
    """A response: `status` is 0 where there was none. The body is in the pieces in which it arrived."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: Sequence[Piece] = ()

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.pieces)

    def events(self) -> Iterator[Piece]:
        """Yield the content of each whole server-sent event, and when its end arrived."""
        for when, line in _lines(self.pieces):
            if line.startswith(b"data:"):
                yield when, line.removeprefix(b"data:").strip()


def post(port: int, content: bytes, *, path: str = CHAT, length: int | None = None) -> bytes:
    """Build the bytes of a request. `length` may claim more than the content has."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content) if length is None else length}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + content


def post_json(port: int, body: Mapping[str, object], *, path: str = CHAT) -> bytes:
    return post(port, json.dumps(body).encode(), path=path)


async def exchange(port: int, message: bytes, *, most_pieces: int | None = None) -> list[Piece]:
    """Send a request and return the pieces of the whole response. Hangs up after `most_pieces`, or when cancelled."""
    loop = asyncio.get_running_loop()
    transport, connection = await loop.create_connection(lambda: _Connection(message, most_pieces), "127.0.0.1", port)
    try:
        await asyncio.wait_for(connection.closed, _TIMEOUT_S)
    finally:
        # Close at once, whatever has not been sent or read.
        transport.abort()
    return connection.pieces


class _Connection(asyncio.Protocol):
    """One request. Its response ends at its stated length, or when the server closes, as the request asks it to."""

    def __init__(self, message: bytes, most_pieces: int | None) -> None:
        self._message = message
        self._most = most_pieces
        self.pieces: list[Piece] = []
        # Bytes still to come, None before the first piece, infinite if unknown.
        self._missing: float | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        if self.closed.done():
            # More may arrive before `exchange` hangs up.
            return
        self.pieces.append((time.perf_counter(), data))
        if self._missing is None:
            self._missing = _announced(data) - len(data)
        else:
            self._missing -= len(data)
        if len(self.pieces) == self._most or self._missing <= 0:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


def _announced(first: bytes) -> float:
    """Return the length of the whole response if its first bytes state it, since a server that refuses an unsent body
    may not close the connection; infinity otherwise."""
    found = _LENGTH.match(first)
    return math.inf if found is None else found.end() + int(found[1])


def read_response(pieces: Sequence[Piece]) -> Response:
    """Parse the bytes of a response, as far as they arrived."""
    whole = b"".join(data for _, data in pieces)
    head, _, rest = whole.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    words = first.split(None, 2)
    if len(words) < 2:
        return Response(0)
    pairs = (line.decode("latin-1").partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    start = len(whole) - len(rest)
    is_chunked = headers.get("transfer-encoding", "").lower() == "chunked"
    spans = _chunks(whole, start) if is_chunked else [(start, len(whole))]
    return Response(int(words[1]), headers, [piece for span in spans for piece in _between(pieces, *span)])


def _chunks(whole: bytes, position: int) -> Iterator[tuple[int, int]]:
    """Yield the span of each HTTP chunk's data. A truncated response ends where its bytes end."""
    while (line_end := whole.find(b"\r\n", position)) > 0:
        size = int(whole[position:line_end].partition(b";")[0], 16)
        if not size:
            return
        yield line_end + 2, min(line_end + 2 + size, len(whole))
        position = line_end + 2 + size + 2


def _between(pieces: Sequence[Piece], start: int, end: int) -> Iterator[Piece]:
    offset = 0
    for when, data in pieces:
        part = data[max(start - offset, 0) : max(end - offset, 0)]
        if part:
            yield when, part
        offset += len(data)


def _lines(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Yield each whole line, and when its end arrived."""
    held = b""
    for when, data in pieces:
        *lines, held = (held + data).split(b"\n")
        yield from ((when, line) for line in lines)
