"""How answers under kills are judged, without killing anything."""

import json

import pytest

from benchmarks.service import chaos
from benchmarks.service.chaos import Answer, Outcome, Seen, figures, judge, read_answer, table


def _event(content: str, *, tokens: tuple[str, ...] = (), reason: str | None = None) -> bytes:
    logprobs = {"content": [{"token": token} for token in tokens]} if tokens else None
    choice = {"delta": {"content": content}, "logprobs": logprobs, "finish_reason": reason}
    return json.dumps({"usage": None, "choices": [choice]}).encode()


USAGE = json.dumps({"usage": {"completion_tokens": 3}, "choices": []}).encode()
EVENTS = [_event("a ", tokens=("a", " ")), _event("b", tokens=("b",), reason="length"), USAGE]


def test_an_answer_collects_what_the_client_got_and_is_done_at_its_end() -> None:
    whole = read_answer([*EVENTS, b"[DONE]"])
    assert whole == Answer("a b", ("a", " ", "b"), "length", 3, done=True)
    assert not read_answer(EVENTS).done
    assert not read_answer([]).done
    error = json.dumps({"error": {"code": "replica_lost"}}).encode()
    assert read_answer([EVENTS[0], error]) == Answer("a ", ("a", " "))


GOOD = [Outcome("generator", gap_s=0.2), Outcome("gateway", "broken"), Outcome("HAProxy", again=3)]


@pytest.mark.parametrize(
    ("outcomes", "what"),
    [
        (GOOD, []),
        ([], ["answers"]),
        ([*GOOD, Outcome("generator", "broken")], ["requests failed"]),
        ([*GOOD, Outcome("gateway", "wrong")], ["answers wrong"]),
        ([*GOOD, Outcome("controller", again=1)], ["requests asked again though no entrance was killed"]),
    ],
)
def test_only_connections_through_the_killed_process_may_break(outcomes: list[Outcome], what: list[str]) -> None:
    assert [bar.what for bar in judge(Seen(outcomes)) if not bar.is_kept] == what


def test_figures_are_grouped_by_what_was_killed() -> None:
    seen = Seen(GOOD, recovery_s={"generator": [8.04, 9.0]}, memory_mib=[10.0, 11.0])
    seen.kills.update(["generator", "generator"])
    kinds = figures(seen)["kinds"]
    assert list(kinds) == [*chaos.KINDS]
    assert kinds["generator"] == {
        "kills": 2,
        "answers": 1,
        "broken_off": 0,
        "asked_again": 0,
        "longest_gap_s": 0.2,
        "recovery_s": [8.0, 9.0],
    }
    assert "| generator | 2 | 1 | 0 | 0 | 0.2 | 9.0 |" in table(kinds)
