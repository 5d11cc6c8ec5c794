"""Turns, medians and ratios of the comparison, and which servers may not be compared."""

import sys
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.peers.compare import COMPARED, WORKS, Amounts, check_alike, median, ratios, rotated, summary
from benchmarks.peers.contenders import OURS, Contender, Server
from benchmarks.peers.load import NUM_TOKENS, Answer


def figures(value: float) -> dict[str, float]:
    return dict.fromkeys(COMPARED, value)


def server(name: str, *, one_at_a_time: bool = False) -> Server:
    contender = Contender(name, Path(sys.executable), (), "1", one_at_a_time=one_at_a_time)
    return Server(contender, cast(Any, None), 1, "model")


def test_ratios_are_computed_per_round_before_the_median() -> None:
    ours, theirs = [figures(value) for value in (1, 4, 30)], [figures(value) for value in (2, 4, 10)]
    found = ratios(ours, theirs)["tokens_per_s"]
    assert found == {"median": 1.0, "lowest": 0.5, "highest": 3.0}
    # The ratio of the medians would be 8.
    ours, theirs = [figures(value) for value in (1, 8, 9)], [figures(value) for value in (1, 1, 9)]
    assert ratios(ours, theirs)["tokens_per_s"]["median"] == 1


def test_a_figure_that_one_server_lacks_has_no_ratio() -> None:
    assert ratios([figures(1)], [{**figures(1), "gap_ms_p99": 0.0}]).keys() == set(COMPARED) - {"gap_ms_p99"}


def test_the_summary_has_medians_and_ratios_to_each_other_server() -> None:
    found = summary({OURS: [figures(1), figures(2), figures(6)], "other": [figures(4)] * 3})
    assert found[OURS] == median([figures(2)])
    assert found["ours_over"].keys() == {"other"}
    assert found["ours_over"]["other"]["first_ms_p50"]["median"] == 0.5


def test_every_server_goes_first_in_turn() -> None:
    servers = [server(name) for name in "abc"]
    orders = ["".join(each.contender.name for each in rotated(servers, turn)) for turn in range(4)]
    assert orders == ["abc", "bca", "cab", "abc"]


def test_a_server_without_batching_gets_fewer_concurrent_requests() -> None:
    amounts, (alone, many, _) = Amounts(1, (10, 20, 30), one_at_a_time=4), WORKS["tiny"]
    slow, fast = server("slow", one_at_a_time=True), server("fast")
    assert [amounts.of(slow, alone, 10), amounts.of(slow, many, 20)] == [10, 4]
    assert [amounts.of(fast, alone, 10), amounts.of(fast, many, 20)] == [10, 20]


def answer(*, prompt_tokens: int = 50, tokens: int = NUM_TOKENS, error: str = "") -> Answer:
    return Answer(0.0, (1.0,), 1, prompt_tokens, tokens, error)


def test_prompts_of_nearly_the_same_length_are_alike() -> None:
    check_alike({"a": [answer(), answer(prompt_tokens=70)], "b": [answer(prompt_tokens=51), answer(prompt_tokens=70)]})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (answer(prompt_tokens=53), r"\{'a': 50, 'b': 53\} prompt tokens"),
        (answer(tokens=3), "b wrote 3 tokens instead of 64"),
        (answer(error="status 500"), "status 500"),
    ],
)
def test_servers_that_read_or_write_differently_are_not_compared(other: Answer, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        check_alike({"a": [answer()], "b": [other]})
