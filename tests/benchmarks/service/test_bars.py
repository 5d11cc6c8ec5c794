"""Which measurements keep a bar, and how they are reported."""

import math

import pytest

from benchmarks.service.bars import Bar, make_table


@pytest.mark.parametrize(
    ("measured", "sense", "limit", "is_kept"),
    [
        (1, "≤", 1, True),
        (1.01, "≤", 1, False),
        (0.9, "≥", 0.9, True),
        (0.89, "≥", 0.9, False),
        (0, "=", 0, True),
        (1, "=", 0, False),
        (0, "<", 0, False),
        (-0.1, "<", 0, True),
        (math.nan, "≤", 1, False),
        (math.nan, "≥", 1, False),
    ],
)
def test_a_bar_is_kept_or_not(measured: float, sense: str, limit: float, *, is_kept: bool) -> None:
    assert Bar("what", measured, sense, limit).is_kept is is_kept  # type: ignore[arg-type]


def test_the_table_marks_bars_that_are_not_kept() -> None:
    *_, kept, failed = make_table([Bar("errors", 0, "=", 0), Bar("freed", 1.23456, "≤", 1, "s")]).splitlines()
    assert kept == "| errors | 0 | = 0 |  |"
    assert failed == "| freed | 1.235 s | ≤ 1 s | **not kept** |"
    assert Bar("freed", 1.23456, "≤", 1, "s").as_json() == {"measured": 1.2346, "bar": "≤ 1 s", "is_kept": False}
