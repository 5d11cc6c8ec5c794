"""The client against a scripted server, and the arithmetic over the client's measurements."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks.peers.load import Answer, make_requests, percentile, read_answer, run_load, summarize

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
USAGE = {"prompt_tokens": 30, "completion_tokens": 3}


def event(content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def delta(text: str) -> bytes:
    return event({"choices": [{"delta": {"content": text}}]})


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


EVENTS = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}) + delta("a") + delta("b") + delta("c")
EVENTS += event({"choices": [], "usage": USAGE}) + b"data: [DONE]\n\n"


@contextmanager
def server(*pieces: bytes, pause_s: float = 0.0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the port of a server that answers each request with these pieces, and what it has seen."""
    seen: dict[str, Any] = {"bodies": [], "open": 0, "most": 0}
    loop = asyncio.new_event_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen["open"] += 1
        seen["most"] = max(seen["most"], seen["open"])
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        seen["bodies"].append(json.loads(await reader.readexactly(length)))
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
        seen["open"] -= 1
        writer.close()

    listening = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield listening.sockets[0].getsockname()[1], seen
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        listening.close()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()


def test_every_body_is_sent_once_by_the_given_number_of_clients() -> None:
    bodies = make_requests("seed", 6, 2)
    with server(HEAD + b"\r\n", EVENTS, pause_s=0.02) as (port, seen):
        answers, wall = run_load(port, bodies, 3)
    assert seen["most"] == 3
    key = json.dumps
    assert sorted(map(key, seen["bodies"])) == sorted(map(key, bodies))
    assert [answer.error for answer in answers] == [""] * 6
    assert wall > 2 * 0.04


def test_text_is_timed_on_arrival_and_coalesced_events_once() -> None:
    first, rest = EVENTS.split(delta("b"))
    with server(HEAD + b"\r\n", first, delta("b") + rest, pause_s=0.05) as (port, _):
        (answer,), wall = run_load(port, make_requests("seed", 1, 1), 1)
    assert (answer.chunks, len(answer.texts)) == (3, 2)
    assert (answer.tokens, answer.prompt_tokens) == (3, 30)
    assert 0.03 < answer.texts[1] - answer.texts[0] < wall


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_events_may_be_split_across_http_chunks_and_pieces(size: int) -> None:
    chunked = b"".join(chunk(EVENTS[i : i + 33]) for i in range(0, len(EVENTS), 33)) + b"0\r\n\r\n"
    whole = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked
    pieces = [(float(i), whole[i : i + size]) for i in range(0, len(whole), size)]
    answer = read_answer(0.0, pieces)
    assert answer.error == ""
    assert answer.chunks == 3
    assert list(answer.texts) == sorted(set(answer.texts))
    # The arrival time of the event's last byte.
    plain = read_answer(
        0.0, [(float(i), (HEAD + b"\r\n" + EVENTS)[i : i + 1]) for i in range(len(HEAD) + 2 + len(EVENTS))]
    )
    assert plain.texts[0] == len(HEAD) + 2 + EVENTS.index(b'"a"') + len(b'"a"}}]}\n') - 1


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (b"HTTP/1.1 429 Too Many\r\n\r\nbusy", "status 429: busy"),
        (HEAD + b"\r\n" + delta("a") + event({"error": {"message": "broken"}}), "broken"),
        (HEAD + b"\r\n" + delta("a"), "without its usage"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk(delta("a"))[:-9], "the stream ended"),
        (b"", "status 0"),
    ],
)
def test_an_incomplete_answer_is_an_error(response: bytes, message: str) -> None:
    with server(response) as (port, _):
        (answer,), _ = run_load(port, make_requests("seed", 1, 1), 1)
    assert message in answer.error


def test_requests_differ_and_pictures_repeat_in_turn() -> None:
    def parts(body: dict[str, Any]) -> tuple[str, str]:
        picture, text = body["messages"][0]["content"]
        return picture["image_url"]["url"], text["text"]

    pictures, questions = zip(*map(parts, make_requests("a", 5, 2)), strict=True)
    assert len(set(questions)) == 5
    assert len(set(pictures)) == 2
    assert pictures[0] == pictures[2] == pictures[4]
    assert not set(pictures) & {parts(body)[0] for body in make_requests("b", 5, 2)}


def test_percentiles_are_values_that_were_measured() -> None:
    seconds = [value / 1000 for value in range(100, 0, -1)]
    assert percentile(seconds, 0.5) == 50
    assert percentile(seconds, 0.99) == 99
    assert percentile([0.003], 0.99) == percentile([0.003], 0.5) == 3
    assert percentile([], 0.5) == 0


def test_a_load_is_summarised_without_its_failures() -> None:
    good = [Answer(1.0, (1.1, 1.2, 1.4), 4, 30, 4), Answer(1.0, (1.3, 1.5, 1.7), 4, 30, 4)]
    figures = summarize([*good, Answer(1.0, error="no")], wall=2.0)
    assert (figures["requests"], figures["errors"]) == (3, 1)
    assert (figures["first_ms_p50"], figures["first_ms_p99"]) == (100, 300)
    assert (figures["gap_ms_p50"], figures["gap_ms_p99"]) == (200, 200)
    assert figures["token_ms_p50"] == 100
    assert figures["tokens_per_s"] == 4
    assert (figures["chunks_per_request"], figures["arrivals_per_request"]) == (4, 3)
    with pytest.raises(SystemExit, match="no request was answered: no"):
        summarize([Answer(1.0, error="no")], wall=2.0)
