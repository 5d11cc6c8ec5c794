"""Evaluation of the clients' records: complaints, recovery and wrong answers."""

from dataclasses import replace

import pytest

from benchmarks.hosts.faults import FAULTS, complaints, see
from benchmarks.hosts.load import Asked

STRUCK = 100.0


def asked(began: float, ended: float, **more: object) -> Asked:
    return replace(Asked(0, "?", began, ended=ended, text="right", first_s=0.1, gap_s=0.2, gap_ended=ended), **more)


def test_without_complaints_recovery_is_immediate() -> None:
    seen = see([asked(90, 95), asked(99, 103), asked(104, 105, error="unfinished", text="ri")], STRUCK)
    assert (seen.requests, seen.failed, seen.wrong, seen.recovered_s) == (2, {}, 0, 0.0)


def test_failures_before_the_fault_do_not_count() -> None:
    assert see([asked(90, 95, error="silence", gap_s=9.0), asked(99, 101)], STRUCK).failed == {}


@pytest.mark.parametrize(
    ("outcome", "when"),
    [
        (asked(99, 103, error="silence"), 103),
        (asked(99, 120, gap_s=7.0, gap_ended=108.0), 108),
        (asked(101, 120, first_s=10.0), 111),
    ],
)
def test_recovery_is_after_the_last_complaint(outcome: Asked, when: float) -> None:
    outcomes = [asked(99, 102), outcome, asked(120, 121)]
    assert complaints(outcomes, STRUCK) == [when]
    assert see(outcomes, STRUCK).recovered_s == when - STRUCK


def test_failures_are_counted_by_kind_and_the_longest_times_kept() -> None:
    errors = ("silence", "status 503", "silence")
    outcomes = [asked(99, 103, error=error, gap_s=35.0, first_s=35.0) for error in errors]
    seen = see([*outcomes, asked(99, 130, gap_s=6.0), asked(99, 130, first_s=8.0)], STRUCK)
    assert seen.failed == {"silence": 2, "status 503": 1}
    assert (seen.longest_gap_s, seen.longest_wait_s) == (6.0, 8.0)


@pytest.mark.parametrize(
    ("outcome", "is_wrong"),
    [
        (asked(99, 103, text="wrong"), True),
        (asked(99, 103, text="righ"), True),
        (asked(99, 103, text="righ", error="silence"), False),
        (asked(99, 103, text="riht", error="silence"), True),
        (asked(99, 103, text="other", client=1), False),
    ],
)
def test_answers_are_compared_with_the_most_frequent_one(outcome: Asked, *, is_wrong: bool) -> None:
    assert see([asked(90, 95), asked(95, 96), outcome], STRUCK).wrong == is_wrong


def test_each_fault_is_known_by_its_name() -> None:
    assert all(name == fault.name for name, fault in FAULTS.items())
    assert {fault.of for fault in FAULTS.values()} <= {"Gateway", "Generator"}
