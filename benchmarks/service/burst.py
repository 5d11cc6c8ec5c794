"""Many requests at one moment: refusals arrive before the first accepted request is done, and accepted requests are
answered correctly.

Each request has its own connection, a new picture, and greedy decoding; the correct answer is the one that the same
request gets afterwards, with few others in flight. The service has its default settings except for its precision,
float32: in bfloat16 the last bits of a sum depend on how many rows are multiplied at once, and in one of some hundred
answers two tokens are so nearly equally likely that this decides. That would measure rounding, not whether anybody gets
somebody else's answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.exchange import Piece, exchange, post_json, read_response
from benchmarks.service.bars import Bar
from benchmarks.service.mix import QUESTIONS, Ask, Outcome, judge
from benchmarks.service.pictures import PictureMaker
from benchmarks.service.start import serving

_REFUSALS = (429, 503)
_NUM_TOKENS = 64
# Concurrent clients when the requests are repeated afterwards.
_ASKED_AGAIN_BY = 4


@dataclass(frozen=True)
class Reply:
    """One request of the burst: its outcome, and the seconds from the burst's beginning to its last byte."""

    outcome: Outcome
    status: int
    retry_after: str | None
    done_s: float

    @property
    def is_refused(self) -> bool:
        return self.status in _REFUSALS


def run(num_requests: int) -> tuple[list[Bar], dict[str, Any]]:
    """Return the bars, and more figures."""
    pictures, precision = PictureMaker("burst"), {"dtype": "float32"}
    with serving(args={"generator": precision, "vision_encoder": precision}) as service:
        asks = [_ask(service.port, pictures, index) for index in range(num_requests)]
        warm_up = [_ask(service.port, pictures, index) for index in range(_ASKED_AGAIN_BY)]
        asyncio.run(_all(service.port, warm_up, _ASKED_AGAIN_BY))
        replies = asyncio.run(_all(service.port, asks, num_requests))
        taken = [reply.outcome for reply in replies if reply.status == 200 and not reply.outcome.error]
        alone = asyncio.run(_all(service.port, [outcome.ask for outcome in taken], _ASKED_AGAIN_BY))
    return judge_burst(replies, [(one, other.outcome) for one, other in zip(taken, alone, strict=True)])


def _ask(port: int, pictures: PictureMaker, index: int) -> Ask:
    content = [pictures.make().part, {"type": "text", "text": QUESTIONS[index % len(QUESTIONS)]}]
    message = {"role": "user", "content": content}
    body = {"messages": [message], "max_tokens": _NUM_TOKENS, "ignore_eos": True, "temperature": 0, "stream": True}
    return Ask("burst", post_json(port, body))


async def _all(port: int, asks: Sequence[Ask], clients: int) -> list[Reply]:
    heard: dict[int, list[Piece]] = {}
    waiting = iter(enumerate(asks))

    async def client() -> None:
        for index, ask in waiting:
            heard[index] = await _heard(port, ask)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return [read_reply(ask, began, heard[index]) for index, ask in enumerate(asks)]


async def _heard(port: int, ask: Ask) -> list[Piece]:
    """Return the pieces of the response, none where the connection failed: that counts as unanswered."""
    try:
        return await exchange(port, ask.message)
    except OSError:
        return []


def read_reply(ask: Ask, began: float, pieces: Sequence[Piece]) -> Reply:
    response, outcome = read_response(pieces), judge(ask, began, pieces)
    return Reply(outcome, response.status, response.headers.get("retry-after"), outcome.total_s)


def judge_burst(replies: Sequence[Reply], pairs: Sequence[tuple[Outcome, Outcome]]) -> tuple[list[Bar], dict[str, Any]]:
    """Build bars and figures. `pairs` are the answers of the burst and the same requests' answers afterwards."""
    refused = [reply for reply in replies if reply.is_refused]
    done = [reply for reply in replies if reply.status == 200 and not reply.outcome.error]
    wrong = [pair for pair in pairs if pair[1].error or pair[0].texts != pair[1].texts]
    failed = [reply for reply in replies if reply.outcome.error and not reply.is_refused]
    last_refused, first_done = max(r.done_s for r in refused or replies), min(r.done_s for r in done or replies)
    bars = [
        Bar("requests without an answer, or with an error that is no refusal", len(failed), "=", 0),
        Bar("accepted", len(done), "≥", 1),
        Bar("refused", len(refused), "≥", 1),
        Bar("refused without Retry-After", sum(not reply.retry_after for reply in refused), "=", 0),
        Bar("last refusal after the first accepted one was done", last_refused - first_done, "<", 0, "s"),
        Bar("accepted ones answered otherwise than alone", len(wrong), "=", 0),
    ]
    return bars, {
        "statuses": {f"{status}": number for status, number in sorted(Counter(r.status for r in replies).items())},
        "first_refused_s": round(min(reply.done_s for reply in refused or replies), 2),
        "last_refused_s": round(last_refused, 2),
        "first_done_s": round(first_done, 2),
        "last_done_s": round(max(reply.done_s for reply in done or replies), 2),
        "errors": dict(Counter(reply.outcome.error for reply in failed).most_common(10)),
        "wrong": [[one.texts, other.texts, other.error] for one, other in wrong[:5]],
    }
