"""Evaluation of samples and answers: the split of a cold start, and when scaling counts as not having followed the
load."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from benchmarks.peers.load import Answer
from benchmarks.scaling.__main__ import Outcome, check, summarize
from benchmarks.scaling.cold_start import split, started_after
from benchmarks.scaling.picture import draw
from benchmarks.scaling.watch import Sample


def _sample(when: float, *, running: int = 0, starting: int = 0, nodes: int = 1, clients: int = 0) -> Sample:
    return Sample(when, clients, nodes, {"Generator": running}, {"Generator": starting})


SAMPLES = [
    _sample(100.0),
    _sample(100.5, starting=1),
    _sample(103.5, starting=1, nodes=2),
    _sample(109.0, running=1, nodes=2),
]
PHASES = {"imports": 2.0, "weights": 1.0, "engine": 0.5}


def test_a_cold_start_is_split_into_steps_that_sum_to_the_total() -> None:
    steps = split(SAMPLES, 100.0, 110.0, 108.5, PHASES, needs_node=True)
    expected = {"decision": 0.5, "node": 3.0, "process": 1.5, **PHASES, "known to the gateway": 0.5, "answer": 1.0}
    assert steps == {**expected, "in all": 10.0}
    assert sum(expected.values()) == 10.0
    there = split(SAMPLES, 100.0, 110.0, 108.5, PHASES, needs_node=False)
    assert (there["node"], there["process"]) == (0, 4.5)


def test_an_answer_before_the_replica_is_seen_gives_no_negative_step() -> None:
    steps = split(SAMPLES, 100.0, 108.6, 108.5, PHASES, needs_node=True)
    assert (steps["known to the gateway"], steps["answer"]) == (0.1, 0)


def test_the_phases_are_those_of_the_newest_replica(tmp_path: Path) -> None:
    line = "INFO {} llava_Generator abc -- started: imports 2.00 s, weights {} s, engine 0.50 s\n"
    times = ("2026-01-02 03:04:05,250", "2026-01-02 03:05:05,500")
    for index, when in enumerate(times):
        log = tmp_path / f"replica_llava_Generator_{index}.log"
        log.write_text("INFO nothing\n" + line.format(when, f"{index + 1}.00"))
    when, phases = started_after(0.0, tmp_path)
    assert when == datetime(2026, 1, 2, 3, 5, 5, 500_000).timestamp()
    assert phases == {"imports": 2.0, "weights": 2.0, "engine": 0.5}
    with pytest.raises(AssertionError, match="no replica has started since"):
        started_after(when, tmp_path)


FOLLOWED = Outcome(
    # The first sample was taken after the first request.
    [_sample(1.2, running=1, nodes=2, clients=1), _sample(10, running=2, nodes=3, clients=3), _sample(20)],
    [Answer(1.0, (1.5, 2.0)), Answer(11.0, (13.0,)), Answer(12.0, (12.5,))],
    0.0,
)


def test_times_to_the_first_token_are_grouped_by_number_of_clients() -> None:
    figures = summarize(FOLLOWED)
    assert (figures["requests"], figures["failed"]) == (3, 0)
    assert figures["first_token_ms_by_clients"] == {
        1: {"requests": 1, "p50": 500.0, "p99": 500.0},
        3: {"requests": 2, "p50": 500.0, "p99": 2000.0},
    }
    assert (figures["most_replicas"], figures["most_nodes"]) == ({"Generator": 2}, 3)
    check(FOLLOWED)


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (replace(FOLLOWED, answers=[*FOLLOWED.answers, Answer(3.0, error="status 503")]), "1 of 4 requests failed"),
        (replace(FOLLOWED, samples=[FOLLOWED.samples[0], FOLLOWED.samples[2]]), "did not follow: at most 1 and 2"),
        (replace(FOLLOWED, samples=FOLLOWED.samples[:2]), "did not follow"),
    ],
)
def test_failed_requests_and_missing_scaling_fail_the_benchmark(outcome: Outcome, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        check(outcome)


def test_equal_figures_give_equal_pictures(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(tmp_path / name, FOLLOWED.samples, [(1.0, 0.5), (11.0, 2.0)])
    picture = (tmp_path / "a.svg").read_text()
    assert picture == (tmp_path / "b.svg").read_text()
    assert all(text in picture for text in ("clients", "generator", "nodes", "first token after, s"))
