"""A burst is judged by each client's response and when it arrived."""

import json

import pytest

from benchmarks.exchange import Piece
from benchmarks.service.burst import Reply, judge_burst, read_reply
from benchmarks.service.mix import Ask, Outcome

ASK = Ask("burst", b"")


def taken(text: str, done: float) -> Reply:
    return Reply(Outcome(ASK, "", (text,), 0.1, done), 200, None, done)


def refused_with(status: int, done: float, retry_after: str | None = "1") -> Reply:
    return Reply(Outcome(ASK, f"status {status} instead of 200"), status, retry_after, done)


GOOD = [taken("a", 3.0), taken("b", 4.0), refused_with(429, 1.0), refused_with(503, 2.0)]


def not_kept(replies: list[Reply], alone: tuple[str, ...] = ("a", "b")) -> list[str]:
    done = [reply.outcome for reply in replies if reply.status == 200 and not reply.outcome.error]
    pairs = [(one, Outcome(ASK, "", (text,))) for one, text in zip(done, alone, strict=False)]
    return [bar.what for bar in judge_burst(replies, pairs)[0] if not bar.is_kept]


def test_a_good_burst_keeps_every_bar() -> None:
    assert not_kept(GOOD) == []
    figures = judge_burst(GOOD, [])[1]
    assert figures["statuses"] == {"200": 2, "429": 1, "503": 1}
    assert (figures["last_refused_s"], figures["first_done_s"], figures["last_done_s"]) == (2.0, 3.0, 4.0)
    json.dumps(figures)


@pytest.mark.parametrize(
    ("replies", "what"),
    [
        ([*GOOD, refused_with(0, 0.0)], "requests without an answer, or with an error that is no refusal"),
        ([*GOOD, refused_with(500, 1.0)], "requests without an answer, or with an error that is no refusal"),
        ([*GOOD, refused_with(429, 1.0, None)], "refused without Retry-After"),
        ([*GOOD, refused_with(429, 3.1)], "last refusal after the first accepted one was done"),
        ([*GOOD[:2], taken("c", 3.0), taken("c", 3.0)], "refused"),
        (GOOD[2:], "accepted"),
    ],
)
def test_every_fault_fails_a_bar(replies: list[Reply], what: str) -> None:
    assert what in not_kept(replies)


def test_wrong_answers_are_detected() -> None:
    assert not_kept(GOOD, ("a", "c")) == ["accepted ones answered otherwise than alone"]


def test_a_reply_ends_with_its_last_byte() -> None:
    pieces: list[Piece] = [(2.0, b"HTTP/1.1 429 X\r\nRetry-After: 7\r\n\r\n"), (2.5, b"{}")]
    reply = read_reply(ASK, 1.0, pieces)
    assert (reply.status, reply.retry_after, reply.done_s, reply.is_refused) == (429, "7", 1.5, True)
    assert read_reply(ASK, 1.0, []).status == 0
