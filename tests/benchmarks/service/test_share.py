"""The arithmetic over three contenders, and the engine queried by itself."""

from pathlib import Path

import pytest

from benchmarks.peers.load import Answer, make_requests
from benchmarks.service.alone import EngineAlone
from benchmarks.service.share import EMPTY, ENGINE, SERVICE, Round, judge_rounds, vary


def one_round(first_ms: list[float], wall: float, tokens: int = 50) -> Round:
    answers = [Answer(10.0, (10.0 + ms / 1e3, 11.0), 2, 30, tokens) for ms in first_ms]
    return answers, wall


def rounds(service_ms: float = 180, wall: float = 10.0) -> dict[str, list[Round]]:
    return {
        SERVICE: [one_round([service_ms] * 99 + [400], wall)] * 3,
        ENGINE: [one_round([100] * 100, 9.5)] * 2 + [one_round([100] * 100, 5.0)],
        EMPTY: [one_round([60] * 98 + [160, 160], 1.0)] * 3,
    }


def bars(measured: dict[str, list[Round]]) -> dict[str, tuple[float, bool]]:
    return {bar.what: (bar.measured, bar.is_kept) for bar in judge_rounds(measured)[0]}


def test_shares_are_computed_per_round_and_quantiles_over_all() -> None:
    found = bars(rounds())
    assert found["requests that failed"] == (0, True)
    assert found["tokens per second over the engine's alone"] == (pytest.approx(0.95), True)
    assert found["added to the first token over the empty graph, median"] == (pytest.approx(80 / 60), True)
    assert found["added to the first token over the empty graph, 99 %"] == (pytest.approx(80 / 160), True)


def test_a_slow_service_keeps_no_bar() -> None:
    slow = rounds(service_ms=600, wall=20)
    failed = [Answer(10.0, error="no")]
    slow[SERVICE][0] = ([*slow[SERVICE][0][0], *failed], 20.0)
    assert not any(kept for _, kept in bars(slow).values())


def test_only_the_lengths_of_answers_are_varied() -> None:
    bodies = make_requests("a", 40, 2)
    varied = vary(bodies)
    lengths = [body["max_tokens"] for body in varied]
    assert len(set(map(str, lengths))) == 40
    assert all(isinstance(length, int) and 32 <= length <= 96 for length in lengths)
    assert [{**body, "max_tokens": 0} for body in varied] == [{**body, "max_tokens": 0} for body in bodies]


def test_the_engine_alone_answers_every_request_in_full(tiny_checkpoint: Path) -> None:
    engine = EngineAlone(tiny_checkpoint)
    try:
        bodies = [
            {**body, "max_tokens": 3 + index, "ignore_eos": True} for index, body in enumerate(make_requests("a", 5, 2))
        ]
        answers, wall = engine.ask(bodies, 2)
        again, _ = engine.ask(bodies, 2)
    finally:
        engine.close()
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in again] == [3, 4, 5, 6, 7]
    assert all(answer.prompt_tokens > 0 and not answer.error for answer in answers)
    assert 0 < max(answer.texts[0] - answer.began for answer in answers if answer.texts) < wall
