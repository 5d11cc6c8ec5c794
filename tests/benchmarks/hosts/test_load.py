"""What clients record about a server that answers, refuses, breaks off, falls silent or is unreachable."""

import asyncio
import io
import json
from pathlib import Path

import pytest

from benchmarks.hosts import load
from benchmarks.hosts.load import Asked, Load, read_outcomes, request_body
from tests.sockets import SSE_HEAD, chunked, scripted, whole


def _event(text: str) -> bytes:
    return chunked(f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n".encode())


ANSWER = SSE_HEAD + _event("two ") + _event("shapes") + chunked(b"data: [DONE]\n\n") + chunked(b"")
LOST = SSE_HEAD + _event("two ") + chunked(b'data: {"error": {"code": "replica_lost"}}\n\n') + chunked(b"")
NOWHERE = "127.0.0.1:9"


def _outcomes(tmp_path: Path, *addresses: str, number: int = 1) -> list[Asked]:
    """Return the outcomes of one client's first requests."""

    class Enough(io.StringIO):
        def write(self, text: str) -> int:
            written = super().write(text)
            if self.getvalue().count("\n") >= number:
                raise asyncio.CancelledError
            return written

    out = Enough()

    async def ask() -> None:
        async with load.httpx.AsyncClient(timeout=load.httpx.Timeout(0.3), trust_env=False) as http:
            await Load(addresses, 16, out)._ask_on(http, 0)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(ask())
    (tmp_path / "out").write_text(out.getvalue() + '{"half of a li')
    return read_outcomes(tmp_path / "out")


def test_a_complete_answer_is_not_an_error(tmp_path: Path) -> None:
    with scripted(ANSWER) as server:
        [asked] = _outcomes(tmp_path, server.url.removeprefix("http://"))
    assert (asked.error, asked.text, asked.client) == ("", "two shapes", 0)
    assert 0 < asked.first_s <= asked.ended - asked.began
    assert asked.gap_s > 0
    body = json.loads(server.requests[0][1])
    assert body == json.loads(json.dumps(request_body(0, asked.question, 16)))
    assert request_body(1, asked.question, 16) != body


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (whole("429 Too Many Requests", b'{"error": {"code": "overloaded"}}'), "status 429"),
        (whole("500 Internal Server Error", b"<html>"), "status 500 of HAProxy"),
        (LOST, "stream: replica_lost"),
        (SSE_HEAD + _event("two"), "connection lost"),
        (SSE_HEAD + _event("two") + chunked(b""), "cut short"),
        (lambda connection: connection.recv(1), "silence"),
    ],
)
def test_each_kind_of_failure_is_recorded(tmp_path: Path, response: bytes, error: str) -> None:
    with scripted(response) as server:
        [asked] = _outcomes(tmp_path, server.url.removeprefix("http://"))
    assert asked.error == error


def test_an_unreachable_address_is_skipped_from_then_on(tmp_path: Path) -> None:
    with scripted(ANSWER) as server:
        here = server.url.removeprefix("http://")
        outcomes = _outcomes(tmp_path, NOWHERE, here, number=4)
    assert [(asked.error, asked.address) for asked in outcomes] == [("", here)] * 4
    [asked] = _outcomes(tmp_path, NOWHERE)
    assert asked.error == "no connection"


def test_gaps_are_measured_between_chunks_and_up_to_the_end() -> None:
    now = [10.0]
    asked = Asked(0, "?", began=10.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load.time, "monotonic", lambda: now[0])
        for moment, text in ((13.0, "a"), (14.0, "b"), (16.0, "c")):
            now[0] = moment
            asked.hear(text)
        now[0] = 17.0
        asked.end("")
    assert (asked.first_s, asked.gap_s, asked.gap_ended, asked.ended, asked.text) == (3.0, 2.0, 16.0, 17.0, "abc")
