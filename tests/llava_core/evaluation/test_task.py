"""Scoring by hand: what counts as the same answer, and how shares are counted by kind."""

import pytest

from llava_core.evaluation.task import Answer, Sample, normalise, score


def answer(kind: str, expected: str, text: str) -> Answer:
    return Answer(Sample("1", kind, "q", expected, b""), text)


@pytest.mark.parametrize(
    ("expected", "text", "is_right"),
    [
        ("red", "red", True),
        ("red", "Red", True),
        ("red", " red.\n", True),
        ("top left", "top  left", True),
        ("red", "the red one", False),
        ("red", "", False),
        ("3", "3.5", False),
        ("EXIT", "exit", True),
        ("A red star.", "a red star", True),
    ],
)
def test_case_spaces_and_a_final_stop_do_not_matter_and_all_else_does(
    expected: str, text: str, *, is_right: bool
) -> None:
    assert answer("kind", expected, text).is_right == is_right


def test_normalising_twice_changes_nothing() -> None:
    assert normalise(normalise("  The Red\nStar. ")) == "the red star"


def test_shares_are_counted_by_kind_and_over_all() -> None:
    report = score(
        [
            answer("colour", "red", "red"),
            answer("colour", "red", "blue"),
            answer("count", "2", "2"),
            answer("read", "a", "b"),
        ]
    )
    assert report.accuracy == 0.5
    assert (report.accuracy_of("colour"), report.accuracy_of("count"), report.accuracy_of("read")) == (0.5, 1.0, 0.0)


def test_the_table_has_a_row_per_kind_and_one_for_all() -> None:
    table = score([answer("colour", "red", "red"), answer("count", "2", "3")]).table()
    assert table.splitlines() == [
        "| question type | questions | exact match |",
        "| --- | ---: | ---: |",
        "| colour | 1 | 100.0 % |",
        "| count | 1 | 0.0 % |",
        "| all | 2 | 50.0 % |",
    ]


def test_nothing_asked_is_nothing_right() -> None:
    assert score([]).accuracy == 0.0
