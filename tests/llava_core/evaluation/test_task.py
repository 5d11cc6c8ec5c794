"""Scoring: which answers count as equal, and accuracy per kind."""

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
def test_only_case_spaces_and_a_final_stop_are_ignored(expected: str, text: str, *, is_right: bool) -> None:
    assert answer("kind", expected, text).is_right == is_right


def test_normalising_twice_changes_nothing() -> None:
    assert normalise(normalise("  The Red\nStar. ")) == "the red star"


def test_accuracy_is_computed_per_kind_and_overall() -> None:
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


def test_the_table_has_a_row_per_kind_and_one_overall() -> None:
    table = score([answer("colour", "red", "red"), answer("count", "2", "3")]).table()
    assert table.splitlines() == [
        "| question type | questions | exact match |",
        "| --- | ---: | ---: |",
        "| colour | 1 | 100.0 % |",
        "| count | 1 | 0.0 % |",
        "| all | 2 | 50.0 % |",
    ]


def test_the_accuracy_of_no_answers_is_zero() -> None:
    assert score([]).accuracy == 0.0
