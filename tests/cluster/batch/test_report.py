"""A report counts the rows that were written, separating this run's from earlier ones."""

from typing import Any

from cluster.batch.records import EngineReading
from cluster.batch.report import Report


def row(number: int, **fields: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 10, "completion_tokens": 4, "image_tokens": 6, "cached_tokens": 0}
    return {"row": number, "usage": usage, "timings": {"preprocess": 500.0, "decode": 1500.0}, "error": None, **fields}


def broken(number: int, kind: str) -> dict[str, Any]:
    return row(number, usage=None, timings={"preprocess": 100.0}, error={"kind": kind, "message": "m"})


def test_rows_errors_tokens_and_times_are_counted() -> None:
    report = Report(10)
    report.count(row(0))
    report.begin()
    for each in (row(1), broken(2, "invalid_image"), broken(3, "invalid_image"), broken(4, "invalid_row")):
        report.count(each)
    report.seconds = 2.0
    report.read_engine(None)
    for steps, answers in ((4, 10), (2, 4)):
        report.read_engine(EngineReading("a", steps, answers, 0.5, 9))
    assert report.as_json() == {
        "rows": 10,
        "done": 5,
        "answered": 2,
        "errors": {"invalid_image": 2, "invalid_row": 1},
        "tokens": {"prompt": 20, "image": 12, "completion": 8},
        "stage_seconds": {"decode": 3.0, "preprocess": 1.3},
        "this_run": {
            "rows": 4,
            "seconds": 2.0,
            "completion_tokens": 4,
            "tokens_per_second": 2.0,
            "engines": [{"replica": "a", "steps": 4, "mean_batch": 2.5, "step_seconds": 0.5, "completion_tokens": 9}],
        },
    }
    lines = report.lines()
    assert lines[0] == "5 of 10 rows done: 2 answered, 3 errors"
    assert lines[1:3] == ["  2 x invalid_image", "  1 x invalid_row"]
    assert "this run: 4 rows in 2.0 s, 2.0 tokens per second" in lines


def test_a_run_without_work_has_no_rate() -> None:
    report = Report(1)
    report.count(row(0))
    report.begin()
    assert report.as_json()["this_run"]["tokens_per_second"] is None
    assert report.lines()[0] == "1 of 1 rows done: 1 answered, 0 errors"
